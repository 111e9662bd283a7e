"""capture(): the program means what the module does, with sizes that vary; what cannot be captured says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpret import interpret
from peers import diffusers, transformers
from torch import Tensor, nn

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import UNet, UNetConfig
from fusegen.runtime.api import capture
from fusegen.runtime.errors import GraphError, RequestError
from fusegen.runtime.program import Program

SMALL = UNetConfig(widths=(32, 64), attention=(False, True), head_dim=32, context_width=32, time_width=64, groups=8)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def same(program: Program, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The program's output is the module's, to the bit: the operators are the same."""
    module.eval()
    with torch.no_grad():
        expected = tensors(module(*args, **kwargs))
    got = interpret(program, *tensors((args, kwargs)))
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


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
    assert program.specs[program.outputs[0]].shape == ("batch", 3, 16, 16)
    assert program.weights["conv_in.weight"].data_ptr() == unet.conv_in.weight.data_ptr()
    sources = {n.source for n in program.nodes if n.op == "aten.conv2d.default"}
    assert {"conv_in", "down.0.block.conv1", "conv_out"} <= sources
    for batch in (1, 2, 3):
        same(program, unet, *unet_inputs(batch))


def test_text_encoder_with_any_batch() -> None:
    encoder = TextEncoder(TextEncoderConfig(100, width=64, layers=2))
    program = capture(encoder, (torch.randint(0, 100, (2, 16)),), dynamic={"tokens": {0: "batch"}}, name="text")
    assert program.name == "text"
    tokens = torch.randint(0, 100, (5, 16))
    tokens[:, 0], tokens[:, 9:] = 1, 0
    same(program, encoder, tokens)


def test_stable_diffusion_unet_with_any_size() -> None:
    unet = diffusers().UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    height, width = torch.export.Dim("h", min=1, max=64), torch.export.Dim("w", min=1, max=64)
    batch = ("batch", 1, 63)
    program = capture(
        unet,
        (torch.randn(2, 4, 16, 16), torch.rand(2) * 999, torch.randn(2, 7, 32)),
        {"return_dict": False},
        {
            "sample": {0: batch, 2: 8 * height, 3: 8 * width},
            "timestep": {0: batch},
            "encoder_hidden_states": {0: batch},
        },
    )
    assert program.inputs["sample"].shape == ("batch", 4, "8*h", "8*w")
    assert set(program.symbols) == {"batch", "h", "w"}
    same(program, unet, torch.randn(3, 4, 24, 16), torch.rand(3) * 999, torch.randn(3, 7, 32), return_dict=False)


LENGTH = {"input_ids": {0: ("batch", 1, 8), 1: ("length", 2, 64)}}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "clip"])
def test_transformers(kind: str) -> None:
    hf = transformers()
    kwargs: dict[str, Any] = {"use_cache": False}
    if kind == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=64, **ends)
        )
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **TINY))
    else:
        ends = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 97}
        model, kwargs = hf.CLIPTextModel(hf.CLIPTextConfig(max_position_embeddings=16, **TINY, **ends)), {}
    dynamic = {"input_ids": {0: ("batch", 1, 8)}} if kind == "clip" else LENGTH
    length = 16 if kind == "clip" else 9
    program = capture(model, (torch.randint(0, 97, (2, length)),), kwargs, dynamic)
    same(program, model, torch.randint(0, 97, (3, length if kind == "clip" else 12)), **kwargs)
    if kind == "gpt2":  # the output layer is the embedding: one weight, one name
        assert sum(w.shape == (100, 32) for w in program.weights.values()) == 1


def test_generator_of_a_gan_with_writes_in_place() -> None:
    gan = nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(16, 3, 3, padding=1),
        nn.Dropout(),
        nn.Tanh(),
    )
    program = capture(gan, (torch.randn(2, 8, 4, 4),), dynamic={"input": {0: ("batch", 1, 9), 2: ("height", 2, 99)}})
    same(program, gan, torch.randn(3, 8, 6, 4))


class Odd(nn.Module):
    """Buffers that are not saved, constants, writes into views, many outputs, lists, regions that change no value."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.register_buffer("hidden", torch.randn(8), persistent=False)
        self.register_buffer("x", torch.randn(8))  # the name of an input
        self.plain = torch.randn(8)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Any:
        y, _ = self.lstm(x)
        _, indices = y.topk(2, -1)
        a, b = torch.split(more["k"], [3, 5], -1)
        z = y.clone()
        z[:, 0] = float("-inf")
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            a, b = F.silu(a), b * 2
        total = y + self.hidden + self.x + self.plain + torch.arange(8.0)
        return total, indices, None, torch.cat([b, a], -1), x, z.mul_(2), x[:, torch.tensor([0, 1])], x


def test_odd_module() -> None:
    module, args = Odd(), (torch.randn(2, 5, 8), {"k": torch.randn(2, 8)})
    program = capture(module, args)
    assert "hidden" in program.weights and "x" in program.inputs
    same(program, module, *args)


class Named(nn.Module):
    def forward(self, x: Tensor, n: int = 2) -> Tensor:
        return x * n


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class DataSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        return x + self.n


class WritesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Cond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Autocast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x


class Size(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x + 1, x.shape[0]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Branch(), r"could not export Branch"),
        (DataSize(), r"aten.index.Tensor makes a size that depends on data \(DataSize, index\)"),
        (Item(), r"aten.item.default makes no tensor \(Item, item\)"),
        (Counter(), r"writes to a buffer"),
        (WritesInput(), r"writes to an input"),
        (Cond(), r"higher-order operator cond cannot be read \(Cond, cond\)"),
        (Autocast(), r"autocast region"),
        (Size(), r"output of kind 'int'"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_what_cannot_be_captured(module: nn.Module, message: str) -> None:
    with pytest.raises(GraphError, match=message) as error:
        capture(module, (torch.ones(4, 4),))
    assert "\n" not in str(error.value)


def test_serializer_of_pytorch_2_11(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the same graph, and cannot leave out the weights."""
    from torch._export.serde.serialize import ExportedProgramSerializer

    newer = ExportedProgramSerializer.serialize
    monkeypatch.setattr(ExportedProgramSerializer, "serialize", lambda self, program: newer(self, program))
    module = nn.Linear(3, 2)
    same(capture(module, (torch.ones(1, 3),)), module, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {0: "n"}}, "no argument 'y'; there are x"),
        ({"x": {0: ("n", 9, 3)}}, "'n' from 9 to 3 is not a size"),
        ({"x": {0: ("n", 1, 3), 1: ("n", 1, 4)}}, "'n' is given two different ranges"),
    ],
)
def test_wrong_dynamic(dynamic: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        capture(Named(), (torch.ones(3, 3),), dynamic=dynamic)


def test_range_that_the_module_does_not_allow_says_the_reason() -> None:
    with pytest.raises(GraphError, match=r"Constraints violated.*Not all values of n"):
        capture(nn.Unflatten(0, (-1, 3)), (torch.ones(6),), dynamic={"input": {0: ("n", 2, 64)}})
