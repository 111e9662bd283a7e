"""How a test compares a kernel with the truth: relative RMS and peak error, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.op import Kernel, Op, Tolerance

OUTSIDE = 0x5A  # the byte around an output; an overrun would have to write just this


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: Tolerance) -> None:
    """``got`` is within ``tolerance`` of ``want`` (float64): infinities and NaNs stand at the same places.

    The message names ``name``, both errors with their bounds, and the worst element.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got64, want64 = got.double(), want.double()
    finite = want64.isfinite()
    same = torch.where(want64.isnan(), got64.isnan(), got64 == want64) | finite
    assert bool(same.all()), f"{name}: {int((~same).sum())} infinities or NaNs of the reference are not there"
    error = torch.where(finite, got64 - want64, 0.0).abs().flatten()
    if not error.numel():
        return
    worst = int(torch.where(error.isnan(), torch.inf, error).argmax())
    scale = torch.where(finite, want64, 0.0)
    rms = _ratio(error.square().mean().sqrt(), scale.square().mean().sqrt())
    peak = _ratio(error[worst], scale.abs().max())
    where = f"worst at {worst} of {error.numel()}: {got64.flatten()[worst]:.9g}, not {want64.flatten()[worst]:.9g}"
    line = f"{name}: rms {rms:.3g} (bound {tolerance.rms:.3g}), peak {peak:.3g} (bound {tolerance.peak:.3g}); {where}"
    assert rms <= tolerance.rms and peak <= tolerance.peak, line


def _ratio(error: Tensor, size: Tensor) -> float:
    """error / size; 0 where both are 0."""
    return float(error / size) if float(error) != 0.0 else 0.0


def tuples(outputs: Any) -> tuple[Tensor, ...]:
    """An op's return value as a tuple: none, one or several tensors."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs or ())


def cloned(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with every tensor copied, strides kept."""
    return tuple(fenced(a)[0] if isinstance(a, Tensor) else a for a in args)


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in float64 (integers and booleans as they are), copied."""
    wide = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in wide)


def mutated(op: Op, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The arguments that the op writes, by name."""
    names = [a.name for a in getattr(torch.ops.fusegen, op.name).default._schema.arguments]
    return {name: args[names.index(name)] for name in op.mutates}


def truth(op: Op, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """What the reference gives in float64: ``output 0`` ... and the mutated arguments, by name."""
    wide = widened(args)
    outs = tuples(op.reference(*wide))
    return {f"output {i}": out for i, out in enumerate(outs)} | mutated(op, wide)


def assert_all_close(op: Op, label: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """:func:`assert_close` for every tensor by name, each by the op's tolerance for its own dtype."""
    for name, tensor in got.items():
        assert_close(f"{op.name} / {label} / {name}", tensor, want[name], op.tolerance[tensor.dtype])


def _odd(dtype: torch.dtype) -> int:
    """A value that no test's tensor of that integer dtype is likely to hold."""
    return max(-(2**15), torch.iinfo(dtype).min) or torch.iinfo(dtype).max


def fenced(
    tensor: Tensor, fill: Tensor | None = None, margin: int = 61, behind: int = 61
) -> tuple[Tensor, Callable[[str], None]]:
    """A copy of ``tensor`` with its strides, inside a larger buffer; and a check that nothing beside it was written.

    The memory around and between its elements is NaN (integers: far from theirs), so that a read of it shows in the
    result.  ``fill``: what the copy holds instead of the tensor's own values.  ``margin`` elements lie before it, an
    odd number: the copy is not aligned; and ``behind`` elements after its last.
    """
    if tensor.numel() == 0:
        return tensor.clone(), lambda name: None
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    nothing = float("nan") if tensor.is_floating_point() else True if tensor.dtype == torch.bool else _odd(tensor.dtype)
    buffer = torch.full((margin + span + behind,), nothing, dtype=tensor.dtype)
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride(), margin)[once] = True
    copy = buffer.as_strided(tensor.shape, tensor.stride(), margin)
    copy[once] = (tensor if fill is None else fill.expand(tensor.shape))[once]
    before = buffer[~inside].clone()

    def check(name: str) -> None:
        after = buffer[~inside].contiguous()
        assert torch.equal(after.view(torch.uint8), before.view(torch.uint8)), f"{name}: memory beside it was written"

    return copy, check


class Fenced:
    """Arguments and outputs of one run inside fences: :func:`fenced` copies, the outputs filled with NaN."""

    def __init__(self, op: Op, args: tuple[Any, ...], behind: int = 61):
        self.op, self.given = op, args
        self._fences = {i: fenced(a, behind=behind) for i, a in enumerate(args) if isinstance(a, Tensor)}
        self.args = tuple(self._fences[i][0] if i in self._fences else a for i, a in enumerate(args))
        nan = torch.tensor(float("nan"))
        self._outs = [fenced(out, fill=nan.to(out.dtype), behind=behind) for out in op.allocate(*args)]
        self.outs = tuple(copy for copy, _ in self._outs)

    def results(self) -> dict[str, Tensor]:
        """After the run: what it wrote, by name.  Arguments are unharmed, and nothing beside a buffer was written."""
        for i, (_, check) in enumerate(self._outs):
            check(f"{self.op.name} output {i}")
        written = mutated(self.op, self.args)
        for i, (copy, check) in self._fences.items():
            check(f"{self.op.name} argument {i}")
            if not any(copy is tensor for tensor in written.values()):
                assert same_bits(copy, self.given[i]), f"{self.op.name} changed its argument {i}"
        return {f"output {i}": out for i, out in enumerate(self.outs)} | written


def run_fenced(op: Op, kernel: Kernel, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """One run of a kernel inside fences: what it wrote, by name."""
    run = Fenced(op, args)
    kernel.bind(run.outs, run.args).run()
    return run.results()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether the two are equal bit by bit: dtype, shape and every element, NaNs too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    dense = (t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*dense)
