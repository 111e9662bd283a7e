"""A contender in a process of its own: runtimes do not share threads or memory, and the memory of each can be told.

The process reads ``run`` from its standard input and answers each with a line when it is done.  Before the first one it
says how long loading and the first call took, and afterwards how much memory was resident at the most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusegen.bench import whole


class Worker:
    """A running contender; ``facts``: ``load_s``, ``first_s``, ``peak_mib``; ``output``: of its first call."""

    def __init__(self, name: str, what: str, folder: Path, dtype: str):
        self.path = folder / f"output-{name}-{dtype}.safetensors"
        self.path.unlink(missing_ok=True)
        self.log = open(folder / f"log-{name}-{dtype}.txt", "w+")  # noqa: SIM115
        command = [sys.executable, "-m", "fusegen.bench.published.worker", name, what, str(folder), dtype]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.process = subprocess.Popen([*command, str(torch.get_num_threads()), str(self.path)], **pipes)
        self.facts: dict[str, float] = self._answer()
        self.output: Tensor = load_file(self.path)["output"]

    def __call__(self) -> None:
        """One call."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        self.facts |= self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.path.stem} ended: {self.log.read().strip().splitlines()[-1:]}")
        answer: dict[str, float] = json.loads(line)
        return answer


def main(name: str, what: str, folder: str, dtype: str, threads: str, output: str) -> None:
    """Load, call once, keep the output; then call as often as told to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    torch.set_num_threads(int(threads))
    from fusegen.bench.published import picture

    start = time.perf_counter()
    call = picture.opened(name, what, Path(folder), dtype)
    loaded = time.perf_counter()
    out = call()
    facts = {"load_s": loaded - start, "first_s": time.perf_counter() - loaded}
    save_file({"output": out.float().contiguous()}, output)
    while True:
        print(json.dumps(facts | {"peak_mib": whole.peak_mib()}), file=answers, flush=True)
        if sys.stdin.readline() != "run\n":
            return
        call()


if __name__ == "__main__":
    main(*sys.argv[1:])
