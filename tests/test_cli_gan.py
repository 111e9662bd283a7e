"""``fusegen generate`` for gan models: grids, matrices, walks, which options go together, one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import gans
import numpy as np
import pytest
from PIL import Image

import fusegen
from fusegen import generators
from fusegen.cli import main

SIDE = 16


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(gans.bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(file: str, more: str) -> int:
    """The exit code of a generation, float32 and deterministic."""
    try:
        return main(["generate", "-m", file, "--dtype", "float32", "--deterministic", *more.split()])
    except SystemExit as left:
        return int(left.code or 0)


def cells(name: str, columns: int, side: int = SIDE) -> list[bytes]:
    """The pictures of a grid, row by row."""
    sheet = np.asarray(Image.open(name))
    rows = sheet.shape[0] // side
    return [
        sheet[y * side : (y + 1) * side, x * side : (x + 1) * side].tobytes()
        for y in range(rows)
        for x in range(columns)
    ]


def expected(file: str, *args: Any, **more: Any) -> list[bytes]:
    return [i.tobytes() for i in fusegen.load(file, dtype="float32", deterministic=True).generate(*args, **more)]


def test_a_list_of_seeds_makes_a_grid(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(file, "--seeds 0-2,9,5-6 --psi 0.5 -o grid.png --json") == 0
    made = json.loads(capsys.readouterr().out)
    seeds = [0, 1, 2, 9, 5, 6]
    wanted = {"seeds": seeds, "psi": 0.5, "psi_cutoff": 6, "width": 16, "scale": 1, "files": ["grid.png"]}
    assert {k: made[k] for k in wanted} == wanted and set(made["plan"]) == {"mapping", "synthesis"}
    assert cells("grid.png", 4)[:6] == expected(file, seeds, psi=0.5)
    assert json.loads(Image.open("grid.png").text["fusegen"])["seeds"] == seeds


def test_seed_and_n_mean_what_they_do_for_text_to_image(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(file, "-n 3 --seed 7 --edit 0:2,2:-1.5 --psi-cutoff 4 -o %d.png") == 0
    assert re.match(r"0.png 1.png 2.png: 3 pictures of 16 x 16, seeds 7 to 9, psi 0.7, ", capsys.readouterr().out)
    made = [Image.open(f"{i}.png").tobytes() for i in range(3)]
    assert made == expected(file, [7, 8, 9], psi_cutoff=4, edit={0: 2, 2: -1.5})
    assert generate(file, "-o one.png") == 0
    assert Image.open("one.png").tobytes() == expected(file, [42])[0]
    assert generate(file, "--count 2 --seed -1 --scale 3 -o two.png") == 0
    assert Image.open("two.png").size == (2 * 3 * SIDE, 3 * SIDE)


def test_mixing_makes_a_matrix_between_its_sources(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(file, "--seeds 1,2 --mix 0,3-4 --mix-seeds 5-7 -o mix.png --json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["mix"] == [0, 3, 4] and made["mix_seeds"] == [5, 6, 7]
    across, down = expected(file, [5, 6, 7]), expected(file, [1, 2])
    blank = Image.new("RGB", (SIDE, SIDE), "white").tobytes()
    mixed = [expected(file, [s] * 3, mix=[0, 3, 4], mix_seeds=[5, 6, 7]) for s in (1, 2)]
    assert cells("mix.png", 4) == [blank, *across, down[0], *mixed[0], down[1], *mixed[1]]
    assert generate(file, "--mix 3 -o own.png") == 0  # four seeds with themselves
    sheet = cells("own.png", 5)
    assert [sheet[6 * i] for i in range(1, 5)] == sheet[1:5] == sheet[5::5] == expected(file, range(42, 46))


def test_a_walk_is_a_video(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(file, "--walk 9 --seeds 1,2,3 --fps 12 --json") == 0
    made = json.loads(capsys.readouterr().out)
    wanted = {"walk": 9, "space": "w", "loop": True, "fps": 12, "scale": 16, "files": ["output.mp4"]}
    assert {k: made[k] for k in wanted} == wanted
    with av.open("output.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (256, 256, 12)
        found = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    first = np.asarray(fusegen.load(file, dtype="float32").generate([1])[0]).repeat(16, 0).repeat(16, 1)
    assert len(found) == 9 and np.abs(found[0].astype(int) - first).mean() < 8
    assert generate(file, "--walk 8 --space z --no-loop --scale 2 -o walk.gif") == 0
    assert re.match(r"walk.gif: 8 frames of 32 x 32, seeds 42 to 45, ", capsys.readouterr().out)
    assert (Image.open("walk.gif").n_frames, Image.open("walk.gif").size) == (8, (32, 32))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("-p cat", "--prompt is for text-to-image and text-generation models, and .*tiny.fg is a gan model"),
        ("--steps 3", "--steps is for text-to-image models, and .*tiny.fg is a gan model"),
        ("--temp 0.5", "--temperature is for text-generation models"),
        ("--seeds 3-1", "argument --seeds: the range 3-1 runs backwards"),
        ("--seeds 1,,2", "argument --seeds: '' is not a whole number"),
        ("--seeds 0-99999999999", "argument --seeds: .* is more than 1024 numbers"),
        ("--seeds 1 -n 2", "--seeds was given beside --seed or -n"),
        ("--seeds 1 --seed 2", "--seeds was given beside --seed or -n"),
        ("-n 2000", "-n 2000 is out of range: a request makes 1 to 1024 pictures"),
        ("--psi much", "argument --psi: 'much' is not a finite number"),
        ("--psi 1e9", "psi is not a number from -100 to 100"),
        ("--psi-cutoff 9", "psi_cutoff is not an integer from 0 to 6"),
        ("--mix 6", "a layer of mix is not an integer from 0 to 5"),
        ("--mix 5-99", "argument --mix: 99 is out of range"),
        ("--mix-seeds 1", "--mix-seeds was given without --mix"),
        ("--mix 1 --seeds 0-99 --mix-seeds 0-99", "a matrix of 100 by 100 seeds is too large"),
        ("--mix 1 -o %d.png", "a matrix is one file"),
        ("--edit 0", "argument --edit: '0' is not of the form DIRECTION:AMOUNT"),
        ("--edit 0:1,0:2", "argument --edit: direction 0 is given twice"),
        ("--edit 7:1", "direction is not an integer from 0 to 2"),
        ("--walk 1", "argument --walk: 1 is out of range"),
        ("--walk 3", "frames is not an integer from 4"),
        ("--walk 8 --seeds 3", "a walk goes from seed to seed"),
        ("--walk 8 --mix 1", "--walk and --mix do not go together"),
        ("--walk 8 -o x.png", "'x.png' does not end in one of .mp4"),
        ("--walk 8 --fps 60 -o x.gif", "60 frames a second is out of range for .gif"),
        ("--walk 8 --fps 0", "argument --fps: 0 is out of range"),
        ("--fps 30", "--fps is for a --walk"),
        ("--no-loop", "--no-loop is for a --walk"),
        ("--space z", "--space is for a --walk"),
        ("-o x.mp4", "'x.mp4' does not end in one of .png"),
    ],
)
def test_what_does_not_go_is_one_line(file: str, more: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(file, more) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and re.search(says, err), err
    assert os.listdir() == []


def test_gan_options_are_refused_for_others_and_a_prompt_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    for more, says in (
        ("-m emoji -p cat --psi 0.7", "--psi is for gan models, and emoji is a text-to-image model"),
        ("-m pycode -p x --walk 8", "--walk is for gan models, and pycode is a text-generation model"),
        ("-m emoji", "emoji is a text-to-image model, which needs a prompt"),
        ("-m pycode -n 3", "pycode is a text-generation model, which needs a prompt"),
    ):
        assert main(["generate", *more.split()]) == 2
        assert says in capsys.readouterr().err


def test_a_model_without_w_walks_in_z(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    plain = str(gans.bundle(tmp_path / "model", {"generator": gans.plain_program()}))
    assert generate(plain, "--walk 4 --scale 1 --json") == 0
    assert json.loads(capsys.readouterr().out)["space"] == "z"
    assert generate(plain, "--psi 0.7 -o x.png") == 2
    assert "this model has no w space (psi): leave psi out" in capsys.readouterr().err
    assert generate(plain, "-n 2 -o two.png") == 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal has it; a shell starts its background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("more", ["-n 9 -o x.png", "--walk 60", "--walk 60 -o x.webp"])
def test_ctrl_c_leaves_no_file(
    more: str, interruptible: None, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusegen.models import gan

    drawn: list[int] = []
    draw = gan.Gan._draw

    def interrupted(self: gan.Gan, inputs: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, inputs)

    monkeypatch.setattr(gan, "BATCH", 4)
    monkeypatch.setattr(gan.Gan, "_draw", interrupted)
    assert generate(file, more) == 130
    assert len(drawn) == 2 and capsys.readouterr().err.splitlines()[-1] == "fusegen: cancelled"
    assert os.listdir() == []


def test_info_and_plan_look_into_it(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", file, "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verified"] and said["family"] == "gan" and set(said["components"]) == {"mapping", "synthesis"}
    assert main(["plan", file, "--batch", "3", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert len(plans) == 2 and plans[0]["inputs"] == {"z": "float32[3, 24]"}
    assert main(["plan", file, "--component", "synthesis", "--profile"]) == 0
    assert "kernel modulated_conv2d" in capsys.readouterr().out


def test_each_file_of_the_folder_is_a_family_or_shared() -> None:
    files = {p.stem for p in Path(generators.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {*generators.FAMILIES.values(), "picture"}


def test_the_model_in_the_box(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "-m", "emoji-gan", "--json"]
    assert main([*command, *"--seeds 0-15 --psi 0.7 -o grid.png".split()]) == 0
    made = json.loads(capsys.readouterr().out)
    side = made["width"]
    assert side >= 32 and Image.open("grid.png").size == (4 * side, 4 * side)
    assert len(set(cells("grid.png", 4, side))) == 16 and np.asarray(Image.open("grid.png")).std() > 20
    assert main([*command, *"--seeds 0-3 --mix 3,7 --edit 0:2,3:-1.5 -o mix.png".split()]) == 0
    assert Image.open("mix.png").size == (5 * side, 5 * side)
    assert main([*command, *"--walk 60 -o walk.mp4".split()]) == 0
    with av.open("walk.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 60
    capsys.readouterr()
    assert main(["info", "emoji-gan", "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "gan" and set(said["components"]) == set(made["plan"]) and said["licence"] == "OFL-1.1"


@pytest.mark.parametrize("model", ["gan", "emoji"])
def test_the_dtype_told_is_the_one_it_computed_in(
    file: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """float16 was told, beside a note that this CPU has no such arithmetic and what was taken instead."""
    from fusegen.runtime import compile as compiling

    monkeypatch.setattr(compiling, "native", lambda dtype: False)
    more = ["-m", file] if model == "gan" else ["-m", "emoji", "--steps", "1", "-p", "pig face"]
    assert main(["generate", *more, "--dtype", "float16", "--json", "-o", "x.png"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["dtype"] == "float32" and any("computes in float32" in note for note in made["notes"])
