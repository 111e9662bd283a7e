"""The page docs/kernels.md, made from the registry and the committed measurements.

python -m fusegen.bench.kernels_page > docs/kernels.md
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fusegen.bench.row import Row, read
from fusegen.kernels import catalogue
from fusegen.kernels import op as registry
from fusegen.kernels.cpu import build
from fusegen.kernels.op import Op

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_HEAD = """# The kernel library

Made by `python -m fusegen.bench.kernels_page` from the registry of ops and the rows in `bench/results/`; a test
compares the two. Each op is one file, `kernels/<op>.py`: its meaning, its reference, its cases and its tolerance.
Its fast versions stand under the same name in `kernels/cpu/` (C++) and `kernels/gpu/` (Triton).
"""
_STANDING = """
## Where each stands

"Roofline" is the share of the ceilings measured in the same run: memory copied, far beyond the caches (what fits
them can be faster than that), and a matrix product. "Against eager" is how many times as fast as PyTorch's own form
of the op. Both are medians over the benchmark's cases, with the lowest and the highest; a dash: no committed row.
"cpu" is an AMD Zen 5 with AVX512-BF16, "cpu, AMX" an Intel Emerald Rapids with tiles, "cpu, AVX2" an AMD Zen 3, two
cores each; on a GPU calls are replayed in CUDA graphs, over more copies of their arguments than its L2 holds.
"""
_PROOF = """
## How it is shown to be right

- Every case, dtype and level against the reference in float64, by the op's own tolerance; outputs start as NaN,
  sentinels stand around every buffer, and what may not be read is NaN (`tests/test_ops.py`).
- The same with sizes, strides, alignment and options drawn at random, sizes 0 and 1 among them; the bits are the same
  for one, two and five threads, and for a sample alone and in its batch (`tests/test_ops_fuzz.py`). No kernel is
  excused from it{without}.
- `make sanitize`: AddressSanitizer and UndefinedBehaviorSanitizer. `make races`: ThreadSanitizer, on a pool of
  `std::thread` in the place of OpenMP's, and a planted race that it must report.
- `make test-arm`: the library cross-compiled for AArch64 and run by an emulator on the same cases. How fast NEON
  code is has been measured nowhere.
- Triton kernels run in Triton's interpreter on small cases, and are compiled for sm_80, sm_90 and sm_100 without
  spilling; `make gpu-check` compares them with the references on a GPU.
"""


def page() -> str:
    """The page as Markdown."""
    ops = dict(sorted(registry.ops().items()))
    rows = _rows()
    lines = [_HEAD, "## The ops\n", "| op | what it computes | source |", "| --- | --- | --- |"]
    lines += [f"| [`{n}`](../kernels/{n}.py) | {_cell(op.formula)} | {_cell(op.source)} |" for n, op in ops.items()]
    lines += ["\n## What there is of each\n", "| op | dtypes | levels in C++ | Triton |"]
    lines += ["| --- | --- | --- | --- |", *(_versions(op) for op in ops.values())]
    lines += [_STANDING, "| op | device | dtype | roofline | against eager | cases |"]
    lines += ["| --- | --- | --- | --- | --- | --- |", *(line for name in ops for line in _standing(name, rows))]
    whole = [f"`{name}`" for name, op in ops.items() if op.alone is None]
    without = f"; {', '.join(whole)} have no batch to be taken out of" if whole else ""
    return "\n".join(lines) + "\n" + _PROOF.format(without=without)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _versions(op: Op) -> str:
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in op.tolerance)
    source = build.source_of(op.name)
    levels = ", ".join(build.levels_of(source)) if source else "none: the reference serves"
    triton = "yes" if op.name in catalogue.triton_names() else "no: the reference serves"
    return f"| `{op.name}` | {dtypes} | {levels} | {triton} |"


def _rows() -> list[Row]:
    """The committed rows of kernels: fusegen's own that passed their error bound.  Those of a CPU with AMX or with AVX2
    alone, whose files are called so, have a device of their own: there other kernels ran."""
    rows = list[Row]()
    for path in sorted([*RESULTS.glob("*kernels*.jsonl"), *RESULTS.glob("gpu-*.jsonl")]):
        own = (row for row in read(path) if row.ok and row.contender == "fusegen" and row.median_s is not None)
        kind = next((f", {name}" for name in ("AMX", "AVX2") if path.stem.endswith(f"-{name.lower()}")), "")
        rows += (replace(row, device=row.device + kind) for row in own)
    return rows


def _standing(name: str, rows: list[Row]) -> Iterator[str]:
    """A line for each device and dtype that was measured, else one with dashes."""
    own = [r for r in rows if r.what == name]
    if not own:
        yield f"| `{name}` | - | - | - | - | - |"
    for device, dtype in sorted({(r.device, r.dtype) for r in own}):
        some = [r for r in own if (r.device, r.dtype) == (device, dtype)]
        share = _span([100 * r.roofline_share for r in some if r.roofline_share is not None], "{:.0f} %")
        ratio = _span([r.ratio for r in some if r.ratio is not None], "{:.2f}")
        yield f"| `{name}` | {device} | {dtype} | {share} | {ratio} | {len(some)} |"


def _span(values: list[float], form: str) -> str:
    """Median (lowest to highest)."""
    if not values:
        return "-"
    shown = [form.format(v) for v in (statistics.median(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    print(page(), end="")
