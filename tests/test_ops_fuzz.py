"""Kernels against their references on shapes, layouts and dtypes that nobody chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_all_close, cloned, mutated, truth, tuples
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.op import FLOATS
from fusegen.kernels.sampler_step import NAMES, SLOTS, make_row

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
Draw = st.DrawFn
dtypes = st.sampled_from(FLOATS)


def _check(name: str, args: tuple[Any, ...], level: str) -> None:
    op = registry.get(name)
    note(f"{[(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]} at {level}")
    own = cloned(args)
    with library.forced(level):
        got = {f"output {i}": out for i, out in enumerate(tuples(registry.run(op, own)))} | mutated(op, own)
    assert_all_close(op, f"random at {level}", got, truth(op, args))


def _levels() -> st.SearchStrategy[str]:
    return st.sampled_from(library.levels() if library.available() else ("",))


@st.composite
def _tensor(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    seed = draw(st.integers(0, 2**31))
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


@st.composite
def _parameters(draw: Draw, width: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    kinds = st.sampled_from([None, dtype, torch.float32])
    kind = [draw(kinds) for _ in range(2)]
    weight, bias = (None if k is None else draw(_tensor((width,), k)) for k in kind)
    return weight, bias


@st.composite
def group_norm_args(draw: Draw) -> tuple[Any, ...]:
    groups, width, dtype = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(dtypes)
    sides = draw(st.lists(st.integers(0, 23), max_size=3))
    x = draw(_tensor((draw(st.integers(0, 3)), groups * width, *sides), dtype, draw(st.sampled_from([0.0, 8.0]))))
    if len(sides) == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = draw(_parameters(groups * width, dtype))
    return (x, groups, weight, bias, draw(st.sampled_from([1e-5, 1e-6])), draw(st.sampled_from(["none", "silu"])))


@st.composite
def layer_norm_args(draw: Draw) -> tuple[Any, ...]:
    width, dtype = draw(st.integers(1, 700)), draw(dtypes)
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    x = draw(_tensor((*lead, width + draw(st.integers(0, 3))), dtype))[..., :width]
    return (x, *draw(_parameters(width, dtype)), 1e-5)


@st.composite
def noise_normal_args(draw: Draw) -> tuple[Any, ...]:
    seeds = draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
    shape = draw(st.lists(st.integers(0, 70), max_size=2))
    counters = st.integers(0, 2**32 - 1)
    return (torch.tensor(seeds, dtype=torch.int64), shape, draw(counters), draw(counters))


@st.composite
def sampler_step_args(draw: Draw) -> tuple[Any, ...]:
    batch, inner = draw(st.integers(0, 3)), tuple(draw(st.lists(st.integers(0, 60), min_size=1, max_size=2)))
    coefficients = st.sampled_from([0.0, 1.0, -0.5, 0.125])
    row = {name: draw(coefficients) for name in NAMES if name not in ("CLIP", "STEP", "STORE_X", "STORE_D")}
    row |= {"STEP": draw(st.integers(0, 2**24)), "CLIP": draw(st.sampled_from([1.0, float("inf")]))}
    row |= {name: draw(st.integers(-1, SLOTS - 1)) for name in ("STORE_X", "STORE_D")}
    x = draw(_tensor((batch, *inner), torch.float32))
    out = draw(_tensor((batch * draw(st.integers(1, 2)), *inner), draw(dtypes)))
    history = draw(_tensor((2 * SLOTS, batch, *inner), torch.float32))
    seeds = torch.arange(batch) * 3 - 1
    guidance = draw(_tensor((batch,), torch.float32, 2.0))
    return (x, out, torch.tensor(make_row(**row)), history, seeds, guidance, draw(st.sampled_from([0.0, 0.5])))


@st.composite
def attention_args(draw: Draw) -> tuple[Any, ...]:
    batch, kv_heads, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys, dim, dtype = (
        draw(st.integers(1, 70)),
        draw(st.integers(1, 90)),
        draw(st.integers(1, 130)),
        draw(dtypes),
    )
    heads = kv_heads * repeats
    q = draw(_tensor((batch, queries, heads, dim), dtype)).transpose(1, 2)
    k, v = (draw(_tensor((batch, kv_heads, keys, dim), dtype)) for _ in range(2))
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    mask = draw(_tensor((batch, 1, queries, keys), torch.float32 if kind == "float" else dtype))
    mask = {"none": None, "bool": mask > -0.5, "float": mask}[kind]
    lengths = draw(st.none() | st.lists(st.integers(0, keys), min_size=batch, max_size=batch))
    return (q, k, v, mask, None if lengths is None else torch.tensor(lengths), draw(st.booleans()), None)


@given(group_norm_args(), _levels())
def test_group_norm(args: tuple[Any, ...], level: str) -> None:
    _check("group_norm", args, level)


@given(layer_norm_args(), _levels())
def test_layer_norm(args: tuple[Any, ...], level: str) -> None:
    _check("layer_norm", args, level)


@given(noise_normal_args(), _levels())
def test_noise_normal(args: tuple[Any, ...], level: str) -> None:
    _check("noise_normal", args, level)


@given(sampler_step_args(), _levels())
def test_sampler_step(args: tuple[Any, ...], level: str) -> None:
    _check("sampler_step", args, level)


@given(attention_args(), _levels())
def test_attention(args: tuple[Any, ...], level: str) -> None:
    _check("attention", args, level)
