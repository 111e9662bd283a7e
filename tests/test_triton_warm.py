"""Kernels compiled side by side, without a GPU: a launch then finds each in Triton's cache."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton import knobs
from triton.runtime.driver import driver

from fusegen.kernels import catalogue
from fusegen.kernels import op as registry
from fusegen.kernels.gpu import compile as compiler
from fusegen.kernels.gpu import tune, warm
from fusegen.kernels.gpu.warm_worker import Offline
from fusegen.models.load import locate
from fusegen.runtime.backends import cuda
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.engine import Session
from fusegen.runtime.program import TensorSpec
from fusegen.runtime.rewrite import rewrite

OPS = ("layer_norm", "linear", "rope")  # sizes of 1, multiples of 16 and others; pointers, floats and constants


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and for launches a GPU of sm_90 that nothing can run on."""
    registry.ops()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(driver, "_active", Offline(90))
    monkeypatch.setattr(Offline, "get_current_device", lambda self: str(tmp_path))  # nothing is loaded there yet
    monkeypatch.setattr(warm, "_LOST", [])
    yield tmp_path / "triton"
    warm._end()


def pairs(*ops: str) -> list[tuple[Any, list[Any]]]:
    """The launches of an op's first specimen, their tensors in memory."""
    found = []
    for name in ops:
        specimen = next(iter(compiler.specimens([name])))
        real = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype) if isinstance(a, Tensor) else a
                for a in specimen.args()]  # fmt: skip
        found += [(stage, real) for stage in specimen.stages(compiler.ARCHITECTURES[90])]
    return found


def compiled(cache: Path) -> list[Path]:
    return sorted(p for p in cache.rglob("*") if p.is_file())


def launch(stage: Any, args: Any) -> None:
    """A launch as ``launch.py`` prepares it, but for loading the kernel."""
    stage.fn.warmup(*stage.positional(args), grid=stage.grid, **stage.options)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_a_launch_finds_what_was_compiled_beside_others(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "pays", lambda *given: True)
    jobs: list[warm.Job] = []
    for name in OPS:
        module = importlib.import_module(f"fusegen.kernels.gpu.{name}")
        args = next(iter(compiler.specimens([name]))).args()
        jobs.append((name, args, module.TUNABLE.default(*args)))
    told = warm.warm(jobs + jobs)
    assert told == [""] * len(pairs(*OPS))  # each once
    files, hits = compiled(offline), []
    assert len([f for f in files if f.suffix == ".cubin"]) == len(told)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.compilation, "listener", lambda **given: hits.append(given["cache_hit"]))
        for stage, args in pairs(*OPS):
            launch(stage, args)
    assert hits == [True] * len(told)
    assert compiled(offline) == files
    (worker,) = warm._WORKERS
    assert warm.warm(jobs) == []  # a second session asks for nothing
    assert warm._WORKERS.count(worker) == 1


def test_a_second_process_starts_no_worker(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on disk is found there, without anything in memory."""
    for stage, args in pairs("rope"):
        launch(stage, args)
    monkeypatch.setattr(Offline, "get_current_device", lambda self: "nothing loaded")
    assert warm.missing(pairs("rope")) == []
    assert compiled(offline)
    monkeypatch.setattr(warm, "Worker", lambda: pytest.fail("started"))
    monkeypatch.setattr(warm, "pays", lambda count, *rest: count > 0)
    args = next(iter(compiler.specimens(["rope"]))).args()
    assert warm.warm([("rope", args, importlib.import_module("fusegen.kernels.gpu.rope").TUNABLE.default(*args))]) == []


def test_a_pointer_that_is_not_aligned_wants_another_kernel() -> None:
    ((stage, args), *_) = pairs("rope")
    odd = lambda a: torch.empty(a.numel() + 1, dtype=a.dtype)[1:].as_strided(a.shape, a.stride())  # noqa: E731
    lame = [odd(a) if isinstance(a, Tensor) else a for a in args]
    assert len(warm.missing([(stage, args), (stage, lame), (stage, args)])) == 2


def test_one_that_does_not_compile_or_crashes_is_said_and_the_rest_compile(offline: Path) -> None:
    """In a process of their own, as one of its forks ends as a crash does."""
    good, other = warm.missing(pairs("rope", "layer_norm"))[:2]
    orders = [vars(good) | {"record": "{}"}, vars(good) | {"module": "crash"}, vars(other)]
    script = """
import json, os, sys
from fusegen.kernels.gpu import warm_worker
orders, compile = json.loads(sys.argv[1]), warm_worker._compile
function = warm_worker._function
warm_worker._function = lambda order: function(orders[2] if order["module"] == "crash" else order)
warm_worker._compile = lambda out, at, order: os.abort() if order["module"] == "crash" else compile(out, at, order)
warm_worker.serve(1, orders, 2)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, json.dumps(orders)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | _path()).stdout
    answers = {a["order"]: a["error"] for a in map(json.loads, out.splitlines())}
    assert answers[0].startswith(f"{good.name}: KeyError")
    assert answers[1] == f"{good.name}: the process that compiled it ended with -6"
    assert answers[2] == ""
    assert [f.stem for f in compiled(offline) if f.suffix == ".cubin"] == [other.name]


