"""Choosing a kernel's configuration: a table of measured ones, and a rule where nothing was measured.

Nothing is measured while serving.  :func:`tune` runs only when asked for (``make gpu-check`` asks), and its winners lie
in a file per op, GPU, Triton version and kernel source.  A file may be shipped in ``kernels/gpu/tuned/``; one in the
user's cache directory goes before it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fusegen.kernels.gpu.launch import Stage, TritonLaunch

_IMPORT = re.compile(r"^from fusegen\.kernels\.gpu(?:\.(\w+))? import (.*)$", re.M)
SHIPPED = Path(__file__).parent / "tuned"
SHARED_BYTES = 227 * 1024  # the most shared memory a block can have on sm_90 and sm_100


@dataclass(frozen=True)
class Tunable:
    """An op's configurations.

    ``config``: its frozen dataclass.  ``key(*args)``: what the best choice depends on, never the batch, so that results
    do not depend on it either.  ``default(*args, limit)``: the rule, for ``limit`` bytes of shared memory a block.
    ``space(*args)``: candidates, already pruned.  ``stages(outs, args, config)``: the launches.  ``source``: the file
    whose change, or that of what it imports of this folder, makes measurements stale.  ``small(*args)``: for tests,
    tiles that lead small cases down the paths of large ones.
    """

    op: str
    config: type
    key: Callable[..., str]
    default: Callable[..., Any]
    space: Callable[..., Iterable[Any]]
    stages: Callable[[tuple[Tensor, ...], tuple[Any, ...], Any], tuple[Stage, ...]]
    source: Path
    small: Callable[..., Iterable[Any]] = lambda *args: ()

    def bind(self, outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
        """The launch with the configuration :func:`choose` finds."""
        return TritonLaunch(args, self.stages(outs, args, choose(self, args)))


@dataclass(frozen=True)
class Trial:
    """One configuration tried: its median seconds, or why it was out."""

    config: Any
    seconds: float
    reason: str = ""


def directory() -> Path:
    """Where measurements are kept: ``FUSEGEN_CACHE``, else the platform's cache directory."""
    if chosen := os.environ.get("FUSEGEN_CACHE"):
        return Path(chosen) / "tuned"
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fusegen" / "tuned"


@functools.cache
def sources(path: Path) -> tuple[Path, ...]:
    """``path`` and the files beside it that it imports, and these import, but for this one."""
    found, work = {path}, [path]
    while work:
        for module, names in _IMPORT.findall(work.pop().read_text()):
            stems = [module] if module else [name.split()[0] for name in names.split(",")]
            new = {path.parent / f"{stem}.py" for stem in stems} - found - {Path(__file__)}
            found |= {p for p in new if p.exists()}
            work += sorted(p for p in new if p.exists())
    return tuple(sorted(found))


def filename(tunable: Tunable, gpu: str) -> str:
    """The file's name: op, GPU, Triton version, and the hash of the kernel's sources."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources(tunable.source))).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")
    return f"{tunable.op}.{name}.triton-{triton.__version__}.{digest}.json"


def driver() -> str:
    """The NVIDIA driver's version as its management library gives it, or an empty string where there is none."""
    import ctypes

    try:
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        return ""
    version = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, len(version)):
        return ""
    return version.value.decode()


@functools.cache
def _device(index: int) -> tuple[str, str]:
    return torch.cuda.get_device_name(index), driver()


@functools.cache
def shared_limit(index: int) -> int:
    """The most shared memory (bytes) a block can have on that GPU."""
    properties = torch.cuda.get_device_properties(index)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def table(tunable: Tunable, gpu: str, driver_version: str) -> dict[str, Any]:
    """Measured configurations by key.  The user's file counts only for the same driver; a shipped one for any."""
    found: dict[str, Any] = {}
    for folder, any_driver in ((SHIPPED, True), (directory(), False)):
        data = _read(folder / filename(tunable, gpu))
        if data and (any_driver or data["driver"] == driver_version):
            found |= {key: tunable.config(**entry["config"]) for key, entry in data["found"].items()}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}


def choose(tunable: Tunable, args: tuple[Any, ...], device: torch.device | None = None) -> Any:
    """The measured configuration for these arguments, else the rule's; measures nothing.

    ``device``: where they will be, if it is not where they are.
    """
    device = device or next(a.device for a in args if isinstance(a, Tensor))
    if device.type != "cuda":
        return tunable.default(*args)
    found = table(tunable, *_device(device.index)).get(tunable.key(*args))
    return tunable.default(*args, limit=shared_limit(device.index)) if found is None else found


def keep(tunable: Tunable, key: str, trial: Trial, gpu: str, driver_version: str) -> Path:
    """Add a winner to the user's file: written beside it, then renamed, so that a reader never meets half a file."""
    path = directory() / filename(tunable, gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _read(path)
    if data.get("driver") != driver_version:
        data = {"driver": driver_version, "gpu": gpu, "found": {}}
    data["found"][key] = {"config": asdict(trial.config), "seconds": trial.seconds}
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w") as f:
        json.dump(data, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    table.cache_clear()
    return path


def tune(
    tunable: Tunable,
    outs: tuple[Tensor, ...],
    args: tuple[Any, ...],
    right: Callable[[tuple[Tensor, ...]], bool],
    time: Callable[[Callable[[], None]], float],
) -> list[Trial]:
    """Try the whole space on these arguments, fastest first in the answer; keep the winner.

    ``right(outs)`` says whether the outputs are inside the op's error bound: a configuration that is not is out,
    however fast.  ``time(run)`` gives the median seconds of a call.  The one in use now is always among those tried.
    """
    candidates = dict.fromkeys([choose(tunable, args), *tunable.space(*args)])
    trials = sorted((_try(tunable, outs, args, c, right, time) for c in candidates), key=lambda t: t.seconds)
    if math.isfinite(trials[0].seconds):
        device = next(a.device for a in args if isinstance(a, Tensor))
        where = _device(device.index) if device.type == "cuda" else (device.type, "")
        keep(tunable, tunable.key(*args), trials[0], *where)
    return trials


def _try(tunable: Tunable, outs: Any, args: Any, config: Any, right: Any, time: Any) -> Trial:
    for out in outs:
        out.fill_(math.nan)  # what a configuration leaves unwritten must show
    try:
        launch = TritonLaunch(args, tunable.stages(outs, args, config))
        launch.run()
        if not right(outs):
            return Trial(config, math.inf, "over the error bound")
        return Trial(config, time(launch.run))
    except Exception as error:  # one that does not fit the chip (shared memory, registers) is out, not the end
        return Trial(config, math.inf, f"{type(error).__name__}: {error}".splitlines()[0][:200])
