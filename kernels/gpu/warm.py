"""Compile kernels side by side, into Triton's cache on disk, before the launches that want them.

Triton compiles a kernel when it is first launched, a second or more each, one after another.  What is not in its cache
yet is given to a process of its own (:mod:`.warm_worker`), which compiles on every core.  It is no child of
``multiprocessing``: spawned, that would run a user's script again, and forked, share the parent's CUDA.

Which kernel a launch wants is not worked out here: the launch goes Triton's own way as far as its compiler, where
Triton's hook takes the record of the specialisation, and the worker compiles by that record.  (A key that we make up
misses by a trifle: Triton's names the sizes that are no multiples of 16, too.)  Tensors may be meta: they count as
aligned to 16 bytes, as nearly all are; a kernel for one that is not is compiled at its launch.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fusegen.kernels.gpu.launch import Stage

MOST = 32  # kernels that are compiled at a time, whatever cores there are: each takes some 200 MB
STARTING = 4.0  # seconds that the worker takes to start; a kernel takes about one
PATIENCE = 120.0  # seconds without an answer after which the worker is taken to hang
Job = tuple[str, Sequence[Any], Any]  # op, arguments, configuration (None: the op has no choice)


@dataclass(frozen=True)
class Wanted:
    """A compiled kernel: ``record`` is what Triton's ``JITFunction.preload`` takes.  See :mod:`.warm_worker`."""

    module: str
    name: str
    arch: int
    record: str


class Gone(RuntimeError):
    """The worker ended, or hangs."""


