"""The benchmarks of published networks, on a small one: the files, the peers, a worker's parent, the picture's loop."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fusegen.bench import cli, models, whole
from fusegen.bench.published import files, networks, peers, picture, suites, worker
from fusegen.bench.row import Row
from fusegen.kernels import op as registry
from fusegen.runtime.loop.denoise import denoise
from fusegen.runtime.loop.tiles import starts

SMALL = "small"


def _small() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))
    return networks.Call(net, lambda net, x, scale: net(x) * scale)


# Parameters in millions, as their papers and cards have them; diffusers' DiT embeds time and label in each of its 28
# blocks, 675 million without.
PUBLISHED = {"sd15-unet": 859.5, "sdxl-unet-512": 2567.5, "sd-vae-512": 49.5, "dit-xl-2": 749.8, "clip-l": 123.1}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_are_those_that_were_published(name: str) -> None:
    with torch.device("meta"):
        net = networks.NETWORKS[name].build()
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert count == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert networks.example(name)[0].shape[0] in (1, 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = networks.Network(_small, lambda g: [torch.randn(2, 3, 16, 16, generator=g), torch.rand(2, 1, 1, 1)])
    monkeypatch.setattr(networks, "NETWORKS", {SMALL: made})
    (tmp_path / SMALL).mkdir()
    files.main(SMALL, str(tmp_path / SMALL), files.EXPECTED, files.WEIGHTS, files.BUNDLE)
    return tmp_path / SMALL


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["eager", "fusegen"])
def test_peers_load_the_same_network_from_their_files(folder: Path, name: str, dtype: str) -> None:
    inputs, want, facts = files.expected(folder)
    got = peers.PEERS[name].load(SMALL, folder, dtype, inputs)(inputs)
    bound = suites.BOUNDS[dtype]
    assert float((got.float() - want).norm() / want.norm()) <= bound.rms
    assert facts["flops"] == 2 * (2 * 256 * 9 * 3 * 32) * 2  # two convolutions of two pictures


def test_int8_is_quantized_as_it_loads_and_raced_where_its_bound_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(peers, "compile_program", lambda program, *how, **more: asked.append((how, more)))
    peers.opened(folder, "int8"), peers.opened(folder, "bfloat16")
    assert asked == [(("cpu", "bfloat16"), {"quantize": "int8"}), (("cpu", "bfloat16"), {})]
    assert suites._pairs(suites.QUANTIZED, ["openvino", "fusegen"], [])[-1] == ("fusegen", "int8")
    assert [name for name, s in suites.SUITES.items() if suites.QUANTIZED in s.cases] == [picture.UNET]


@pytest.mark.parametrize(("name", "package"), [("onnxruntime", "onnxscript"), ("openvino", "openvino")])
def test_other_runtimes_do_too_where_they_are_installed(folder: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    files.main(SMALL, str(folder), peers.PEERS[name].kind)
    inputs, want, _ = files.expected(folder)
    torch.testing.assert_close(peers.PEERS[name].load(SMALL, folder, "float32", inputs)(inputs), want)


def test_openvino_s_model_may_be_traced_with_smaller_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")

    def inputs(side: int) -> Callable[[torch.Generator], list[Tensor]]:
        return lambda g: [torch.randn(2, 3, side, side, generator=g), torch.rand(2, 1, 1, 1)]

    made = networks.Network(_small, inputs(24), traced=inputs(8))
    monkeypatch.setattr(networks, "NETWORKS", {SMALL: made})
    files.main(SMALL, str(tmp_path), files.EXPECTED, files.OPENVINO)
    given, want, _ = files.expected(tmp_path)
    assert want.shape[2:] == (24, 24)
    torch.testing.assert_close(peers.PEERS["openvino"].load(SMALL, tmp_path, "float32", given)(given), want)


def test_a_stored_dtype_is_everybody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = networks.Network(
        _small, lambda g: [torch.randn(1, 3, 8, 8, generator=g), torch.ones(1, 1, 1, 1)], "bfloat16"
    )
    monkeypatch.setattr(networks, "NETWORKS", {SMALL: made})
    assert all(torch.equal(p, p.bfloat16().float()) for p in networks.made(SMALL).parameters())


STUB = """#!{python}
import json, sys
if {fails}:
    sys.exit("no memory left")
