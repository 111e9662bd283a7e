"""Every op of the registry, every case, every dtype, every instruction set of this CPU, by one set of rules."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from compare import assert_all_close, cloned, mutated, run_fenced, same_bits, truth, tuples
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.op import Case, Op, pick

OPS = registry.ops()
CPU_KERNELS = [op for op in OPS.values() if any(k.device == "cpu" for k in op.kernels)]
EVERY = [(op, case, dtype) for op in OPS.values() for case in op.cases if not case.bench for dtype in case.dtypes]
# A benchmark's case is large: each is run in one dtype, in turn, at the highest level.
LARGE = [
    (op, case, case.dtypes[i % len(case.dtypes)]) for op in CPU_KERNELS for i, case in enumerate(op.cases) if case.bench
]
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value.name)


def _build(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    return case.build(torch.Generator().manual_seed(2024), dtype)


def _levels(op: Op) -> list[str]:
    """The levels of this CPU that run code of their own for the op."""
    row = library.ladder().get(op.name, {})
    return [level for level, code in row.items() if code == level]


@needs_library
@pytest.mark.parametrize(("op", "case", "dtype"), EVERY, ids=_name)
def test_kernels_agree_with_the_reference_at_every_level(op: Op, case: Case, dtype: torch.dtype) -> None:
    args = _build(case, dtype)
    want = truth(op, args)
    for level in _levels(op):
        with library.forced(level):
            for kernel in (k for k in op.kernels if k.device == "cpu" and k.decline(*args) is None):
                label = f"{case.name} / {dtype} / {kernel.name} at {level}"
                assert_all_close(op, label, run_fenced(op, kernel, args), want)


@needs_library
@pytest.mark.parametrize(("op", "case", "dtype"), LARGE, ids=_name)
def test_large_cases_are_served_by_a_kernel(op: Op, case: Case, dtype: torch.dtype) -> None:
    args = _build(case, dtype)
    kernel, declined = pick(op, "cpu", args).kernel, pick(op, "cpu", args).declined
    if kernel is None and all(d.reason.startswith("the level ") for d in declined):
        pytest.skip(declined[0].reason)
    assert kernel is not None, declined
    if op.cost(*args).flops > 2**32:
        pytest.skip("the float64 reference takes too long")
    try:
        want = truth(op, args)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        pytest.skip("the float64 reference takes too much memory")
    assert_all_close(op, f"{case.name} / {dtype} / {kernel.name}", run_fenced(op, kernel, args), want)


@pytest.mark.parametrize(("op", "case", "dtype"), EVERY, ids=_name)
def test_the_reference_in_its_own_dtype(op: Op, case: Case, dtype: torch.dtype) -> None:
    args = _build(case, dtype)
    own = cloned(args)
    got = {f"output {i}": out for i, out in enumerate(tuples(op.reference(*own)))} | mutated(op, own)
    assert_all_close(op, f"{case.name} / {dtype} / reference", got, truth(op, args))


@pytest.mark.parametrize(("op", "case", "dtype"), EVERY, ids=_name)
def test_allocate_fake_and_real_outputs_agree(op: Op, case: Case, dtype: torch.dtype) -> None:
    args = _build(case, dtype)
    call = getattr(torch.ops.fusegen, op.name)
    meta = tuple(_to_meta(a) if isinstance(a, Tensor) else a for a in args)
    described = [
        [(tuple(t.shape), t.stride(), t.dtype) for t in outs]
        for outs in (
            op.allocate(*args),
            tuples(call(*meta)),
            tuples(call(*cloned(args))),
            tuples(op.reference(*cloned(args))),
        )
    ]
    assert all(d == described[0] for d in described), described
    assert op.cost(*meta) == op.cost(*args)
    for kernel in op.kernels:
        assert kernel.decline(*meta) == kernel.decline(*args)  # a plan is made of shapes alone


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.parametrize("op", OPS.values(), ids=_name)
def test_opcheck(op: Op) -> None:
    for case in [c for c in op.cases if not c.bench][:2]:
        torch.library.opcheck(getattr(torch.ops.fusegen, op.name).default, cloned(_build(case, case.dtypes[0])))


@needs_library
@pytest.mark.parametrize("op", CPU_KERNELS, ids=_name)
def test_threads_do_not_change_a_bit(op: Op) -> None:
    before = torch.get_num_threads()
    try:
        for case in op.cases:
            args = _build(case, case.dtypes[0])
            if (case.bench and sum(a.numel() for a in args if isinstance(a, Tensor)) > 2**20) or not _served(op, args):
                continue
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(_run(op, args))
            for other in results[1:]:
                for name, tensor in results[0].items():
                    assert same_bits(tensor, other[name]), f"{op.name} / {case.name} / {name}"
    finally:
        torch.set_num_threads(before)


def _served(op: Op, args: tuple[Any, ...]) -> bool:
    return pick(op, "cpu", args).kernel is not None


def _run(op: Op, args: tuple[Any, ...]) -> dict[str, Tensor]:
    own = cloned(args)
    outs = tuples(registry.run(op, own))
    return {f"output {i}": out for i, out in enumerate(outs)} | mutated(op, own)


@needs_library
@pytest.mark.parametrize("op", CPU_KERNELS, ids=_name)
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(op: Op) -> None:
    if op.alone is None:
        pytest.skip("its output has no batch axis")
    for case in op.cases:
        args = _build(case, case.dtypes[0])
        batch = args[0].shape[0]
        if case.bench or batch < 2 or case.name == "one row" or not _served(op, args):  # a row is no batch
            continue
        whole = _run(op, args)["output 0"]
        for b in {0, batch // 2, batch - 1}:
            own = _run(op, op.alone(args, b))["output 0"]
            assert same_bits(whole[b : b + 1], own), f"{op.name} / {case.name}: sample {b} differs alone"


@needs_library
@pytest.mark.parametrize("op", CPU_KERNELS, ids=_name)
def test_a_launch_follows_tensors_that_move(op: Op) -> None:
    for case in [c for c in op.cases if not c.bench][:3]:
        args, other = (case.build(torch.Generator().manual_seed(s), case.dtypes[0]) for s in (1, 2))
        kernel = pick(op, "cpu", args).kernel
        if kernel is None:
            continue
        outs = op.allocate(*args)
        launch = kernel.bind(outs, args)
        launch.run()
        for i, a in enumerate(other):
            if isinstance(a, Tensor):
                launch.move(i, a)
        want = truth(op, other)
        launch.run()
        got = {f"output {i}": out for i, out in enumerate(outs)} | mutated(op, other)
        assert_all_close(op, f"{case.name} moved", got, want)


def test_every_op_file_holds_the_op_of_its_name() -> None:
    for name in OPS:
        assert importlib.import_module(f"fusegen.kernels.{name}").OP is OPS[name]
