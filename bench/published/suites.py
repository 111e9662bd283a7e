"""The benchmarks of the published networks: one evaluation, every contender in turn, each in a process of its own."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fusegen.bench import roofline, verify, whole
from fusegen.bench.published import files, picture
from fusegen.bench.published.networks import NETWORKS
from fusegen.bench.published.peers import PEERS
from fusegen.bench.published.worker import Worker
from fusegen.bench.row import Row
from fusegen.kernels.op import Tolerance

Run = Callable[[Sequence[str], Sequence[str], Sequence[str], float], Iterator[list[Row]]]
KEEP = "FUSEGEN_BENCH_FILES"  # a folder to keep the networks' files in, gigabytes each
FULL, HALF, QUANTIZED = "float32 peers", "bfloat16 peers", "int8 peers"
WHO: Mapping[str, tuple[tuple[str, str], ...]] = {
    FULL: (
        ("eager", "float32"), ("compile", "float32"), ("onnxruntime", "float32"), ("openvino", "float32"),
        ("fusegen", "float32"), ("fusegen", "bfloat16"),
    ),
    HALF: (
        ("eager", "bfloat16"), ("compile", "bfloat16"), ("aotinductor", "bfloat16"), ("openvino", "bfloat16"),
        ("fusegen", "bfloat16"),
    ),
    QUANTIZED: (("fusegen", "bfloat16"), ("openvino", "bfloat16"), ("fusegen", "int8")),
}  # fmt: skip
# Against eager float32, relative to its output: three times what eager itself, or fusegen, was measured at (int8 on
# Stable Diffusion 1.5's U-Net).
BOUNDS = {"float32": Tolerance(5e-5, 5e-4), "bfloat16": Tolerance(3e-2, 6e-2), "int8": Tolerance(0.12, 0.12)}
PEER_MARGIN = 2.0  # others may be off by twice that, which their rows say: OpenVINO by 0.032 on XL at 1024 x 1024


def bound(name: str, dtype: str) -> Tolerance:
    """The error that a contender may have."""
    own, margin = BOUNDS[dtype], 1.0 if name == "fusegen" else PEER_MARGIN
    return Tolerance(margin * own.rms, margin * own.peak)


@dataclass(frozen=True)
class Job:
    """What a case is: ``want`` is the output everybody is held to, ``flops`` PyTorch's count of its operations."""

    what: str
    case: str
    pairs: Sequence[tuple[str, str]]
    folder: Path
    want: Tensor
    flops: float
    min_rounds: int


def evaluation(
    network: str, who: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], seconds: float
) -> Iterator[list[Row]]:
    """``network``'s rows of each case; the contenders of a case load at once and are timed in turn."""
    with _folder() as root:
        for case in cases:
            if pairs := _pairs(case, who, dtypes):
                folder = _made(network, root, pairs)
                _, want, facts = files.expected(folder)
                yield _rows(Job(network, case, pairs, folder, want, facts["flops"], 5), seconds)


def pictures(
    what: str, who: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], seconds: float
) -> Iterator[list[Row]]:
    """The same for what several evaluations make: the output everybody is held to is the one of eager float32."""
    with _folder() as root:
        folder, want = root / what, None
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            if pairs := _pairs(case, who, dtypes):
                networks = picture.EVALUATIONS[what].items()
                made = {name: _made(name, root, [*pairs, ("eager", "float32")]) for name, _ in networks}
                want = _reference(what, folder) if want is None else want
                flops = sum(count * files.expected(made[name])[2]["flops"] for name, count in networks)
                yield _rows(Job(what, case, pairs, folder, want, flops, 2), seconds)


@contextmanager
def _folder() -> Iterator[Path]:
    with ExitStack() as stack:
        yield Path(os.environ.get(KEEP) or stack.enter_context(tempfile.TemporaryDirectory()))


def _pairs(case: str, who: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str]]:
    return [(w, d) for w, d in WHO[case] if w in who and d in (dtypes or BOUNDS)]


def _made(network: str, root: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    """The folder of a network's files, those that ``pairs`` load among them."""
    (folder := root / network).mkdir(parents=True, exist_ok=True)
    files.make(network, folder, [PEERS[w].kind for w, _ in pairs])
    return folder


def _reference(what: str, folder: Path) -> Tensor:
    """Eager float32's picture, made once for a folder that is kept."""
    path = folder / files.EXPECTED
    if not path.exists():
        worker = Worker("eager", what, folder, "float32")
        worker.close()
        save_file({"output": worker.output}, path)
    return load_file(path)["output"]


def _rows(job: Job, seconds: float) -> list[Row]:
    rows, calls, workers = dict[str, Row](), {}, {}
    try:
        for name, dtype in job.pairs:
            key = f"{name} {dtype}"
            try:
                workers[key] = worker = Worker(name, job.what, job.folder, dtype)
            except RuntimeError as error:  # one that cannot load or run is a result, not the end of the others
                rows[key] = Row(job.what, job.case, name, dtype, "cpu", False, note=str(error)[:300])
                continue
            verdict = verify.check([worker.output], [job.want], bound(name, dtype))
            rows[key] = whole.gated(job.what, job.case, name, dtype, verdict)
            if verdict.ok:
                calls[key] = worker
        timed = whole.timed(rows, calls, seconds, lambda t: {}, job.min_rounds)
    finally:
        for worker in workers.values():
            worker.close()
    facts = {key: worker.facts for key, worker in workers.items()}
    return [_with(row, facts.get(key, {}), job.flops) for key, row in zip(rows, timed, strict=True)]


def _with(row: Row, facts: Mapping[str, float], flops: float) -> Row:
    """``row`` with its rate, its share of the fastest product measured now, and its process's facts."""
    row = replace(row, extra={**row.extra, **{k: round(v, 3) for k, v in facts.items()}})
    if row.median_s is None:
        return row
    peak = roofline.measure().peak[row.dtype]
    return replace(row, gflops=flops / row.median_s / 1e9, roofline_share=flops / row.median_s / peak)


def suite(run: Run, cases: Sequence[str] = (FULL, HALF)) -> whole.Suite:
    """A benchmark of these cases and contenders."""
    always = tuple(name for name, peer in PEERS.items() if not peer.asked)
    return whole.Suite(tuple(cases), run, always, tuple(name for name in PEERS if name not in always))


# int8 is raced where its bound was measured.
SUITES = {
    name: suite(functools.partial(evaluation, name), tuple(WHO) if name == picture.UNET else (FULL, HALF))
    for name in NETWORKS
}
SUITES |= {name: suite(functools.partial(pictures, name)) for name in picture.EVALUATIONS}
