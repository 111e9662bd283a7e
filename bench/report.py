"""Rows as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusegen.bench.row import Row


def _number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
    return "" if value is None else f"{value * scale:.{digits}g}"


def table(rows: Sequence[Row], title: str) -> Table:
    """One line a row: time, ratio to the baseline, rates, share of the roofline, error, memory."""
    memory = any("peak_mib" in r.extra for r in rows)  # a column where a row has it
    out = Table(title=title)
    for name in ("what", "case", "dtype", "contender"):
        out.add_column(name)
    for name in ("ms", "× baseline", "GB/s", "GFLOP/s", "roofline", "rel. RMS error", *["peak MiB"] * memory):
        out.add_column(name, justify="right")
    last = None
    for row in rows:
        key = (row.what, row.case, row.dtype)
        out.add_row(
            *(key if key != last else ("", "", "")),
            row.contender,
            _number(row.median_s, 1e3) if row.ok else f"[red]{row.note}[/red]",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            _number(row.gbps),
            _number(row.gflops),
            "" if row.roofline_share is None else f"{row.roofline_share:.0%}",
            _number(row.error_rms, digits=2),
            *[_number(row.extra.get("peak_mib"), digits=4)] * memory,
        )
        last = key
    return out


def show(rows: Sequence[Row], title: str) -> None:
    """Print the table to standard output; wide when it is not a terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(rows, title))


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """A PNG of horizontal bars: each contender's ratio to the baseline, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r.ratio is not None]
    keys = list(dict.fromkeys((r.what, r.case, r.dtype) for r in timed))
    names = list(dict.fromkeys(r.contender for r in timed))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * max(1, len(keys)) * max(1, len(names))))
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        found = {(r.what, r.case, r.dtype): r.ratio for r in timed if r.contender == name}
        places = [k + i * height for k in range(len(keys))]
        axes.barh(places, [found.get(k) or 0.0 for k in keys], height, label=name)
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(keys))], [f"{w} {c} {d}" for w, c, d in keys], fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the baseline (median of interleaved rounds)")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
