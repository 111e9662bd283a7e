"""The closures a captured plan is made of: one for each node, with as little Python between two kernels as can be."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fusegen.kernels.op import Launch
from fusegen.runtime.backends.binding import Call
from fusegen.runtime.specialize import Strided

Run = Callable[[], None]
Registers = list[Any]
Moving = Sequence[tuple[int, int]]  # argument, register


class At:
    """A register, standing inside an argument."""

    def __init__(self, slot: int):
        self.slot = slot


def getter(args: tuple[Any, ...], constant: Callable[[Any], int]) -> Callable[[Registers], Sequence[Any]]:
    """Registers -> arguments, for ``args`` with :class:`At` in them; ``constant`` puts a value in a register."""
    if any(isinstance(a, tuple) and _nested(a) for a in args):
        return lambda registers: [_read(a, registers) for a in args]
    slots = [a.slot if isinstance(a, At) else constant(a) for a in args]
    if not slots:
        return lambda registers: ()
    if len(slots) == 1:
        only = slots[0]
        return lambda registers: (registers[only],)
    return operator.itemgetter(*slots)


def _nested(value: Any) -> bool:
    return isinstance(value, At) or (isinstance(value, tuple) and any(_nested(v) for v in value))


def _read(value: Any, registers: Registers) -> Any:
    if isinstance(value, At):
        return registers[value.slot]
    if isinstance(value, tuple):
        return [_read(v, registers) for v in value]
    return value


def loop(runs: Sequence[Run]) -> Run:
    """All of them in order."""

    def run() -> None:
        for one in runs:
            one()

    return run


def writing(function: Any, get: Any, kwargs: Mapping[str, Any], registers: Registers, dead: Sequence[int]) -> Run:
    """A function that writes into a planned buffer, given in ``kwargs``; ``dead`` registers are emptied after it."""

    def run() -> None:
        function(*get(registers), **kwargs)
        for slot in dead:
            registers[slot] = None

    return run


def returning(
    function: Any, get: Any, kwargs: Mapping[str, Any], registers: Registers, slots: Sequence[int], dead: Sequence[int]
) -> Run:
    """A function that returns its output, or a list of several."""

    def many() -> None:
        for slot, value in zip(slots, function(*get(registers), **kwargs) or (), strict=False):
            registers[slot] = value
        for slot in dead:
            registers[slot] = None

    if len(slots) != 1:
        return many
    (first,) = slots

    def one() -> None:
        registers[first] = function(*get(registers), **kwargs)
        for slot in dead:
            registers[slot] = None

    return one


def launching(launch: Launch, moving: Moving, registers: Registers, dead: Sequence[int]) -> Run:
    """A kernel bound to planned outputs; the arguments that may have moved are pointed at again."""
    if not moving and not dead:
        return launch.run

    def run() -> None:
        for argument, slot in moving:
            launch.move(argument, registers[slot])
        launch.run()
        for slot in dead:
            registers[slot] = None

    return run


def copying(launch: Launch, moving: Moving, registers: Registers, slots: Sequence[int], outs: Sequence[Tensor]) -> Run:
    """A kernel whose outputs outlive the run: they are copied out of the memory it is bound to."""

    def run() -> None:
        for argument, slot in moving:
            launch.move(argument, registers[slot])
        launch.run()
        for slot, out in zip(slots, outs, strict=True):
            registers[slot] = out.clone()

    return run


def by_sample(call: Call, cut: Sequence[str], spec: Strided, device: str) -> Call:
    """The same call made once a sample, its ``cut`` arguments sliced along dimension 0."""
    positions = [i for i, name in enumerate(call.names) if name in cut]
    function = call.function

    def run(*args: Any, **kwargs: Any) -> Tensor:
        out = spec.empty(device)
        for sample in range(out.shape[0]):
            sliced = list(args)
            for at in positions:
                sliced[at] = args[at][sample : sample + 1]
            out[sample : sample + 1].copy_(function(*sliced, **kwargs))
        return out

    return Call(run, call.args, call.names, call.kwargs)
