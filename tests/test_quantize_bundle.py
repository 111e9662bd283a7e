"""Quantized bundles: their proof, their round trip, the command, and its one-line errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from networks import relative, unet_program
from torch import nn

import fusegen
from fusegen.cli import main
from fusegen.models.quantize import Options, quantize_bundle
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.derived import value
from fusegen.runtime.errors import QualityError, RequestError
from fusegen.runtime.quantize import quality, quantize, quantized
from fusegen.runtime.quantize.quality import compared


def code_of(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.fixture
def bare(tmp_path: Path) -> Bundle:
    Bundle.write(tmp_path / "unet.fg", Manifest("unet"), {"unet": unet_program()})
    return Bundle.open(tmp_path / "unet.fg")


def test_the_measures_are_the_definitions() -> None:
    want = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    got = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    found = compared(got, want)
    assert found["relative_rms"] == pytest.approx(math.sqrt(1 / 29))
    assert found["cosine"] == pytest.approx(2 / math.sqrt(5))
    assert found["psnr"] == pytest.approx(20 * math.log10(4 / 0.5))
    assert compared(want, want) == {"relative_rms": 0.0, "cosine": 1.0, "psnr": quality.MOST_PSNR}
    assert compared(want * math.nan, want)["cosine"] == -1.0
    json.dumps(compared(got, torch.zeros(2, 2)), allow_nan=False)


def test_a_bare_denoiser_is_compared_over_a_trajectory(bare: Bundle, tmp_path: Path) -> None:
    sizes = {"batch": 2, "height": 16, "width": 16}
    sizes = {k: v for k, v in sizes.items() if k in bare.manifest.components["unet"].symbols}
    made = quantize_bundle(bare, tmp_path / "small.fg", Options(steps=4, least=0.9, sizes=sizes))
    proof = made.quality["components"]["unet"]
    assert proof["inputs"]["evaluations"] == 4 and proof["inputs"]["sampler"] == "dpmpp_2m"
    assert 0.9 <= proof["cosine"] <= 1 and proof["against"] == "float32"
    facts = made.quantization["components"]["unet"]
    assert facts["weight_bytes"] < 0.5 * facts["float32_bytes"]


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = quantize(unet_program())
    for storage in ("", "bfloat16"):
        Bundle.write(tmp_path / "a.fg", Manifest("a"), {"unet": made}, storage_dtype=storage)
        back = Bundle.open(tmp_path / "a.fg").program("unet")
        assert back.nodes == made.nodes and quantized(back) == quantized(made)
        for name, weight in made.weights.items():
            if weight.dtype == torch.int8 or name.endswith(".scale"):  # halves would lose the scales' low bits
                assert torch.equal(value(back.weights[name]), value(weight))


def test_too_much_loss_writes_nothing(bare: Bundle, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"cosine to the original is 0\.9\d+, below 1"):
        quantize_bundle(bare, tmp_path / "no.fg", Options(steps=1, least=1.0, sizes={"batch": 2}))
    assert not (tmp_path / "no.fg").exists()


def test_layers_with_large_errors_stay(bare: Bundle, tmp_path: Path) -> None:
    facts = []
    for most in (None, 0.012, 0.0):
        made = quantize_bundle(bare, tmp_path / "q.fg", Options(steps=1, most=most, least=0.9, sizes={"batch": 2}))
        facts.append(made.quantization["components"]["unet"])
    counts = [f.get("linear layers", 0) + f.get("convolutions", 0) for f in facts]
    assert counts[0] > counts[1] > counts[2] == 0


def test_a_network_that_is_no_denoiser_is_compared_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(2, 5, 64)
    Bundle.write(tmp_path / "net.fg", Manifest("net"), {"net": fusegen.capture(module, (x,))})
    assert code_of(f"quantize {tmp_path}/net.fg -o {tmp_path}/q.fg".split()) == 0
    made = Bundle.open(tmp_path / "q.fg")
    assert made.manifest.quality["components"]["net"]["inputs"]["evaluations"] == 1
    with torch.no_grad():
        assert relative(fusegen.compile(made.only())(x), module(x)) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_zoos_picture_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    out = tmp_path / "emoji-int8.fg"
    assert code_of(f"quantize emoji -o {out} --steps 2 --least-cosine 0.99 --json".split()) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quality"]["denoiser"]["cosine"] > 0.99
    assert facts["quantization"]["denoiser"]["linear layers"] > 50
    assert code_of(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "bits: int8" in shown and "cosine: 0.99" in shown
    picture = tmp_path / "pig.png"
    asked = ["generate", "-m", str(out), "-p", "pig face", "--steps", "2", "--dtype", dtype, "-o", str(picture)]
    assert code_of(asked) == 0 and picture.exists()
    assert code_of(["plan", str(out), "--component", "denoiser"]) == 0
    assert "multiply in int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pycode -o x.fg", "int8 is not served for text-generation models"),
        ("emoji-gan -o x.fg", "int8 is not served for gan models"),
        ("no-such -o x.fg", "there is no model 'no-such'"),
        ("emoji -o x.zip", "does not end in .fg"),
        ("emoji -o x.fg --bits int3", "invalid choice: 'int3'"),
        ("emoji -o x.fg --least-cosine 2", "2 is out of range"),
        ("emoji -o x.fg --most-error -1", "-1 is out of range"),
        ("emoji -o x.fg --keep nothing.like.it", "no layer or weight is called 'nothing.like.it'"),
        ("emoji -o x.fg --size depth=3", "no size is called 'depth'"),
        ("emoji -o x.fg --steps 1 --least-cosine 1", "in int8 the cosine to the original is 0.99"),
    ],
)
def test_errors_are_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code_of(["quantize", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_a_quantized_model_is_not_quantized_again(bare: Bundle, tmp_path: Path) -> None:
    Bundle.write(tmp_path / "q.fg", Manifest("q"), {"unet": quantize(unet_program())})
    with pytest.raises(RequestError, match="quantized already"):
        quantize_bundle(Bundle.open(tmp_path / "q.fg"), tmp_path / "r.fg")
