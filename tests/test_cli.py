"""The command line: what it accepts, its one-line errors and exit codes, what it writes and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import fusegen
from fusegen import pictures
from fusegen.cli import COMMANDS, main
from fusegen.runtime.errors import Cancelled, FileError, RequestError

ROOT = Path(__file__).resolve().parent.parent


def run(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "fusegen", *args], cwd=cwd, env=environment, capture_output=True, text=True
    )


def code_of(argv: list[str]) -> int:
    """The exit code of ``main``, which argparse may leave by SystemExit."""
    try:
        return main(argv)
    except SystemExit as left:
        return int(left.code or 0)


class FakeModel:
    """Draws plain pictures; says what it was asked for."""

    device, dtype = "cpu", torch.bfloat16
    text_encoder = denoiser = SimpleNamespace(notes=("a note",), plan=SimpleNamespace(counts=lambda: {"kernel x": 3}))

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.done = 0
        self.interrupt_after = -1

    def settings(self, sampler: Any, steps: Any, guidance: Any) -> dict[str, Any]:
        return {"sampler": sampler or "ddim", "steps": steps or 9, "guidance": guidance or 3.0}

    def generate(self, prompt: str, *, seeds: list[int], progress: Any, cancel: Any, **asked: Any) -> list[Image.Image]:
        self.asked = {"prompt": prompt, "seeds": seeds, **asked}
        for self.done in range(9):
            if cancel():
                raise Cancelled("the generation was cancelled", f"after {self.done} of 9 evaluations")
            if self.done + 1 == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            progress(self.done + 1, 9)
        return [Image.new("RGB", (8, 6), (seed % 256, 0, 0)) for seed in seeds]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setitem(vars(fusegen), "load", lambda *args, **kwargs: fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_importing_costs_no_torch() -> None:
    code = "import sys, fusegen, fusegen.cli; fusegen.cli.parser(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_every_command_has_an_example() -> None:
    assert set(COMMANDS) <= set(re.findall(r"\w+", run("--help").stdout))
    for name in COMMANDS:
        if name != "bench":
            done = run(name, "--help")
            assert done.returncode == 0
            assert f"fusegen {name} " in done.stdout.split("examples:")[1], name


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"fusegen {fusegen.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "COMMAND"),
        ("paint", "invalid choice: 'paint'"),
        ("generate", "-m/--model"),
        ("generate -m emoji -p cat --sampler best", "no sampler is called 'best'; there are .*ddim.*euler"),
        ("generate -m emoji -p cat --steps 0", "argument --steps: 0 is out of range, which is 1 to"),
        ("generate -m emoji -p cat --steps ten", "argument --steps: 'ten' is not a whole number"),
        ("generate -m emoji -p cat -n 1000000000", "argument -n: 1000000000 is out of range"),
        ("generate -m emoji -p cat -W -5", "argument -W/--width"),
        ("generate -m emoji -p cat --seed 9223372036854775808", "argument --seed: .* is out of range"),
        ("generate -m emoji -p cat --cfg-scale nan", "argument --cfg-scale: 'nan' is not a finite number"),
        ("generate -m emoji -p cat -o x.bmp", "'x.bmp' does not end in one of .png"),
        ("generate -m emoji -p cat -o nowhere/x.png", "the folder nowhere does not exist"),
        ("generate -m emoji -p cat --device tpu", "invalid choice: 'tpu'"),
        ("generate -m emoji -p cat --paint red", "unrecognized arguments: --paint red"),
        ("export unet.pt2 -o unet.zip", "'unet.zip' does not end in .fg"),
        ("generate -m no-such-model -p cat", "no-such-model"),
        ("info no-such.fg", "no-such.fg"),
        ("plan no-such.pt2", "no-such.pt2"),
        ("export no-such.pt2 -o x.fg", "no-such.pt2"),
    ],
)
def test_a_bad_request_is_one_line(
    argv: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code_of(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.match(r"fusegen( \w+)?: error: ", err)
    assert re.search(says, err), err
    assert list(tmp_path.iterdir()) == []


def test_several_pictures_make_one_grid(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "generate -m emoji -p cat --negative dog -n 8 --seed 250 --steps 9 --cfg-scale 2.5 -o out.png --json"
    assert main(argv.split()) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert err == "note: a note\n"
    assert {k: made[k] for k in ("sampler", "steps", "guidance", "device", "dtype")} == {
        "sampler": "ddim", "steps": 9, "guidance": 2.5, "device": "cpu", "dtype": "bfloat16"
    }  # fmt: skip
    assert made["plan"]["denoiser"] == {"kernel x": 3}
    assert made["files"] == ["out.png"]
    assert made["seeds"] == list(range(250, 258))
    asked = {k: model.asked[k] for k in ("prompt", "negative", "steps", "guidance", "seeds")}
    assert asked == {"prompt": "cat", "negative": "dog", "steps": 9, "guidance": 2.5, "seeds": made["seeds"]}
    image = Image.open("out.png")
    assert image.size == (4 * 8, 2 * 6)
    assert [image.getpixel((x * 8, y * 6))[0] for y in (0, 1) for x in range(4)] == [*range(250, 256), 0, 1]
    assert json.loads(image.text["fusegen"])["prompt"] == "cat"
    assert os.listdir() == ["out.png"]


def test_a_number_in_the_name_gives_each_its_file(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("generate -m emoji -p cat -n 3 --seed 7 -o cat-%02d.png --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["cat-00.png", "cat-01.png", "cat-02.png"]
    assert [Image.open(f"cat-0{i}.png").getpixel((0, 0))[0] for i in range(3)] == [7, 8, 9]
    assert json.loads(Image.open("cat-02.png").text["fusegen"])["seeds"] == [9]


def test_minus_one_draws_a_seed(model: FakeModel) -> None:
    drawn = set()
    for _ in range(3):
        assert main("generate -m emoji -p cat --seed -1".split()) == 0
        drawn.add(model.asked["seeds"][0])
    assert len(drawn) == 3


def test_a_level_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusegen", "generate", "-m", "emoji", "-p", "cat", "-o", str(tmp_path / "cat.png")]
    done = subprocess.run(command, env=os.environ | {"FUSEGEN_CPU": "sse9"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"fusegen: error: .*sse9.*scalar.*\n", done.stderr)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal has it; a shell starts its background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_within_a_step_and_leaves_no_file(
    interruptible: None, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model.interrupt_after = 2
    assert main("generate -m emoji -p cat -o out.png".split()) == 130
    assert model.done == 2
    assert capsys.readouterr().err.splitlines()[-1] == "fusegen: cancelled"
    assert os.listdir() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RequestError("no such thing", "width", "use 32"), 2, "fusegen: error: no such thing (width): use 32"),
        (OSError(28, "No space left on device"), 2, "fusegen: error: [Errno 28] No space left on device"),
        (ZeroDivisionError("by\nzero"), 1, "fusegen: fault: ZeroDivisionError: by zero (-v shows where"),
        (KeyboardInterrupt(), 130, "fusegen: cancelled"),
    ],
)
def test_what_fails_inside_is_one_line_and_a_trace_with_v(
    error: BaseException, code: int, line: str, model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(model, "generate", failing)
    assert main("generate -m emoji -p cat".split()) == code
    err = capsys.readouterr().err
    assert err.startswith(line) and len(err.splitlines()) == 1
    assert main("generate -m emoji -p cat -v".split()) == code
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, Exception)
    assert os.listdir() == []


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    pictures.save(Image.new("RGB", (4, 4), "red"), file, {})

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space"):
        pictures.save(Image.new("RGB", (4, 4), "blue"), file, {})
    assert Image.open(file).getpixel((0, 0)) == (255, 0, 0)
    assert os.listdir(tmp_path) == ["a.png"]


GRIDS = [(1, (1, 1)), (3, (3, 1)), (5, (4, 2)), (16, (4, 4)), (17, (5, 4)), (100, (10, 10))]


@pytest.mark.parametrize(("count", "size"), GRIDS)
def test_grids(count: int, size: tuple[int, int]) -> None:
    sheet = pictures.grid([Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(count)])
    assert sheet.size == size
    assert [sheet.getpixel((i % size[0], i // size[0]))[0] for i in range(count)] == list(range(count))


def test_a_reader_that_goes_away_is_no_fault() -> None:
    done = subprocess.run(
        f"{sys.executable} -m fusegen doctor | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_doctor_says_what_is_there() -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said) == {"versions", "machine", "cpu kernels", "gpu", "onnx runtime", "models"}
    assert all(lines for lines in said.values())
    assert f"fusegen {fusegen.__version__} in {ROOT / 'fusegen'}" in said["versions"]
    assert any(line.startswith("CPUExecutionProvider: works") for line in said["onnx runtime"])
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore")
def test_the_model_in_the_box_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "generate -m emoji --steps 2 --dtype float32 --sampler euler_a --json -p".split()
    assert main([*command, "pig face", "-n", "3", "--seed", "5", "-o", "%d.png"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["sampler"], made["steps"], made["dtype"], made["seeds"]) == ("euler_a", 2, "float32", [5, 6, 7])
    assert any(name.startswith("kernel") for name in made["plan"]["denoiser"])
    assert main([*command, "pig face", "--seed", "6", "-o", "alone.png"]) == 0
    assert len({Image.open(f"{i}.png").tobytes() for i in range(3)}) == 3
    assert Image.open("alone.png").size == (made["width"], made["height"])
    capsys.readouterr()

    assert main(["info", "emoji", "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verified"] and said["family"] == "text-to-image" and set(said["components"]) == set(made["plan"])

    assert main("plan emoji --component denoiser --batch 2 --fixed context --per-step t --json".split()) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["inputs"]["x"].endswith("[2, 3, 64, 64]")
    assert {step["phase"] for step in plan["steps"]} - {"constant"} == {"fixed", "per_step", "step"}


def test_a_bare_graph_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU())
    batch = torch.export.Dim("batch", min=1, max=8)
    graph = torch.export.export(net, (torch.randn(2, 4, 3, 3),), dynamic_shapes=({0: batch},))
    torch.export.save(graph, "net.pt2")
    assert main("export net.pt2 -o net.fg".split()) == 0
    for name in ("net.pt2", "net.fg"):
        assert main(["plan", name, "--batch", "5", "--profile", "--json"]) == 0
        (plan,) = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert list(plan["inputs"].values()) == ["float32[5, 4, 3, 3]"]
        assert sum(share["part"] for share in plan["profile"]) == pytest.approx(1)
    assert main(["generate", "-m", "net.fg", "-p", "cat"]) == 2
    assert "no family" in capsys.readouterr().err
