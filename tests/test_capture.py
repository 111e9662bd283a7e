"""capture(): the program means what the module does, with sizes that vary."""

from __future__ import annotations

import pytest
import torch
from interpret import interpret
from torch import Tensor, nn

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import UNet, UNetConfig
from fusegen.runtime.api import capture
from fusegen.runtime.errors import GraphError, RequestError

SMALL = UNetConfig(widths=(32, 64), attention=(False, True), head_dim=32, context_width=32, time_width=64, groups=8)


def same(program, module: nn.Module, *inputs: Tensor) -> None:
    """The program's output is the module's, to the bit: the operators are the same."""
    module.eval()
    with torch.no_grad():
        expected = module(*inputs)
    got = interpret(program, *inputs)
    for a, b in zip(got, expected if isinstance(expected, (tuple, list)) else (expected,), strict=True):
        assert torch.equal(a, b)


def unet_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 16, 16), torch.rand(batch) * 999, torch.randn(batch, 4, 32)


def test_unet_with_any_batch() -> None:
    unet = UNet(SMALL)
    for p in unet.parameters():
        nn.init.normal_(p, std=0.05)
    program = capture(unet, unet_inputs(2), dynamic={k: {0: ("batch", 1, 64)} for k in ("x", "t", "context")})
    assert unet.training  # as it was
    assert program.symbols == {"batch": (1, 64)}
    assert program.inputs["x"].shape == ("batch", 3, 16, 16)
    assert program.weights["conv_in.weight"].data_ptr() == unet.conv_in.weight.data_ptr()
    for batch in (1, 2, 3):
        same(program, unet, *unet_inputs(batch))


def test_text_encoder_with_any_batch() -> None:
    encoder = TextEncoder(TextEncoderConfig(100, width=64, layers=2))
    program = capture(encoder, (torch.randint(0, 100, (2, 16)),), dynamic={"tokens": {0: "batch"}}, name="text")
    assert program.name == "text"
    tokens = torch.randint(0, 100, (5, 16))
    tokens[:, 0], tokens[:, 9:] = 1, 0
    same(program, encoder, tokens)


def test_unknown_argument_in_dynamic() -> None:
    with pytest.raises(RequestError, match="no argument 'y'; there are x"):
        capture(_Named(), (torch.ones(2),), dynamic={"y": {0: "n"}})


class _Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_module_that_cannot_be_exported() -> None:
    with pytest.raises(GraphError, match="could not export _Branch") as error:
        capture(_Branch(), (torch.ones(2),))
    assert "\n" not in str(error.value)
