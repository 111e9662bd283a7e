"""Reading machine code (to sm_90): uniform registers that it may read before anything has written them.

CUDA 12.8's assembler, which Triton 3.6 carries, was seen to compute the address of a matrix product on one side of a
branch only: right results at most sizes, wrong ones or a fault at the others.  No test of values finds that for sure;
a walk over the code does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL, _LINE = (
    re.compile(r"^(\.L_x_\d+):"),
    re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;"),
)
_UNIFORM, _PREDICATE = re.compile(r"(?<![A-Za-z0-9_.])UR(\d+)"), re.compile(r"^!?U?P(\d|T)")
# Instructions whose first register is read, not written.
_READERS = ("ST", "RED.", "REDG", "BRA", "BAR", "SYNCS", "UTMA", "LDGSTS", "CCTL", "HGMMA", "IGMMA", "QGMMA", "UBLKCP")


@dataclass(frozen=True)
class Instruction:
    """``writes`` and ``reads``: numbers of uniform registers; ``target``: the label that it may jump to."""

    text: str
    writes: frozenset[int]
    reads: frozenset[int]
    target: str
    falls: bool  # whether the next instruction may follow


def _instruction(guard: str | None, op: str, rest: str) -> Instruction:
    writes, reads = set[int](), set[int]()
    parts = [p.strip() for p in rest.split(",")]
    first = next((i for i, p in enumerate(parts) if not _PREDICATE.match(p)), 0)
    for i, part in enumerate(parts):
        for number in map(int, _UNIFORM.findall(part)):
            if i == first and "[" not in part and not op.startswith(_READERS):
                writes |= {number, number + 1} if "64" in op or "WIDE" in op else {number}
            elif "gdesc" in part:  # four registers: the left operand's address, if it has one, and the right one's
                reads |= set(range(number if i == first + 1 else number + 2, number + 4))
            else:
                reads.add(number)
    jump = re.search(r"`\((\.L_x_\d+)\)", rest) if op.startswith("BRA") else None
    always = guard is None and not any(_PREDICATE.match(p) for p in parts) and ".DIV" not in op
    ends = always and op.startswith(("BRA", "EXIT", "RET"))
    return Instruction(f"{op} {rest}", frozenset(writes), frozenset(reads), jump[1] if jump else "", not ends)


def _parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    code, labels = list[Instruction](), dict[str, int]()
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _LINE.match(line):
            code.append(_instruction(found[1], found[2], found[3]))
    return code, labels


def unset(text: str) -> Iterator[str]:
    """The instructions in nvdisasm's ``text`` that some path from the start reaches with a uniform register unset.

    A write under a predicate counts as one, so that what is reported has no write at all on some path.
    """
    code, labels = _parsed(text)
    known: list[frozenset[int] | None] = [None] * len(code)
    if code:
        known[0] = frozenset()
    work = [0] if code else []
    while work:
        at = work.pop()
        here = known[at]
        assert here is not None
        after = here | code[at].writes
        ahead = ([at + 1] if code[at].falls else []) + ([labels[code[at].target]] if code[at].target else [])
        for step in ahead:
            before = known[step] if step < len(code) else after
            met = after if before is None else before & after
            if step < len(code) and met != before:
                known[step] = met
                work.append(step)
    for one, before in zip(code, known, strict=True):
        if before is not None and one.reads - before:
            yield one.text
