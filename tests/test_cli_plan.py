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