class Worker:
    """The process."""

    def __init__(self) -> None:
        # The same modules as here; -P: nothing of the current directory that is not on the path here.
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        extra = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-W", "ignore", "-m", "fusegen.kernels.gpu.warm_worker"]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        # A session of its own: Ctrl-C is this process's to answer.
        self.process = subprocess.Popen(command, env=os.environ | extra, start_new_session=True, **pipes)

    def alive(self) -> bool:
        return self.process.poll() is None

    def compile(self, wanted: Sequence[Wanted], most: int) -> list[str]:
        """For each an empty string, or why it did not compile, ``most`` at a time; raises :class:`Gone`."""
        errors = [""] * len(wanted)
        try:
            batch = {"most": most, "orders": [vars(w) for w in wanted]}
            _write(self.process.stdin, json.dumps(batch) + "\n")
            for answer in self._answers(len(wanted)):
                errors[answer["order"]] = answer["error"]
        except BaseException:
            self.end()
            raise
        return errors

    def _answers(self, count: int) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        rest, source = b"", self.process.stdout.fileno()
        while count:
            if not select.select([source], [], [], PATIENCE)[0]:
                raise Gone(f"it did not answer for {PATIENCE:.0f} seconds")
            data = os.read(source, 1 << 16)
            if not data:
                self.errors.seek(0)
                last = (self.errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
                raise Gone(f"exit code {self.process.wait()} {last}".strip())
            *lines, rest = (rest + data).split(b"\n")
            count -= len(lines)
            yield from map(json.loads, lines)

    def end(self) -> None:
        """End the process and what it forked."""
        if self.alive():  # else its number may be another's by now
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _write(pipe: IO[bytes] | None, text: str) -> None:
    assert pipe is not None
    try:
        pipe.write(text.encode())
        pipe.flush()
    except BrokenPipeError:
        pass  # reading its answers finds that it ended, and why


_LOCK = threading.RLock()
_WORKERS: list[Worker] = []  # one at most
_LOST: list[str] = []  # why there will be none in this process


def _meta(value: Any) -> Any:
    """A tensor's shape, strides and dtype: those that a launch is made for may not be there yet."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def stages(job: Job) -> Sequence[tuple[Stage, Sequence[Any]]]:
    """The launches of a job, each with the arguments it picks its own from."""
    name, given, config = job
    module, spec = (importlib.import_module(f"fusegen.kernels.{folder}{name}") for folder in ("gpu.", ""))
    args = tuple(_meta(a) for a in given)
    made = module.stages(spec.OP.allocate(*args), args, *([] if config is None else [config]))
    return [(stage, args) for stage in made if all(stage.grid)]


def missing(launches: Iterable[tuple[Stage, Sequence[Any]]]) -> list[Wanted]:
    """The compiled kernels that launches on the current device want and that are neither loaded nor on disk."""
    found: dict[Wanted, bool] = {}
    target = driver.active.get_current_target()
    for stage, args in launches:
        for given in _stopped(stage, stage.positional(args)):
            fn, record = given["fn"].jit_function, given["compile"]["specialization_data"]
            wanted = Wanted(fn.module, fn.__name__, int(target.arch), record)
            if wanted not in found:
                found[wanted] = _on_disk(given)
    return [wanted for wanted, there in found.items() if not there]


def _stopped(stage: Stage, values: Sequence[Any]) -> list[dict[str, Any]]:
    """What Triton's hook is told by a launch that would compile, which it then does not; nothing where it would not."""
    told: list[dict[str, Any]] = []
    here, before = threading.get_ident(), knobs.runtime.jit_cache_hook

    def hook(**given: Any) -> bool | None:
        if threading.get_ident() != here:  # another thread's launch, which goes on
            return None if before is None else before(**given)
        told.append(given)
        return True

    if isinstance(stage.fn, JITFunction):
        knobs.runtime.jit_cache_hook = hook  # type: ignore[assignment]
        try:
            stage.fn.warmup(*values, grid=stage.grid, **stage.options)
        finally:
            knobs.runtime.jit_cache_hook = before
    return told


def _on_disk(given: dict[str, Any]) -> bool:
    """Whether ``triton.compile`` would find the kernel in its cache."""
    fn, told = given["fn"].jit_function, given["compile"]
    backend = fn.device_caches[told["device"]][3]
    listed = json.loads(told["specialization_data"])["options"]
    options = backend.parse_options({k: tuple(v) if isinstance(v, list) else v for k, v in listed.items()})
    source = ASTSource(fn, told["signature"], told["constants"], told["configs"][0])
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    name = f"{source.name[:150]}.json"
    return name in (get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name) or {})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def pays(count: int, cores: int, started: bool) -> bool:
    """Whether the worker compiles ``count`` kernels sooner than their launches would, one after another."""
    return count * (1 - 1 / cores) > (1.0 if started else STARTING)


def _launches(jobs: Iterable[Job], errors: list[str]) -> Iterator[tuple[Stage, Sequence[Any]]]:
    for job in jobs:
        try:
            yield from stages(job)
        except Exception as error:  # a configuration that cannot be, say
            errors.append(f"{job[0]}: {type(error).__name__}: {error}".splitlines()[0])


def warm(jobs: Iterable[Job], most: int = MOST) -> list[str]:
    """Compile what the launches of ``jobs`` on the current device want and is not on disk, where that pays, ``most`` of
    them at a time.

    For each kernel an empty string, or why it was not compiled: its launch will then compile it, and meet the error.
    """
    errors: list[str] = []
    with _LOCK:
        found = [] if knobs.compilation.always_compile else missing(_launches(jobs, errors))
        _WORKERS[:] = [w for w in _WORKERS if w.alive()]
        most = min(most, _cores())
        if _LOST or not hasattr(os, "fork") or not pays(len(found), most, bool(_WORKERS)):
            return errors
        try:
            if not _WORKERS:
                _WORKERS.append(Worker())
            return errors + _WORKERS[0].compile(found, most)
        except (OSError, ValueError, Gone) as error:
            _LOST.append(f"the process that compiles them ended: {error}")
            _WORKERS.clear()
            return errors + _LOST * len(found)


def _end() -> None:
    while _WORKERS:
        _WORKERS.pop().end()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WORKERS.clear)  # a worker answers to whoever started it
