"""Rewrites: a Program in, a Program that means the same out, with what was done in ``Program.applied``.

The order matters.  No-ops go first, so that spellings are seen as they were written; spellings are matched in the
dtypes of the export; then the dtype changes; then repeats and constants go, in the dtypes they will have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fusegen.runtime.errors import RequestError
from fusegen.runtime.program import Applied, Program
from fusegen.runtime.rewrite import cast as casting
from fusegen.runtime.rewrite import clean, linear, match, patterns
from fusegen.runtime.rewrite.graph import FLOATS, without_dead

# What each rule may do to a result; a spelling's is its op's tolerance.
BOUNDS = {
    "canonical views and casts": "exact",
    "no-ops": "exact",
    "product with a weight is linear": "reassociates sums",
    "rows viewed around linear": "reassociates sums",
    "reshape of reshape": "exact",
    "repeated calls": "exact",
    "constants": "exact, as computed on the CPU",
    "compute dtype": "rounds to the dtype at each operator",
    "dead code": "exact",
    "linears of one input": "reassociates sums",
}
_FUSED = "rounds once where the graph rounded after each operator"


def bound(rule: str) -> str:
    """What the rule named in an :class:`~fusegen.runtime.program.Applied` may do to a result."""
    op, _, spelling = rule.partition(": ")
    known = spelling and f"fusegen.{op}.default" in patterns.spellings()
    return BOUNDS.get(rule, f"within the tolerance of {op}" if known else _FUSED)


def rewrite(program: Program, dtype: torch.dtype | None = None) -> Program:
    """``program`` with fused ops in the place of their spellings, computing in ``dtype`` (None: as exported).

    Inputs and outputs keep their names, shapes and dtypes.  Weights are shared with ``program`` where they keep their
    dtype.  Rewriting what this returns changes nothing.  Raises RequestError for a dtype that is not float32, bfloat16
    or float16, and GraphError where a node cannot stand in a program.
    """
    if dtype is not None and dtype not in FLOATS:
        raise RequestError(f"{dtype} is not a dtype to compute in", mend="use float32, bfloat16 or float16")
    log = _Log()
    program = log.run("canonical views and casts", clean.canonical, program)
    hidden = casting.float_casts(program) if dtype is not None else {}
    program = _spelled(program, log, hidden)
    if dtype is not None:
        program = log.run("compute dtype", lambda p: casting.cast(p, dtype), program)
    before = None
    while before is not program:  # each step may make work for another; every one leaves fewer nodes, or fewer forms
        before = program
        for rule, step in _TIDY.items():
            program = log.run(rule, step, program)
        if before is not program:
            program = _spelled(program, log, {})
    news = tuple(a for a in log.merged() if a not in program.applied or a.count)
    return replace(program, applied=(*program.applied, *news))


_TIDY: dict[str, Callable[[Program], tuple[Program, int]]] = {
    "product with a weight is linear": linear.as_linear,
    "rows viewed around linear": linear.without_row_views,
    "reshape of reshape": clean.merged_reshapes,
    "repeated calls": clean.without_repeats,
    "constants": clean.folded,
    "dead code": without_dead,
}


def _spelled(program: Program, log: _Log, hidden: Mapping[str, str]) -> Program:
    """Drop no-ops, the casts in ``hidden`` excepted, and put fused ops in the place of their spellings.

    A spelling may be made of fused ops, so what one round puts in is looked at again in the next.
    """
    program = log.run("no-ops", lambda p: clean.without_no_ops(p, frozenset(hidden)), program)
    program = log.run("dead code", without_dead, program)
    while True:
        casts = casting.float_casts(program) if hidden else {}
        program, applied = match.replace_spellings(program, patterns.load(), casts)
        log.applied += applied
        if not any(a.count for a in applied):
            return program
        program = log.run("dead code", without_dead, program)


class _Log:
    """What each rule did, in order of first use."""

    def __init__(self) -> None:
        self.applied: tuple[Applied, ...] = ()

    def run(self, rule: str, step: Callable[[Program], tuple[Program, int]], program: Program) -> Program:
        """One step, noted where it did something."""
        program, count = step(program)
        if count:
            self.applied += (Applied(rule, count),)
        return program

    def merged(self) -> tuple[Applied, ...]:
        """One entry a rule."""
        out: dict[str, Applied] = {}
        for a in self.applied:
            old = out.get(a.rule, Applied(a.rule, 0))
            out[a.rule] = Applied(a.rule, old.count + a.count, tuple(dict.fromkeys((*old.left, *a.left))))
        return tuple(out.values())
