"""``make gpu-check``: all that only a GPU can show, in one command and under eight minutes.

Kernels against their references, noise bits, batch invariance, CUDA graphs, tuning, the roofline, every op against its
peers, models end to end.  Each stage is a process of its own, as a fault on the GPU ends every process that shares it;
rows are appended to a file of JSON lines as they come, so that a run that dies keeps what it has.

    python -m fusegen.bench.gpu_check [--out FILE] [--seconds 460] [--only STAGE ...]
    python -m fusegen.bench.gpu_check --rehearse        # tiny, on the CPU, under Triton's interpreter; no times
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusegen.bench import report
from fusegen.bench import row as rows_file
from fusegen.bench.row import Row
from fusegen.kernels import catalogue

if TYPE_CHECKING:
    from fusegen.bench.gpu_stages import Setting

# What a stage weighs beside the others in the time they share; 1 where nothing is said.
WEIGHTS = {"tune:attention": 3.0, "tune:group_norm": 2.0, "race:attention": 2.0, "model:emoji": 2.0, "model:sd15": 3.0}
TOGETHER = 16  # processes at once where results are only checked


def groups() -> list[tuple[float, tuple[str, ...]]]:
    """Groups of stages that run one after another, each with the share of the time that it may have used up by its end.

    What only checks results runs together; what is timed runs alone.
    """
    ops = catalogue.triton_names()
    checks = [*(f"correct:{op}" for op in ops), "noise", "batch", "graphs"]
    tuned = [op for op in ops if "TUNABLE = " in (catalogue.GPU / f"{op}.py").read_text()]
    alone = ["roofline", *(f"tune:{op}" for op in tuned), *(f"race:{op}" for op in ops), "model:emoji", "model:sd15"]
    found = [tuple(checks[i : i + TOGETHER]) for i in range(0, len(checks), TOGETHER)] + [(stage,) for stage in alone]
    weights = [0.6 * len(group) if len(group) > 1 else WEIGHTS.get(group[0], 1.0) for group in found]
    ends = itertools.accumulate(weights)
    return [(end / sum(weights), group) for end, group in zip(ends, found, strict=True)]


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
        "roofline": lambda: gpu_race.peaks(setting),
        "tune": lambda: gpu_race.tune(setting, of),
        "race": lambda: gpu_race.race(setting, of),
        "model": lambda: gpu_models.race(setting, of),
    }
    return table[name]()


def child(stage: str, path: Path, until: float, rehearse: bool) -> int:
    """Run one stage in this process; its rows go to ``path``."""
    import torch

    from fusegen.bench.gpu_stages import Setting, reason, row

    setting = Setting("cpu" if rehearse else "cuda", until)
    try:
        with torch.no_grad():
            for one in stage_rows(stage, setting):
                rows_file.append(path, one)
    except Exception as error:
        rows_file.append(path, row(setting, stage, "the stage itself", "fusegen", note=reason(error)))
        return 1
    return 0


def start(stage: str, path: Path, until: float, rehearse: bool, cache: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "fusegen.bench.gpu_check", "--stage", stage, "--out", str(path)]
    command += ["--until", str(until)] + (["--rehearse"] if rehearse else [])
    extra = {**INTERPRETED, "FUSEGEN_CACHE": cache} if rehearse else {}
    # A session of its own, so that what it started ends with it.
    return subprocess.Popen(command, env=os.environ | extra, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(stage: str, process: subprocess.Popen[str], until: float, path: Path) -> None:
    """Wait for a stage; one that dies or hangs leaves a row that says so."""
    try:
        _, errors = process.communicate(timeout=max(5.0, until + 30.0 - time.time()))
        note = f"exit code {process.returncode}: {(errors.strip().splitlines() or [''])[-1]}"[:300]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        note = "stopped: it ran half a minute past its time"
    if process.returncode:
        rows_file.append(path, Row(stage, "the stage itself", "fusegen", "", "", False, note=note))


def run(stages: Sequence[str], path: Path, seconds: float, rehearse: bool) -> list[Row]:
    """Every stage, each with its share of the time; the rows of this run.  A rehearsal runs them one by one."""
    from rich.console import Console

    console, began, seen = Console(stderr=True), time.time(), len(rows_file.read(path)) if path.exists() else 0
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        for share, group in groups():
            until = began + share * seconds
            chosen = [stage for stage in group if stage in stages]
            for together in [[stage] for stage in chosen] if rehearse else [chosen]:
                running = {stage: start(stage, path, until, rehearse, cache) for stage in together}
                for stage, process in running.items():
                    finish(stage, process, until, path)
                found = rows_file.read(path)[seen + len(rows) :] if path.exists() else []
                rows += found
                if together:
                    bad = sum(not r.ok for r in found)
                    console.print(
                        f"{time.time() - began:5.0f} s  {', '.join(together)}: {len(found)} rows, {bad} not ok"
                    )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 where any row is not ok."""
    stages = [stage for _, group in groups() for stage in group]
    parser = argparse.ArgumentParser(prog="python -m fusegen.bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file of rows; a dated one under bench/results/ by default")
    parser.add_argument("--seconds", type=float, default=460.0, help="the time for all stages together")
    parser.add_argument("--only", action="append", choices=stages, help="only this stage (may be repeated)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes under Triton's interpreter, no times")
    parser.add_argument("--stage", choices=stages, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        return child(args.stage, args.out, args.until, args.rehearse)
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check: PyTorch finds no CUDA device here; --rehearse runs the stages on the CPU", file=sys.stderr)
        return 2
    dated = Path(__file__).parent / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    with tempfile.TemporaryDirectory() as spare:
        path = args.out or (Path(spare) / "rehearsal.jsonl" if args.rehearse else dated)
        rows = run(args.only or stages, path, args.seconds, args.rehearse)
    report.show(rows, "gpu-check" + (", rehearsed on the CPU" if args.rehearse else ""))
    bad = [r for r in rows if not r.ok]
    print(f"{len(rows)} rows in {path}; {len(bad)} not ok")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
