"""``fusegen plan``: the plot of a profile."""

from __future__ import annotations

from pathlib import Path

import pytest
from networks import unet_program
from PIL import Image

from fusegen.bench.roofline import Roofline
from fusegen.cli import main
from fusegen.runtime.bundle import Bundle, Manifest

ROOF = Roofline(4e10, 5e10, {"float32": 4e11, "bfloat16": 8e11})


def test_a_profile_is_drawn_against_the_ceilings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusegen.bench.roofline.measure", lambda device: ROOF)
    Bundle.write(Path("net.fg"), Manifest(name="net"), {"one": unet_program(), "two": unet_program()}, {})
    assert main("plan net.fg --batch 2 --plot roofline.png".split()) == 0
    assert capsys.readouterr().out.count("GFLOP/s") > 4
    with Image.open("roofline.png") as image:
        assert image.format == "PNG" and image.height > image.width  # a component above the other
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None and len(colours) > 100
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".fg", ".png")] == []


@pytest.mark.parametrize(
    ("name", "words"), [("roofline.svg", "ends with .png"), ("no-such-folder/roofline.png", "no such folder")]
)
def test_a_plot_that_cannot_be_written_is_refused_at_once(
    name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "emoji", "--plot", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize("model", ["emoji", "emoji-gan", "pycode"])
def test_the_kernels_of_an_op_are_left_alone_where_asked(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    ops = ("linear", "winograd_conv2d", "bias_act", "attention_decode")
    assert main(["plan", model, *(f"--without={name}" for name in ops)]) == 0
    out = capsys.readouterr().out
    assert not any(f"kernel {name} " in out or f"kernel {name}," in out for name in ops)
    assert main(["plan", model]) == 0
    out = capsys.readouterr().out
    assert any(f"kernel {name} " in out for name in ops)


def test_an_op_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan emoji --without winograd".split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no op is called 'winograd'" in line and "winograd_conv2d" in line
