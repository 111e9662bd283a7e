"""rewrite() on transformers of diffusers and transformers: gates and rotations are replaced, the meaning stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from interpret import interpret
from torch import Tensor, nn
from torch.export import Dim

from fusegen.kernels.cpu import library
from fusegen.runtime.api import capture, compile
from fusegen.runtime.program import Program, check
from fusegen.runtime.rewrite import rewrite

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
IDS = (torch.randint(1, 99, (2, 12), generator=torch.Generator().manual_seed(0)),)
Model = tuple[nn.Module, tuple[Tensor, ...]]


class Call(nn.Module):
    """A module whose first result is returned, called by keywords."""

    def __init__(self, module: nn.Module, *names: str, **fixed: Any):
        super().__init__()
        self.module, self.names, self.fixed = module, names, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self.names:
            return self.module(*inputs, return_dict=False, **self.fixed)[0]
        return self.module(**dict(zip(self.names, inputs, strict=True)), return_dict=False, **self.fixed)[0]


def _causal(name: str, **sizes: Any) -> Model:
    hf = peers.transformers()
    config = getattr(hf, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")
    return Call(getattr(hf, f"{name}ForCausalLM")(config(**sizes)), use_cache=False), IDS


def llama() -> Model:
    return _causal("Llama", **GROUPED)


def qwen3() -> Model:
    return _causal("Qwen3", **GROUPED)


def gemma3() -> Model:
    return _causal("Gemma3", **GROUPED)


def phi3() -> Model:
    return _causal("Phi3", **{k: v for k, v in GROUPED.items() if k != "head_dim"}, pad_token_id=0)


def gpt_neox() -> Model:
    return _causal("GPTNeoX", **SIZES)


def gpt_j() -> Model:
    sizes = {"vocab_size": 100, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    return _causal("GPTJ", **sizes, bos_token_id=1, eos_token_id=2)


def gpt_oss() -> Model:
    return _causal("GptOss", **GROUPED, num_local_experts=2, num_experts_per_tok=1)


def t5() -> Model:
    hf = peers.transformers()
    config = hf.T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return Call(hf.T5EncoderModel(config)), IDS


def flux() -> Model:
    model = peers.diffusers().FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    inputs = (torch.randn(1, 16, 4), torch.randn(1, 8, 32), torch.randn(1, 32), torch.tensor([1.0]))
    return Call(model, *names), (*inputs, torch.randint(0, 9, (16, 3)).float(), torch.zeros(8, 3))


def wan() -> Model:
    model = peers.diffusers().WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    return Call(model, *names), (torch.randn(1, 4, 2, 8, 8), torch.tensor([5]), torch.randn(1, 12, 16))


# The model -> how many of each fused op its one layer holds (Flux: a double layer and a single one).
MODELS: dict[Callable[[], Model], dict[str, int]] = {
    llama: {"rope": 2, "gated_mlp_act": 1},
    qwen3: {"qk_norm_rope": 2, "gated_mlp_act": 1},
    gemma3: {"qk_norm_rope": 2, "gated_mlp_act": 1},
    phi3: {"rope": 2, "gated_mlp_act": 1},
    gpt_neox: {"rope": 2},
    gpt_j: {"rope": 2},
    gpt_oss: {"rope": 2},
    t5: {"gated_mlp_act": 1},
    flux: {"rope": 2, "qk_norm_rope": 2},
    wan: {"rope": 2},
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: m.__name__)
def model(request) -> tuple[dict[str, int], nn.Module, tuple[Tensor, ...], Program]:
    torch.manual_seed(0)
    module, inputs = request.param()
    return MODELS[request.param], module.eval(), inputs, capture(module, inputs)


def in_dtype(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """What the module gives in that dtype; time steps and positions stay as they are."""
    low = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        return low(*(x.to(dtype) if x.is_floating_point() and x.dim() > 2 else x for x in inputs))


def rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_all_of_them_are_replaced(model) -> None:
    expected, _, _, before = model
    counts = check(rewrite(before)).counts()
    names = ("rope", "qk_norm_rope", "gated_mlp_act")
    assert {n: c for n in names if (c := counts.get(f"fusegen.{n}.default", 0))} == expected
    assert not {"aten.neg.default", "aten.slice_scatter.default"} & counts.keys()


def test_it_means_the_same(model) -> None:
    _, module, inputs, before = model
    with torch.no_grad():
        want = module(*inputs)
    (got,) = interpret(rewrite(before), *inputs)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert rms(got, want) <= 5e-6


def test_rewriting_again_changes_nothing(model) -> None:
    once = rewrite(model[3], torch.bfloat16)
    twice = rewrite(once, torch.bfloat16)
    assert (twice.nodes, twice.outputs, twice.applied) == (once.nodes, once.outputs, once.applied)


@pytest.mark.parametrize("build", [llama, qwen3, phi3], ids=lambda m: m.__name__)
def test_it_means_the_same_in_bfloat16(build: Callable[[], Model]) -> None:
    """No further from float32 than twice what PyTorch is, with the module itself in that dtype; tables stay float32."""
    torch.manual_seed(0)
    module, inputs = build()
    module = module.eval()
    after = check(rewrite(capture(module, inputs), torch.bfloat16))
    with torch.no_grad():
        want = module(*inputs)
    (got,) = interpret(after, *inputs)
    assert rms(got, want) <= 2 * rms(in_dtype(module, inputs, torch.bfloat16), want)
    for node in after.nodes:
        if node.op.endswith("rope.default"):
            assert after.weights[node.args["cos"].name].dtype == torch.float32


def test_a_length_that_varies() -> None:
    torch.manual_seed(0)
    module, inputs = llama()
    program = capture(module.eval(), inputs, dynamic=(({0: Dim("batch"), 1: Dim("length", max=64)},),))
    assert rewrite(program).counts().get("fusegen.rope.default", 0) == 2


@pytest.mark.skipif(not library.available(), reason=library.missing() or "")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("build", "kernel"), [(phi3, "rope C++"), (qwen3, "qk_norm_rope C++"), (flux, "rope C++")])
def test_a_session_runs_the_kernels(build: Callable[[], Model], kernel: str, dtype: str) -> None:
    torch.manual_seed(0)
    module, inputs = build()
    session = compile(capture(module.eval(), inputs), device="cpu", dtype=dtype)
    with torch.no_grad():
        want = module(*inputs)
    assert rms(session(*inputs), want) <= (1e-5 if dtype == "float32" else 3e-2)
    assert any(kernel in name for name in session.plan.counts())
