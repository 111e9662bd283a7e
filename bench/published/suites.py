"""The benchmarks of the published networks: one evaluation, every contender in turn, each in a process of its own."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from fusegen.bench import roofline, verify, whole
from fusegen.bench.published import files
from fusegen.bench.published.networks import NETWORKS
from fusegen.bench.published.peers import PEERS
from fusegen.bench.published.worker import Worker
from fusegen.bench.row import Row
from fusegen.kernels.op import Tolerance

KEEP = "FUSEGEN_BENCH_FILES"  # a folder to keep the networks' files in, gigabytes each
FULL, HALF = "float32 peers", "bfloat16 peers"
WHO: Mapping[str, tuple[tuple[str, str], ...]] = {
    FULL: (
        ("eager", "float32"), ("onnxruntime", "float32"), ("openvino", "float32"), ("fusegen", "float32"),
        ("fusegen", "bfloat16"),
    ),
    HALF: (("eager", "bfloat16"), ("compile", "bfloat16"), ("openvino", "bfloat16"), ("fusegen", "bfloat16")),
}  # fmt: skip
# Against eager float32, relative to its output: three times what eager itself, or fusegen, was measured at.
BOUNDS = {"float32": Tolerance(5e-5, 5e-4), "bfloat16": Tolerance(3e-2, 6e-2)}


def evaluation(
    network: str, who: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], seconds: float
) -> Iterator[list[Row]]:
    """``network``'s rows of each case; the contenders of a case load at once and are timed in turn."""
    with ExitStack() as stack:
        kept = os.environ.get(KEEP)
        folder = Path(kept or stack.enter_context(tempfile.TemporaryDirectory())) / network
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            pairs = [(w, d) for w, d in WHO[case] if w in (who or PEERS) and d in (dtypes or BOUNDS)]
            if pairs:
                files.make(network, folder, [PEERS[w].kind for w, _ in pairs])
                yield _rows(network, case, pairs, folder, seconds)


def _rows(network: str, case: str, pairs: Sequence[tuple[str, str]], folder: Path, seconds: float) -> list[Row]:
    _, want, facts = files.expected(folder)
    rows, calls, workers = dict[str, Row](), {}, {}
    try:
        for name, dtype in pairs:
            key = f"{name} {dtype}"
            workers[key] = worker = Worker(name, network, folder, dtype)
            verdict = verify.check([worker.output], [want], BOUNDS[dtype])
            rows[key] = whole.gated(network, case, name, dtype, verdict)
            if verdict.ok:
                calls[key] = worker
        timed = whole.timed(rows, calls, seconds, lambda t: {})
    finally:
        for worker in workers.values():
            worker.close()
    return [_with(row, workers[key].facts, facts["flops"]) for key, row in zip(rows, timed, strict=True)]


def _with(row: Row, facts: Mapping[str, float], flops: float) -> Row:
    """``row`` with its rate, its share of the fastest product measured now, and its process's facts."""
    row = replace(row, extra={**row.extra, **{k: round(v, 3) for k, v in facts.items()}})
    if row.median_s is None:
        return row
    peak = roofline.measure().peak[row.dtype]
    return replace(row, gflops=flops / row.median_s / 1e9, roofline_share=flops / row.median_s / peak)


def suite(network: str) -> whole.Suite:
    """The benchmark of one network."""
    return whole.Suite(tuple(WHO), functools.partial(evaluation, network), tuple(PEERS))


SUITES = {name: suite(name) for name in NETWORKS}
