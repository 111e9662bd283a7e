"""``fusegen bench kernels | models``: run, print the table, keep the rows and the plot."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from fusegen.bench import contenders, report
from fusegen.bench import row as rows_file
from fusegen.bench.row import Row
from fusegen.runtime.errors import RequestError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The command line; ``fusegen bench --help`` shows it."""
    p = argparse.ArgumentParser(prog="fusegen bench", description=__doc__)
    sub = p.add_subparsers(dest="what", required=True)
    kernels = sub.add_parser("kernels", help="every fused op against its eager form and torch.compile")
    kernels.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
    kernels.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    models = sub.add_parser("models", help="whole models against eager PyTorch and torch.compile")
    models.add_argument("--model", action="append", default=[], help="only this model (may be repeated)")
    for one in (kernels, models):
        one.add_argument("--case", action="append", default=[], help="only this case (may be repeated)")
        one.add_argument("--dtype", action="append", default=[], choices=sorted(DTYPES), help="only this dtype")
        one.add_argument("--contender", action="append", default=[], help="only this contender (may be repeated)")
        one.add_argument("--seconds", type=float, default=0.5, help="about how long each contender is timed, per case")
        one.add_argument("--json", type=Path, help="append the rows to this file of JSON lines")
        one.add_argument("--plot", type=Path, help="write a PNG of the ratios")
        one.add_argument("-v", "--verbose", action="store_true", help="on an error, show the traceback")
    return p


def chosen(wanted: Sequence[str], known: Iterable[str], kind: str) -> list[str]:
    """``wanted``, or all of ``known`` when nothing is; an unknown name lists those there are."""
    known = list(known)
    for name in wanted:
        if name not in known:
            raise RequestError(f"no {kind} is called {name!r}", mend=f"there are {', '.join(known)}")
    return list(wanted) or known


def _kernels(args: argparse.Namespace) -> list[Row]:
    from fusegen.bench import kernels
    from fusegen.kernels import op as registry

    names = chosen(args.op, sorted(registry.ops()), "op")
    who = chosen(args.contender, contenders.KERNELS, "contender")
    todo = list(kernels.jobs(names, args.case, [DTYPES[d] for d in args.dtype]))
    if not todo:
        raise RequestError("no benchmark case fits", mend="see the cases marked bench in kernels/<op>.py")
    out: list[Row] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("kernels", total=len(todo))
        for job in todo:
            progress.update(task, description=f"{job.op.name} {job.case.name}")
            out += _kept(kernels.run(kernels.Job(job.op, job.case, job.dtype, args.device), who, args.seconds), args)
            progress.advance(task)
    return out


def _models(args: argparse.Namespace) -> list[Row]:
    from fusegen.bench import models

    out: list[Row] = []
    with Progress(transient=True) as progress:
        todo = chosen(args.model, models.MODELS, "model")
        suites = [models.MODELS[name] for name in todo]
        named = chosen(args.contender, dict.fromkeys(w for s in suites for w in (*s.who, *s.more)), "contender")
        cases = chosen(args.case, [case for name in todo for case in models.MODELS[name].cases], "case")
        task = progress.add_task("models", total=len(todo))
        for name in todo:
            progress.update(task, description=name)
            suite = models.MODELS[name]
            offered = (*suite.who, *suite.more) if args.contender else suite.who
            own, who = [c for c in cases if c in suite.cases], [w for w in named if w in offered]
            for rows in suite.run(who, args.dtype, own, args.seconds) if own and who else ():
                out += _kept(rows, args)
            progress.advance(task)
    return out


def _kept(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    if args.json:
        for row in rows:
            rows_file.append(args.json, row)
    return rows


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks that :func:`parser` understood; 1 when any row failed its gate, else 0."""
    rows = _kernels(args) if args.what == "kernels" else _models(args)
    title = f"{args.what} on {rows_file.processor()}, {torch.get_num_threads()} threads"
    report.show(rows, title)
    if args.plot:
        report.plot(rows, args.plot, title)
    return 0 if all(r.ok for r in rows) else 1
