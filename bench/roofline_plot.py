"""A profile drawn against the ceilings of the machine: every call, its operations a byte and operations a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

from fusegen.bench.roofline import Roofline
from fusegen.runtime.measure import Share

NAMED = 9  # kernels with a colour of their own; the rest, which take least, share a grey


def draw(measured: Mapping[str, Sequence[Share]], ceilings: Roofline, file: IO[bytes]) -> None:
    """Write a PNG to ``file``: axes for each of ``measured`` (title -> shares), a dot for each call, its area the time.

    Both axes are logarithmic.  The slope is the rate of copying memory, the flats those of products.  A call can lie
    above them: what it reads may be in a cache, and an algorithm may do fewer operations than the direct one's, which
    are counted.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = max(1, len(measured))
    figure, all_axes = plt.subplots(count, 1, figsize=(10, 6 * count), squeeze=False)
    for (title, shares), axes in zip(measured.items(), all_axes[:, 0], strict=False):
        _one(axes, title, shares, ceilings)
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _one(axes: Any, title: str, shares: Sequence[Share], ceilings: Roofline) -> None:
    dots = [(s, [c for c in s.calls if c.flops and c.bytes and c.seconds]) for s in shares]
    dots = [(s, calls) for s, calls in dots if calls]
    for index, (share, calls) in enumerate(dots):
        named = index < NAMED
        axes.scatter(
            [c.flops / c.bytes for c in calls],
            [c.flops / c.seconds / 1e9 for c in calls],
            s=[8 + 2000 * c.seconds / sum(x.seconds for x in shares) for c in calls],
            color=f"C{index}" if named else "lightgrey",
            alpha=0.6,
            label=f"{share.part:.1%}  {share.name}" if named else None,
        )
    _ceilings(axes, [c.flops / c.bytes for _, calls in dots for c in calls], ceilings)
    drawn = sum(s.part for s, _ in dots)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="GFLOP/s (GOP/s of integers)")
    axes.set_title(f"{title}: calls with {drawn:.0%} of the time; area is time")
    axes.legend(fontsize=8, loc="lower right")


def _ceilings(axes: Any, intensities: Sequence[float], ceilings: Roofline) -> None:
    """The slope of memory and the flats of products, over the range of the dots and a little beyond."""
    low, high = min(intensities, default=1.0) / 2, max(intensities, default=100.0) * 2
    for name, peak in ceilings.peak.items():
        corner = max(low, peak / ceilings.copy)
        axes.plot([corner, max(high, corner)], [peak / 1e9] * 2, color="black", linewidth=0.8)
        axes.annotate(f"{name} products", (max(high, corner), peak / 1e9), ha="right", va="bottom", fontsize=8)
    top = max(max(ceilings.peak.values()) / ceilings.copy, low)
    axes.plot([low, top], [low * ceilings.copy / 1e9, top * ceilings.copy / 1e9], color="black", linewidth=0.8)
    label = f"memory copied, {ceilings.copy / 1e9:.0f} GB/s"
    axes.annotate(label, (low, low * ceilings.copy / 1e9), va="bottom", fontsize=8, xytext=(4, 6),
                  textcoords="offset points")  # fmt: skip
