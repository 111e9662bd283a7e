"""rewrite() on whole models: every norm and attention is replaced, and the model means the same."""

from __future__ import annotations

import copy
from typing import Any

import peers
import pytest
import torch
from interpret import interpret
from torch import Tensor, nn

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import UNet, UNetConfig
from fusegen.runtime.api import capture
from fusegen.runtime.program import Program, check
from fusegen.runtime.rewrite import rewrite

# What must not be left, and what it must have become: groups of ATen names -> the fused op.
FUSED = {
    "fusegen.attention.default": {"aten.scaled_dot_product_attention.default"},
    "fusegen.group_norm.default": {"aten.group_norm.default"},
    "fusegen.layer_norm.default": {"aten.layer_norm.default"},
}
USELESS = {"aten.dropout.default", "aten.contiguous.default", "aten.clone.default", "aten.view.default"}


class Call(nn.Module):
    """A module whose first result is returned, called with fixed keywords."""

    def __init__(self, module: nn.Module, **fixed: Any):
        super().__init__()
        self.module, self.fixed = module, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs, **self.fixed)[0]


def small_unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    sizes = UNetConfig(widths=(32, 64), attention=(False, True), head_dim=32, context_width=32, time_width=64, groups=8)
    unet = UNet(sizes)
    for p in unet.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return unet, (torch.randn(2, 3, 16, 16), torch.tensor([3.0, 917.0]), torch.randn(2, 5, 32))


def small_text_encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    tokens = torch.randint(1, 100, (2, 16))
    tokens[0, 9:] = 0
    return TextEncoder(TextEncoderConfig(100, width=64, layers=2)), (tokens,)


def diffusers_unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    unet = peers.diffusers().UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([10, 917]), torch.randn(2, 7, 32)
    return Call(unet, return_dict=False), inputs


def clip_text() -> tuple[nn.Module, tuple[Tensor, ...]]:
    hf = peers.transformers()
    config = hf.CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=99,
    )
    return Call(hf.CLIPTextModel(config), return_dict=False), (torch.randint(1, 99, (2, 77)),)


def gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    hf = peers.transformers()
    config = hf.GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4, eos_token_id=99)
    return Call(hf.GPT2LMHeadModel(config), use_cache=False, return_dict=False), (torch.randint(1, 99, (2, 16)),)


MODELS = [small_unet, small_text_encoder, diffusers_unet, clip_text, gpt2]


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: m.__name__)
def model(request) -> tuple[str, nn.Module, tuple[Tensor, ...], Program]:
    torch.manual_seed(0)
    module, inputs = request.param()
    return request.param.__name__, module.eval(), inputs, capture(module, inputs)


def in_dtype(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """What the module gives in that dtype; time steps stay float32, as its sinusoids do."""
    low = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        return low(*(x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for x in inputs))


def rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_everything_is_replaced(model) -> None:
    _, _, _, before = model
    after = check(rewrite(before))
    for fused, spelled in FUSED.items():
        assert after.counts().get(fused, 0) == sum(before.counts().get(s, 0) for s in spelled)
        assert not spelled & after.counts().keys()
    assert not USELESS & after.counts().keys()
    assert sum(len(a.left) for a in after.applied) == 0
    assert len(after.nodes) < len(before.nodes) or before.name == "TextEncoder"


def test_silu_joins_its_norm(model) -> None:
    name, _, _, before = model
    made = {o: n for n in before.nodes for o in n.outputs}
    silus = [n for n in before.nodes if n.op == "aten.silu.default"]
    behind = sum(made[n.args["self"].name].op == "aten.group_norm.default" for n in silus)
    after = rewrite(before)
    joined = [n for n in after.nodes if n.op == "fusegen.group_norm.default" and n.args["activation"] == "silu"]
    assert len(joined) == behind
    assert bool(behind) == ("unet" in name)


def test_a_time_embedding_joins_the_norm_after_it(model) -> None:
    name, _, _, before = model
    made = {o: n for n in before.nodes for o in n.outputs}
    norms = [
        made[n.args["input"].name]
        for n in before.nodes
        if n.op == "aten.group_norm.default" and made.get(n.args["input"].name)
    ]
    added = [n for n in norms if n.op == "aten.add.Tensor" and before.specs[n.args["other"].name].shape[2:] == (1, 1)]
    after = [n for n in rewrite(before).nodes if n.op == "fusegen.group_norm.default" and n.args["add"] is not None]
    assert len(after) == len(added)
    assert bool(added) == ("unet" in name)


def test_it_means_the_same(model) -> None:
    _, module, inputs, before = model
    want = in_dtype(module, inputs, torch.float64)
    (eager,), (got,) = interpret(before, *inputs), interpret(rewrite(before), *inputs)
    assert got.dtype == eager.dtype and got.shape == eager.shape
    assert rms(got, want) <= max(2 * rms(eager, want), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_it_means_the_same_in_half_precision(model, dtype: torch.dtype) -> None:
    """No further from float64 than twice what PyTorch is, with the module itself in that dtype."""
    name, module, inputs, before = model
    want = in_dtype(module, inputs, torch.float64)
    after = rewrite(before, dtype)
    (got,) = interpret(check(after), *inputs)
    assert got.dtype == torch.float32
    eager = in_dtype(module, inputs, dtype)
    assert rms(got, want) <= 2 * rms(eager, want), (name, rms(got, want), rms(eager, want))


def test_rewriting_again_changes_nothing(model) -> None:
    _, _, _, before = model
    for dtype in (None, torch.bfloat16):
        once = rewrite(before, dtype)
        twice = rewrite(once, dtype)
        assert (twice.nodes, twice.outputs) == (once.nodes, once.outputs)
        assert twice.weights.keys() == once.weights.keys()
        assert twice.applied == once.applied