from safetensors.torch import save_file
import torch
save_file({{"output": torch.arange(3.0)}}, sys.argv[-1])
calls = 0
while True:
    print(json.dumps({{"load_s": 1.0, "peak_mib": 100.0 + calls}}), flush=True)
    if sys.stdin.readline() != "run\\n":
        break
    calls += 1
"""


def _stub(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    path = folder / "python"
    path.write_text(STUB.format(python=sys.executable, fails=fails))
    path.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(path))


def test_a_worker_answers_and_tells_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stub(tmp_path, monkeypatch, False)
    running = worker.Worker("eager", SMALL, tmp_path, "float32")
    assert running.facts == {"load_s": 1.0, "peak_mib": 100.0}
    assert torch.equal(running.output, torch.arange(3.0))
    running(), running()
    running.close()
    assert running.facts["peak_mib"] == 102.0 and running.process.returncode == 0


def test_a_worker_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stub(tmp_path, monkeypatch, True)
    with pytest.raises(RuntimeError, match="no memory left"):
        worker.Worker("eager", SMALL, tmp_path, "float32")


def test_the_eager_steps_are_those_of_our_loop() -> None:
    registry.ops()
    sampled, context = picture.plan(), torch.zeros(2, 1, 1)

    def unet(given: Sequence[Tensor]) -> Tensor:
        x, t, _ = given
        return torch.tanh(x) * (1 + t[:, None, None, None] / 1000)

    def ours(step: int, x: Tensor) -> Tensor:
        return unet([x, torch.full((2,), float(sampled.times[step])), context])

    eager = picture._sampled(unet, sampled, context)
    loop = denoise(ours, sampled, [picture.SEED], picture.SHAPE, picture.GUIDANCE)
    assert len(sampled) == picture.STEPS
    torch.testing.assert_close(eager, loop, rtol=1e-3, atol=1e-3 * float(loop.abs().max()))


def test_a_contender_that_a_suite_lacks_is_left_out_of_it() -> None:
    assert cli.chosen(["openvino"], peers.PEERS, "contender") == ["openvino"]
    assert suites._pairs(suites.HALF, ["openvino", "onnxruntime"], ["bfloat16"]) == [("openvino", "bfloat16")]


@pytest.mark.parametrize("named", [[], ["openvino", "aotinductor"]])
def test_aotinductor_runs_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch, named: list[str]) -> None:
    ran: list[str] = []

    def run(who: Sequence[str], *_: object) -> Iterator[list[Row]]:
        ran.extend(who)
        return iter(())

    real = suites.SUITES["clip-l"]
    monkeypatch.setattr(models, "MODELS", {"clip-l": dataclasses.replace(real, run=run), "emoji": whole.Suite((), run)})
    cli.run(cli.parser().parse_args(["models", *(f"--contender={name}" for name in named)]))
    assert ran == (named or [name for name in peers.PEERS if name != "aotinductor"])


def test_a_contender_that_dies_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stub(tmp_path, monkeypatch, True)
    job = suites.Job(
        SMALL, suites.HALF, [("eager", "bfloat16"), ("openvino", "bfloat16")], tmp_path, torch.ones(1), 1.0, 1
    )
    rows = suites._rows(job, 0.01)
    assert [(r.contender, r.ok, r.median_s) for r in rows] == [("eager", False, None), ("openvino", False, None)]
    assert all("no memory left" in r.note for r in rows)


def test_only_others_may_be_off_by_more_than_the_bound() -> None:
    assert suites.bound("fusegen", "bfloat16") == suites.BOUNDS["bfloat16"]
    assert suites.bound("openvino", "bfloat16").rms == suites.PEER_MARGIN * suites.BOUNDS["bfloat16"].rms


def test_the_tiles_of_a_large_picture_are_as_many_as_are_counted() -> None:
    (latents,), (part,) = networks.example(picture.LARGE), networks.example(picture.TILE)
    many = [len(starts(n, side, picture.COMMON)) for n, side in zip(latents.shape[2:], part.shape[2:], strict=True)]
    assert math.prod(many) == picture.EVALUATIONS[picture.TILED][picture.TILE]
