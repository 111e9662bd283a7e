"""One measured result, and the file of JSON lines it lives in."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """What ran, where, how fast, and whether its output was right.

    Times are seconds.  ``ratio`` is the median over rounds of (the baseline's time / this contender's time), the two
    measured next to each other; the baseline has 1.0.  ``gbps`` and ``gflops`` use the op's least bytes and operations
    (10**9 a second).  ``roofline_share`` is the time the measured ceilings allow over the median.  ``error_rms`` and
    ``error_peak`` are relative to the reference.  A row that is not ``ok`` carries no times; ``note`` says why.
    """

    what: str
    case: str
    contender: str
    dtype: str
    device: str
    ok: bool
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    ratio: float | None = None
    gbps: float | None = None
    gflops: float | None = None
    roofline_share: float | None = None
    error_rms: float | None = None
    error_peak: float | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    threads: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def append(path: Path, row: Row) -> None:
    """Add one line to ``path``, on disk before this returns: a run that dies keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(asdict(row)) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read(path: Path) -> list[Row]:
    """The rows of a file; an unknown key is an error."""
    known = {f.name for f in fields(Row)}
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        data = json.loads(line)
        if unknown := set(data) - known:
            raise ValueError(f"{path}:{number}: unknown keys {sorted(unknown)}")
        data["shapes"] = tuple(tuple(s) for s in data.get("shapes", ()))
        rows.append(Row(**data))
    return rows


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of whatever takes part in a measurement."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version()}
    for name in ("torch", "triton", "fusegen", "onnxruntime-gpu", "openvino", "diffusers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
