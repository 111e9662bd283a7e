"""The process that compiles kernels side by side for :mod:`.warm`; it never uses a GPU.

    python -m fusegen.kernels.gpu.warm_worker

A line on standard input is a batch of orders, a JSON list; each is answered by a line of standard output when it is
done, ``{"order": its place, "error": ""}``.  PyTorch, Triton and the kernels are imported once; every order is then a
fork of this process, which has no threads and no CUDA, so that forking it is safe where forking its user's would not
be.  A compiler that crashes ends its own fork alone.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch  # noqa: F401  (before Triton, as wherever kernels are launched)
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

IDLE = 120.0  # seconds without an order after which the process ends
Order = Mapping[
    str, Any
]  # "module" and "name" of a kernel, "arch" of the GPU, "record": Triton's of its specialisation


class Offline:
    """Triton's driver for a GPU of architecture ``arch`` (90: sm_90) that need not be there: one to compile for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # not a number: what is compiled must never be launched

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def _function(order: Order) -> JITFunction[Any]:
    found: JITFunction[Any] = getattr(importlib.import_module(order["module"]), order["name"])
    return found


def _answer(out: int, place: int, error: str) -> None:
    line = json.dumps({"order": place, "error": error[:300]}) + "\n"
    os.write(out, line.encode())  # shorter than a pipe's buffer: lines of several processes do not mix


def _compile(out: int, place: int, order: Order) -> None:
    """What a fork does, and no more."""
    error = ""
    try:
        _function(order).preload(order["record"])
    except BaseException as failure:  # whatever it is, the order gets its answer
        error = f"{order['name']}: {type(failure).__name__}: {failure}".splitlines()[0]
    status = 1  # nobody reads answers any more: this process's parent finds the same, and ends
    try:
        _answer(out, place, error)
        status = 0
    finally:
        os._exit(status)


def _reap(out: int, running: dict[int, int], orders: Sequence[Order]) -> None:
    pid, status = os.wait()
    place = running.pop(pid)
    if status:
        code = os.waitstatus_to_exitcode(status)
        _answer(out, place, f"{orders[place]['name']}: the process that compiled it ended with {code}")


def serve(out: int, orders: Sequence[Order], most: int) -> None:
    """Compile a batch, ``most`` at a time."""
    running: dict[int, int] = {}
    for place, order in enumerate(orders):
        driver.set_active(Offline(order["arch"]))  # type: ignore[arg-type]
        _function(order).cache_key  # noqa: B018  (worked out here once, and not in every fork)
        make_backend(driver.active.get_current_target()).hash()
        triton_key()
        if len(running) == most:
            _reap(out, running, orders)
        if pid := os.fork():
            running[pid] = place
        else:
            _compile(out, place, order)
    while running:
        _reap(out, running, orders)


def main() -> None:
    """Serve batches until there is no more input, or none for a while."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a compiler prints is no answer
    while select.select([sys.stdin], [], [], IDLE)[0]:
        if not (line := sys.stdin.readline()):
            break
        batch = json.loads(line)
        serve(out, batch["orders"], batch["most"])


if __name__ == "__main__":
    main()
