"""Kernels on arguments that nobody chose: each op's ``draw``, with sizes, strides, alignment and options at random.

Every run is fenced: outputs start as NaN, sentinels stand around every buffer, what may not be read is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compare import assert_all_close, cloned, mutated, run_fenced, same_bits, truth, tuples
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.draw import LAYOUTS, Draw, laid_out
from fusegen.kernels.op import Op, pick

DRAWN = [op for op in registry.ops().values() if op.draw is not None]
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
every_op = pytest.mark.parametrize("op", DRAWN, ids=lambda op: op.name)


def _drawn(op: Op, data: st.DataObject) -> tuple[Any, ...]:
    """Arguments of the op; what they are stands in a failure's message."""
    draw = Draw(lambda low, high: data.draw(st.integers(low, high)))
    assert op.draw is not None
    args = op.draw(draw, draw.choice(tuple(op.tolerance)))
    note(str([(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]))
    return args


@needs_library
@every_op
@given(data=st.data())
def test_kernels_agree_with_the_reference(op: Op, data: st.DataObject) -> None:
    args = _drawn(op, data)
    want, cache = truth(op, args), 1 if data.draw(st.booleans()) else 0  # bytes; 0: the machine's
    for level in [level for level, code in library.ladder().get(op.name, {}).items() if code == level]:
        with library.forced(level), library.cached(cache):
            for kernel in op.kernels:
                if kernel.device == "cpu" and kernel.decline(*args) is None:
                    assert_all_close(op, f"random / {kernel.name} at {level}", run_fenced(op, kernel, args), want)


@needs_library
@every_op
@given(data=st.data())
def test_threads_and_the_batch_do_not_change_a_bit(op: Op, data: st.DataObject) -> None:
    args = _drawn(op, data)
    if pick(op, "cpu", args).kernel is None:
        return
    first = _run(op, args, threads=1)
    for threads, cache in ((2, 0), (5, 1)):
        with library.cached(cache):
            own = _run(op, args, threads)
        for name, tensor in own.items():
            assert same_bits(tensor, first[name]), f"{name} differs with {threads} threads, a cache of {cache} bytes"
    for b in range(args[0].shape[0] if op.alone is not None else 0):
        alone = _run(op, op.alone(args, b), threads=1)["output 0"]
        assert same_bits(first["output 0"][b : b + 1], alone), f"sample {b} differs alone"


@every_op
@given(data=st.data())
def test_the_reference_and_its_outputs_layout(op: Op, data: st.DataObject) -> None:
    args = _drawn(op, data)
    own = cloned(args)
    outs = tuples(op.reference(*own))
    for made, planned in zip(outs, op.allocate(*args), strict=True):
        assert (made.shape, made.stride(), made.dtype) == (planned.shape, planned.stride(), planned.dtype)
    got = {f"output {i}": out for i, out in enumerate(outs)} | mutated(op, own)
    assert_all_close(op, "random / reference", got, truth(op, args))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(op: Op, args: tuple[Any, ...], threads: int) -> dict[str, Tensor]:
    own = cloned(args)
    with _threads(threads):
        outs = tuples(registry.run(op, own))
    return {f"output {i}": out for i, out in enumerate(outs)} | mutated(op, own)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (3, 2, 0, 4), (2, 3, 4, 5)])
def test_a_layout_keeps_the_values(layout: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert same_bits(laid_out(x, layout), x)


def test_layouts_are_what_they_are_called() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert {name: laid_out(x, name).stride() for name in LAYOUTS if name != "unaligned"} == {
        "contiguous": (60, 20, 5, 1),
        "padded": (96, 32, 8, 1),
        "strided": (120, 40, 10, 2),
        "transposed": (20, 40, 5, 1),
        "channels_last": (60, 1, 15, 3),
    }
    assert laid_out(x, "unaligned").data_ptr() % 64 == 4
    with pytest.raises(ValueError, match="no layout is called 'rows'; there are contiguous, "):
        laid_out(x, "rows")
