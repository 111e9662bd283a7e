"""``make gpu-check``: all that only a GPU can show, in one command and under eight minutes.

Kernels against their references, noise bits, batch invariance, CUDA graphs, tuning, the roofline, every op against its
peers, models end to end.  What checks runs in many processes at once, and so does what ``torch.compile`` compiles; what
is timed runs in one.  A fault on the GPU ends a process, and what it had not begun goes on in a fresh one.  Rows are
appended to a file of JSON lines as they come, so that a run that dies keeps what it has.

    python -m fusegen.bench.gpu_check [--out FILE] [--seconds 460] [--only STAGE ...]
    python -m fusegen.bench.gpu_check --rehearse        # tiny, on the CPU, under Triton's interpreter; no times
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fusegen.bench import report
from fusegen.bench import row as rows_file
from fusegen.bench.row import Row
from fusegen.kernels import catalogue

if TYPE_CHECKING:
    from fusegen.bench.gpu_stages import Setting

# What a stage weighs beside the others in the time they share; 1 where nothing is said.
WEIGHTS = {"tune:attention": 3.0, "race:attention": 2.0, "model:emoji": 6.0, "model:stylegan2": 6.0, "model:sd15": 9.0}
# The shares of the time at whose end the cases are compiled (1.3 s a kernel, some 1,800) and checked, and what finds
# them on disk is checked too.
CHECKING, CHECKED = 0.5, 0.57
LATER = ("noise", "batch", "graphs")
ENDED = "stage ended"
Timed = tuple[str, float]  # a stage, and when it should be through (time.time())


def stages() -> tuple[list[str], list[str]]:
    """(what only checks results: each in a process of its own, all together; what is timed: one after another).

    What is timed first is what a user meets: networks, then ops, as they are tuned now.  Tuning is last, and says how
    much faster what it found is."""
    ops = catalogue.triton_names()
    tuned = [op for op in ops if "TUNABLE = " in (catalogue.GPU / f"{op}.py").read_text()]
    timed = ["roofline", "model:sd15", "model:stylegan2", "model:emoji", *(f"race:{op}" for op in ops)]
    timed += [f"tune:{op}" for op in tuned]
    peers = [stage.replace("race:", "peers:") for stage in timed if stage.startswith("race:")]
    networks = [stage.replace("model:", "network:") for stage in timed if stage.startswith("model:")]
    return [*networks, *(f"correct:{op}" for op in ops), *peers, *LATER], timed


def deadlines(timed: Sequence[str], began: float, seconds: float) -> list[Timed]:
    """The timed stages, each with its share of what the checks leave."""
    weights = [WEIGHTS.get(stage, 1.0) for stage in timed]
    start, rest = began + CHECKED * seconds, (1 - CHECKED) * seconds
    ends = itertools.accumulate(weights)
    return [(stage, start + rest * end / sum(weights)) for stage, end in zip(timed, ends, strict=True)]


INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def stage_rows(stage: str, setting: Setting) -> Iterable[Row]:
    """The rows of one stage, made as they are asked for."""
    from fusegen.bench import gpu_correct, gpu_models, gpu_race

    name, _, of = stage.partition(":")
    table: dict[str, Callable[[], Iterable[Row]]] = {
        "correct": lambda: gpu_correct.correct(setting, of),
        "noise": lambda: gpu_correct.noise(setting),
        "batch": lambda: gpu_correct.batch(setting),
        "graphs": lambda: gpu_correct.graphs(setting),
        "peers": lambda: gpu_race.prepare(setting, of),
        "network": lambda: gpu_models.prepare(setting, of),
        "roofline": lambda: gpu_race.peaks(setting),
        "tune": lambda: gpu_race.tune(setting, of),
        "race": lambda: gpu_race.race(setting, of),
        "model": lambda: gpu_models.race(setting, of),
    }
    return table[name]()


def child(queue: Sequence[Timed], path: Path, rehearse: bool) -> None:
    """Run stages in this process, one after another; their rows go to ``path``, a line to standard output each."""
    import torch

    from fusegen.bench.gpu_stages import Setting, reason, row

    for stage, until in queue:
        setting = Setting("cpu" if rehearse else "cuda", until)
        try:
            with torch.no_grad():
                for one in stage_rows(stage, setting):
                    rows_file.append(path, one)
        except Exception as error:
            rows_file.append(path, row(setting, stage, "the stage itself", "fusegen", note=reason(error)))
        if not rehearse:
            torch.cuda.synchronize()  # after a fault this raises: what is left needs a fresh process
        print(f"\n{ENDED} {stage}", flush=True)


@dataclass
class Started:
    """A process that runs ``queue``."""

    queue: Sequence[Timed]
    process: subprocess.Popen[bytes]
    errors: IO[bytes]


def start(queue: Sequence[Timed], path: Path, rehearse: bool, cache: str) -> Started:
    # -P: in a checkout's folder, transformers would take its kernels/ for a package of its own.
    command = [sys.executable, "-P", "-W", "ignore", "-m", "fusegen.bench.gpu_check", "--out", str(path)]
    command += [f"--stage={stage}@{until}" for stage, until in queue] + (["--rehearse"] if rehearse else [])
    extra = {**INTERPRETED, "FUSEGEN_CACHE": cache} if rehearse else {}
    errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
    # A session of its own, so that what it started ends with it.
    process = subprocess.Popen(
        command, env=os.environ | extra, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
    )
    return Started(queue, process, errors)


def finish(started: Started, path: Path, ended: Callable[[str], None]) -> int:
    """Wait for a process; how many of its stages it began.  One in which it dies or hangs leaves a row that says so."""
    process, seen, count = started.process, b"", 0
    assert process.stdout is not None
    note = ""
    while count < len(started.queue):
        patience = max(5.0, started.queue[count][1] + 30.0 - time.time())
        if not select.select([process.stdout], [], [], patience)[0]:
            note = "stopped: it ran half a minute past its time"
            break
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            break
        seen += data
        while count < len(started.queue) and f"{ENDED} {started.queue[count][0]}\n".encode() in seen:
            ended(started.queue[count][0])
            count += 1
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    if count < len(started.queue):
        started.errors.seek(0)
        last = (started.errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        note = note or f"exit code {code}: {last}"[:300]
        rows_file.append(path, Row(started.queue[count][0], "the stage itself", "fusegen", "", "", False, note=note))
        ended(started.queue[count][0])
        count += 1
    return count


def run(chosen: Collection[str], path: Path, seconds: float, rehearse: bool) -> list[Row]:
    """Every stage, each with its share of the time; the rows of this run.  A rehearsal runs them one by one."""
    from rich.console import Console

    console, began, seen = Console(stderr=True), time.time(), len(rows_file.read(path)) if path.exists() else 0
    checks, timed = ([stage for stage in part if stage in chosen] for part in stages())
    queue = deadlines(timed, began, seconds)
    share = 1.0 if timed else 1 / CHECKED  # with nothing to time, the checks have it all
    waves = [(CHECKING, [s for s in checks if s not in LATER]), (CHECKED, [s for s in checks if s in LATER])]

    def ended(stage: str) -> None:
        console.print(f"{time.time() - began:5.0f} s  {stage}")

    with tempfile.TemporaryDirectory() as cache:
        if rehearse:
            queue = [(stage, began + seconds) for stage in [*checks, *timed] if stage in chosen]
        else:
            for part, wave in waves:
                until = began + part * share * seconds
                for one in [start([(stage, until)], path, rehearse, cache) for stage in wave]:
                    finish(one, path, ended)
        while queue:
            queue = queue[finish(start(queue, path, rehearse, cache), path, ended) :]
    return rows_file.read(path)[seen:] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 where any row is not ok, but for peers that cannot run."""
    every = [*stages()[0], *stages()[1]]
    parser = argparse.ArgumentParser(prog="python -m fusegen.bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file of rows; a dated one under bench/results/ by default")
    parser.add_argument("--seconds", type=float, default=460.0, help="the time for all stages together")
    parser.add_argument("--only", action="append", choices=every, help="only this stage (may be repeated)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes under Triton's interpreter, no times")
    parser.add_argument("--stage", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        queue = [(name, float(until)) for name, _, until in (stage.rpartition("@") for stage in args.stage)]
        child(queue, args.out, args.rehearse)
        return 0
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check: PyTorch finds no CUDA device here; --rehearse runs the stages on the CPU", file=sys.stderr)
        return 2
    dated = Path(__file__).parent / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    with tempfile.TemporaryDirectory() as spare:
        path = args.out or (Path(spare) / "rehearsal.jsonl" if args.rehearse else dated)
        rows = run(args.only or every, path, args.seconds, args.rehearse)
    report.show(rows, "gpu-check" + (", rehearsed on the CPU" if args.rehearse else ""))
    # A wrong result is one whoever gave it; that a peer cannot run is its own.
    bad = [r for r in rows if not r.ok and (r.contender in ("fusegen", "all") or r.error_rms is not None)]
    print(f"{len(rows)} rows in {path}; {len(bad)} not ok")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