def test_a_worker_ends_when_nobody_reads_its_answers(offline: Path) -> None:
    (wanted, *_) = warm.missing(pairs("rope"))
    worker = warm.Worker()
    assert worker.process.stdin is not None and worker.process.stdout is not None
    worker.process.stdout.close()
    warm._write(worker.process.stdin, json.dumps({"most": 1, "orders": [vars(wanted) | {"record": "{}"}] * 3}) + "\n")
    assert worker.process.wait(timeout=120) == 1  # with its input still open
    worker.end()


def _path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


def test_a_worker_that_ends_is_said_once_and_launches_compile(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "pays", lambda count, *rest: count > 0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    args = next(iter(compiler.specimens(["rope"]))).args()
    config = importlib.import_module("fusegen.kernels.gpu.rope").TUNABLE.default(*args)
    monkeypatch.setattr(cuda, "jobs", lambda plan: [("rope", args, config)])
    plan = planned("synthesis")
    with pytest.warns(RuntimeWarning, match=r"1 of 1 GPU kernels were not compiled .* exit code 1"):
        cuda.BACKEND.prepare(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        cuda.BACKEND.prepare(plan)
    assert len(warm.missing(pairs("rope"))) == 1


@pytest.mark.parametrize(
    ("count", "cores", "started", "expected"),
    [
        (28, 16, False, True),
        (4, 16, False, False),
        (5, 16, False, True),
        (2, 16, True, True),
        (1, 16, True, False),
        (0, 16, True, False),
        (100, 1, False, False),
        (8, 2, False, False),
        (9, 2, False, True),
    ],
)
def test_it_is_left_alone_where_it_does_not_pay(count: int, cores: int, started: bool, expected: bool) -> None:
    assert warm.pays(count, cores, started) == expected


def planned(name: str) -> Any:
    """A plan of the box's GAN for a GPU."""
    program = Bundle.open(locate("emoji-gan")).program(name)
    shapes = {k: tuple(d if isinstance(d, int) else 2 for d in v.shape) for k, v in program.inputs.items()}
    specs = {k: TensorSpec(shapes[k], v.dtype) for k, v in program.inputs.items()}
    kernels = {op: registry.get(op).kernels for op in catalogue.triton_names()}
    before = {op: list(held) for op, held in kernels.items()}
    try:
        for op, held in kernels.items():
            held[:] = importlib.import_module(f"fusegen.kernels.gpu.{op}").KERNELS
        return Session(rewrite(program, torch.bfloat16), cuda.BACKEND).planned(specs)
    finally:
        for op, held in kernels.items():
            held[:] = before[op]


def test_a_plans_launches_are_known_before_it_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those that its nodes bind when they run: the same kernels for tensors in memory."""
    plan = planned("synthesis")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "_device", lambda index: ("none", ""))
    monkeypatch.setattr(tune, "shared_limit", lambda index: tune.SHARED_BYTES)
    jobs = list(cuda.jobs(plan))
    kernels = [s for s in plan.steps if s.binding.how == "kernel"]
    assert 0 < len(jobs) <= len(kernels)
    assert {name for name, *_ in jobs} == {s.node.op.split(".")[1] for s in kernels}
    found = warm.missing(pair for job in jobs for pair in warm.stages(job))
    bound = []
    monkeypatch.setattr(warm, "_meta", lambda a: a.new_empty(0, device="cpu").set_(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype)) if isinstance(a, Tensor) else a)  # fmt: skip
    for step in kernels:
        values = cuda.metas_of(plan.program)
        args = tuple(cuda.substitute(v, values) for v in step.node.args.values())
        name = step.node.op.split(".")[1]
        module = importlib.import_module(f"fusegen.kernels.gpu.{name}")
        bound += warm.stages((name, args, module.TUNABLE.default(*args) if hasattr(module, "TUNABLE") else None))
    assert set(warm.missing(bound)) == set(found)
