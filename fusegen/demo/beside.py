"""What the parts of the demo do alike: say what a plan binds, and time an output beside eager PyTorch's."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusegen.bench.timing import Timing
    from fusegen.bench.verify import Verdict
    from fusegen.kernels.op import Tolerance
    from fusegen.runtime.plan import Plan

FOLDER = Path("build/demo")


@dataclass(frozen=True)
class Beside:
    """A comparison: ``amount`` of ``what`` a call, whether the outputs agreed, and the times where they did."""

    model: str
    dtype: str
    amount: int
    what: str
    verdict: Verdict
    bound: Tolerance
    timed: Mapping[str, Timing]

    @property
    def agrees(self) -> bool:
        """Whether fusegen's output was eager PyTorch's."""
        return self.verdict.ok


def file(name: str) -> Path:
    """A file of the demo, its folder made."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    return (FOLDER / name).resolve()


def say(title: str) -> None:
    """Begin a part."""
    print(f"== {title}", flush=True)


def show_plan(plan: Plan, of: str) -> None:
    """Print the head of a plan."""
    say(f"plan of {of}")
    for line in str(plan).split("\n\n")[0].splitlines():
        print(textwrap.fill(line, 118, initial_indent="   ", subsequent_indent="     "))


def compare(
    model: str, dtype: Any, amount: int, what: str, calls: Mapping[str, Callable[[], Any]], verdict: Verdict,
    bound: Tolerance, seconds: float,
) -> Beside:  # fmt: skip
    """Time the ``calls`` "eager" and "fusegen" in turn, about ``seconds`` each, once the ``verdict`` is good."""
    from fusegen.bench import timing

    timed = timing.interleave(calls, "eager", seconds=seconds, min_rounds=3, sample=0.0) if verdict.ok else {}
    made = Beside(model, str(dtype).removeprefix("torch."), amount, what, verdict, bound, timed)
    print(f"   outputs differ by {verdict.rms:.1e} of their root mean square (bound {bound.rms:g})")
    for name, t in timed.items():
        print(f"   {name:<8} {_rate(made, name)} (p20 {t.p20:.3f}, median {t.median:.3f}, p80 {t.p80:.3f} s a call)")
    return made


def _rate(one: Beside, name: str) -> str:
    return f"{one.amount / one.timed[name].median:.1f} {one.what} a second"


def table(found: Sequence[Beside]) -> Iterator[str]:
    """The comparisons as lines."""
    rows = [("model", "computes in", "a call makes", "eager PyTorch", "fusegen", "times its speed", "rms error, bound")]
    for one in found:
        error = f"{one.verdict.rms:.1e}, {one.bound.rms:g}"
        if one.agrees:
            speed = (_rate(one, "eager"), _rate(one, "fusegen"), f"{one.timed['fusegen'].ratio:.2f}")
        else:
            speed = ("", "its outputs are wrong", "no speed")
        made = f"{one.amount} {one.what if one.amount > 1 else one.what.removesuffix('s')}"
        rows.append((one.model, one.dtype, made, *speed, error))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "   " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
