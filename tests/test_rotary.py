"""Tables of rotary embedding, against transformers' and diffusers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peers
import pytest
import torch

from fusegen.runtime.errors import RequestError
from fusegen.runtime.rotary import KINDS, Scaling, axis_tables, frequencies, grid, plain, tables

DIM, BASE, TRAINED = 64, 500000.0, 8192
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + i / 100 for i in range(DIM // 2)],
        "long_factor": [1.0 + i for i in range(DIM // 2)],
        "original_max_position_embeddings": 2048,
    },
}
VARIANTS = [
    *PARAMETERS.items(),
    ("yarn", PARAMETERS["yarn"] | {"truncate": False, "beta_fast": 16.0}),
    ("yarn", PARAMETERS["yarn"] | {"mscale": 0.707, "mscale_all_dim": 1.0}),
    ("yarn", PARAMETERS["yarn"] | {"attention_factor": 1.25}),
]


def theirs(kind: str, parameters: dict[str, Any], length: int) -> tuple[torch.Tensor, float]:
    peers.transformers()
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": kind, "rope_theta": BASE, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("length", [100, 3 * TRAINED])
@pytest.mark.parametrize(("kind", "parameters"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "")
def test_frequencies_are_those_of_transformers(kind: str, parameters: dict[str, Any], length: int) -> None:
    want, factor = theirs(kind, parameters, length)
    given = {"original_max_position_embeddings": TRAINED, "rope_theta": BASE, "rope_type": kind, **parameters}
    got, own = frequencies(DIM, BASE, Scaling.of(given), length)
    assert got.dtype == torch.float64 and got.shape == (DIM // 2,)
    assert own == pytest.approx(factor, rel=1e-12)
    assert torch.allclose(got, want.double(), rtol=3e-6, atol=0)  # theirs is float32
    assert (got - plain(DIM, BASE)).abs().max() > 1e-3 or (kind == "dynamic" and length < TRAINED)


def test_every_kind_was_compared() -> None:
    assert PARAMETERS.keys() | {"default"} == KINDS.keys()


def test_default_frequencies_are_the_papers() -> None:
    got, factor = frequencies(8, 10000.0)
    assert got.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-15) and factor == 1.0


def test_far_positions_keep_their_angle() -> None:
    """In float32 the angle of position 1,000,003 would be off by thousandths."""
    cos, sin = tables(torch.tensor([0, 1_000_003]), plain(8, 10000.0), 0.5)
    angle = 1_000_003 * plain(8, 10000.0)
    assert torch.equal(cos[1], (0.5 * angle.cos()).float()) and torch.equal(sin[1], (0.5 * angle.sin()).float())
    assert cos[0].tolist() == [0.5] * 4 and sin[0].tolist() == [0.0] * 4
    rounded = (1_000_003 * plain(8, 10000.0).float()).cos() * 0.5
    assert (rounded - cos[1]).abs().max() > 5e-4


def test_flux_tables() -> None:
    peers.diffusers()
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.cat([torch.zeros(5, 3), torch.cat([torch.zeros(12, 1), grid(3, 4).float()], 1)])
    want = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(ids)
    for got, full in zip(axis_tables(ids, (16, 56, 56)), want, strict=True):
        assert torch.equal(got.repeat_interleave(2, -1), full)


def test_wan_tables() -> None:
    peers.diffusers()
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    want = WanRotaryPosEmbed(128, (1, 2, 2), 64)(SimpleNamespace(shape=(1, 16, 3, 8, 10)))
    for got, full in zip(axis_tables(grid(3, 4, 5), (44, 42, 42)), want, strict=True):
        assert torch.equal(got.repeat_interleave(2, -1), full[0, :, 0])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RequestError, match="is called 'ntk': there are default, linear, "):
        Scaling.of({"rope_type": "ntk"})
    with pytest.raises(RequestError, match="'llama3' needs original_max_position_embeddings"):
        frequencies(64, scaling=Scaling("llama3"))
    with pytest.raises(RequestError, match="needs 32 short and long factors"):
        frequencies(64, scaling=Scaling("longrope", original_max_position_embeddings=9))
    with pytest.raises(RequestError, match="3 axes of positions, and dimensions for 2"):
        axis_tables(torch.zeros(4, 3), (8, 8))
