"""Norms in exported models of diffusers and transformers: every one becomes the fused op, with what surrounds it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import peers
import pytest
import torch
from interpret import interpret
from torch import Tensor, nn

from fusegen.runtime.api import capture
from fusegen.runtime.program import Program, check
from fusegen.runtime.rewrite import rewrite

LAYER, RMS, GROUP = (f"fusegen.{name}_norm.default" for name in ("layer", "rms", "group"))


class Call(nn.Module):
    """A module called with its inputs by name, whose first result is returned."""

    def __init__(self, module: nn.Module, names: str, **fixed: Any):
        super().__init__()
        self.module, self.names, self.fixed = module, names.split(), fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(**dict(zip(self.names, inputs, strict=True)), **self.fixed)[0]


def small(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model, as published but small, and its inputs."""
    d, hf = peers.diffusers(), peers.transformers()
    token, width = torch.randint(1, 99, (2, 12)), dict(vocab_size=100, hidden_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    if name in ("Llama", "Gemma", "Qwen3"):
        more = {"head_dim": 8} if name != "Llama" else {}
        config = getattr(hf, f"{name}Config")(**width, **heads, **more, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return Call(getattr(hf, f"{name}ForCausalLM")(config), "input_ids", use_cache=False, return_dict=False), (
            token,
        )
    if name == "T5":
        config = hf.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        return Call(hf.T5EncoderModel(config), "input_ids", return_dict=False), (token,)
    image, time = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    size = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2)
    if name == "DiT":
        net = d.DiTTransformer2DModel(**size, in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=10)
        names, more = "hidden_states timestep class_labels", (time.long(), torch.tensor([1, 5]))
        return Call(net, names, return_dict=False), (image, *more)
    if name == "SD3":
        net = d.SD3Transformer2DModel(
            **size, sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=24, caption_projection_dim=32,
            pooled_projection_dim=20, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip
        names = "hidden_states encoder_hidden_states pooled_projections timestep"
        return Call(net, names, return_dict=False), (image, torch.randn(2, 7, 24), torch.randn(2, 20), time)
    net = d.UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, resnet_time_scale_shift="scale_shift" if name == "ADM" else "default",
    )  # fmt: skip
    return Call(net, "sample timestep", return_dict=False), (torch.randn(2, 4, 16, 16), time)


# What each must hold: norms by op, and how many of them take a modulation ("scale") or an addition ("add").
EXPECTED: dict[str, Counter[str]] = {
    "Llama": Counter({RMS: 5}),
    "Gemma": Counter({RMS: 5, "offset": 5}),
    "Qwen3": Counter({RMS: 5}),
    "T5": Counter({RMS: 5}),
    "DiT": Counter({LAYER: 5, "scale": 5}),
    "SD3": Counter({LAYER: 8, RMS: 8, "scale": 8}),
    "UNet": Counter({GROUP: 21, "add": 8}),
    "ADM": Counter({GROUP: 20, "scale": 8}),
}


@pytest.fixture(scope="module", params=EXPECTED)
def model(request) -> tuple[str, nn.Module, tuple[Tensor, ...], Program]:
    torch.manual_seed(0)
    module, inputs = small(request.param)
    for p in module.parameters():  # adaptive norms start as the identity
        nn.init.normal_(p, 0.0 if p.dim() > 1 else 1.0, p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
    return request.param, module.eval(), inputs, capture(module, inputs)


def found(program: Program) -> Counter[str]:
    """Norms by op, and what they take."""
    norms = [n for n in program.nodes if n.op in (LAYER, RMS, GROUP)]
    out = Counter(n.op for n in norms)
    for name in ("scale", "add", "offset"):
        out[name] = sum(bool(n.args.get(name)) for n in norms)
    return +out


def test_every_norm_is_found_with_what_surrounds_it(model) -> None:
    name, _, _, before = model
    after = check(rewrite(before))
    assert found(after) == EXPECTED[name]
    assert not {"aten.rsqrt.default", "aten.layer_norm.default", "aten.group_norm.default"} & after.counts().keys()
    assert [a for a in after.applied if a.left] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_means_the_same(model, dtype: torch.dtype) -> None:
    """No further from float64 than twice what the module itself is in that dtype."""
    name, module, inputs, before = model
    after = rewrite(before, None if dtype == torch.float32 else dtype)
    (got,) = interpret(check(after), *inputs)
    (eager,) = interpret(before, *inputs)
    exact = _in(module, inputs, torch.float64)
    own = eager if dtype == torch.float32 else _in(module, inputs, dtype)
    assert _rms(got, exact) <= max(2 * _rms(own, exact), 2e-6), name


def _in(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    low = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        return low(*(x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for x in inputs))


def _rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
