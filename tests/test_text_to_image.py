"""The text-to-image family from a training folder to pictures, with tiny networks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor

import fusegen
from fusegen.models import load as loading
from fusegen.models.pixels import pictures
from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.text_to_image import TextToImage
from fusegen.models.unet import UNet, UNetConfig
from fusegen.models.zoo.emoji import data, export
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.errors import Cancelled, Error, FileError, RequestError
from fusegen.runtime.loop.denoise import denoise
from fusegen.runtime.sampler import coefficients
from fusegen.runtime.schedule import ScheduleConfig

TINY = UNetConfig(widths=(32, 32), attention=(False, True), head_dim=16, context_width=32, time_width=32, groups=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder as ``train.py`` leaves it, its networks tiny and random."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("train")
    tokenizer = data.tokenizer(["pig face", "red circle", "slice of pizza"])
    tokenizer.save(str(out / "tokenizer.json"))
    text = TextEncoder(TextEncoderConfig(tokenizer.get_vocab_size(), width=32, layers=1))
    unet = UNet(TINY)
    state = {f"average.text_encoder.{k}": v for k, v in text.state_dict().items()}
    state |= {f"average.unet.{k}": torch.randn_like(v) * 0.05 + v for k, v in unet.state_dict().items()}
    state |= {"model." + k.removeprefix("average."): torch.zeros_like(v) for k, v in state.items()}
    save_file(state, out / "checkpoint.safetensors", metadata={"step": "1234", "seconds": "600.0"})
    config = {"unet": asdict(TINY), "text_encoder": asdict(text.cfg), "size": 16}
    config |= {"batch": 4, "device": "a test", "pictures": 3}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    export.export(folder, folder / "tiny.fg")
    return folder / "tiny.fg"


@pytest.fixture(scope="module")
def model(bundle: Path) -> TextToImage:
    return fusegen.load(bundle, dtype="float32")


def arrays(images: list[Image]) -> np.ndarray:
    return np.stack([np.asarray(i) for i in images])


def test_pictures_are_those_of_the_modules_in_a_plain_loop(folder: Path, model: TextToImage) -> None:
    """The whole path against eager PyTorch: averaged weights, tokens, both halves of the guidance, rounding."""
    text, unet, _ = export.modules(folder)
    text.half().float(), unet.half().float()  # as the bundle stores them
    ids = torch.tensor([e.ids for e in model.tokenizer.encode_batch(["circle"] * 2 + ["pig face"] * 2)])
    plan = coefficients("dpmpp_2m", ScheduleConfig.of(export.SCHEDULE), 5)
    with torch.no_grad():
        context = text(ids)
        x = denoise(
            lambda i, x: unet(x, torch.full((4,), plan.times[i]).float(), context), plan, [3, 9], (3, 16, 16), 2.5
        )
    ours = model.generate("Pig face", negative="circle", steps=5, guidance=2.5, sampler="dpmpp_2m", seeds=[3, 9])
    assert np.abs(arrays(ours).astype(int) - arrays(pictures(x))).max() <= 1
    assert arrays(ours).std() > 10  # not one colour


def test_a_picture_depends_on_its_seed_alone(bundle: Path) -> None:
    model = fusegen.load(bundle, dtype="float32", deterministic=True)
    several = arrays(model.generate("pig face", steps=3, sampler="euler_a", seeds=[5, 8, 13]))
    alone = arrays(model.generate("pig face", steps=3, sampler="euler_a", seeds=[8]))
    assert np.array_equal(several[1], alone[0]) and not np.array_equal(several[0], several[1])


def test_a_large_request_is_cut_and_counted_as_one(model: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusegen.models.text_to_image.BATCH", 2)
    told: list[tuple[int, int]] = []
    seen: list[tuple[int, int]] = []
    images = model.generate(
        "pig face",
        steps=2,
        seeds=range(3),
        progress=lambda *a: told.append(a),
        preview=lambda done, images: seen.append((done, len(images))),
    )
    assert len(images) == 3 and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen == [(1, 2), (2, 2), (3, 1), (4, 1)]


def test_without_guidance_the_network_runs_once_a_step(model: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    trajectory = model.denoiser.trajectory

    def counted(**given: Any) -> Any:
        run = trajectory(**given)
        return lambda i, x: sizes.append(len(x)) or run(i, x)  # type: ignore[func-returns-value]

    monkeypatch.setattr(model.denoiser, "trajectory", counted)
    one = model.generate("pig face", steps=2, guidance=1, seeds=[4, 5])
    assert sizes == [2, 2]
    negative = model.generate("pig face", "red circle", steps=2, guidance=1.0, seeds=[4, 5])
    assert np.array_equal(arrays(one), arrays(negative))
    model.generate("pig face", steps=2, guidance=1.5, seeds=[4, 5])
    assert sizes[4:] == [4, 4]


def test_the_prompt_the_negative_prompt_and_the_sampler_matter(model: TextToImage) -> None:
    made = [
        arrays(model.generate(*texts, steps=4, guidance=8.0, seeds=[1], sampler=sampler))
        for texts, sampler in [
            (("pig face",), "euler"),
            (("red circle",), "euler"),
            (("pig face", "red circle"), "euler"),
            (("pig face",), "ddpm"),
        ]
    ]
    assert len({m.tobytes() for m in made}) == 4
    karras = model.generate("pig face", steps=4, guidance=8.0, seeds=[1], sampler="euler", schedule="karras")
    assert arrays(karras).tobytes() != made[0].tobytes()


def test_cancelling_returns_nothing_and_the_next_request_works(model: TextToImage) -> None:
    event = threading.Event()
    with pytest.raises(Cancelled, match="after 2 of 9"):
        model.generate("pig face", steps=9, sampler="euler", progress=lambda n, _: n == 2 and event.set(), cancel=event)
    assert len(model.generate("pig face", steps=1)) == 1


WRONG: list[dict[str, Any]] = [
    {"prompt": 7},
    {"prompt": None},
    {"prompt": ["pig face"]},
    {"prompt": "x" * 10_001},
    {"negative": b"pig"},
    *({"steps": v} for v in (0, -1, 1001, 10**9, 2**63, "20", 2.0, math.nan, True)),
    *({"guidance": v} for v in (math.nan, math.inf, -math.inf, 1e9, "5", [1.0], True)),
    *({"seeds": v} for v in ([], 5, "5", [-1], [2**64], [0.5], range(1025), [True])),
    *({"width": v} for v in (0, 17, 32, 10**9, 2**63, -16, "16", 16.0)),
    {"height": 15},
    {"sampler": "eulr"},
    {"sampler": 3},
    {"schedule": "fast"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: f"{next(iter(w))}={str(next(iter(w.values())))[:20]}")
def test_wrong_requests_are_refused_in_one_line(
    wrong: dict[str, Any], model: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_make", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(RequestError) as error:
        model.generate(**{"prompt": "pig face", **wrong})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_settings_are_the_models_own_unless_told(model: TextToImage) -> None:
    assert model.settings() == export.SAMPLER
    assert model.settings("dpm++2m", 7, 1) == {"sampler": "dpmpp_2m", "steps": 7, "guidance": 1.0}


def test_pictures_are_clamped_and_rounded() -> None:
    x = torch.tensor([-9.0, -1.0, 0.0, 1 / 255 - 1 + 1e-4, 1.0, 9.0]).reshape(1, 1, 2, 3).expand(2, 3, 2, 3)
    first = np.asarray(pictures(x)[0])
    assert first[..., 0].ravel().tolist() == [0, 0, 128, 1, 255, 255] and first.shape == (2, 3, 3)
    for bad in (math.nan, math.inf):
        with pytest.raises(Error, match="not finite"):
            pictures(torch.full((1, 3, 2, 2), bad))


def test_saving_writes_the_same_bundle(model: TextToImage, bundle: Path, tmp_path: Path) -> None:
    fusegen.save(model, tmp_path / "again.fg")
    assert (tmp_path / "again.fg").read_bytes() == bundle.read_bytes()


def test_the_card_and_the_manifest_say_what_it_is(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.family == "text-to-image" and manifest.licence == "OFL-1.1"
    assert "1,234 steps" in manifest.card and "10 minutes" in manifest.card and "{" not in manifest.card


def test_names_of_models(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ZOO", bundle.parent)
    assert loading.locate("tiny") == bundle and loading.locate(str(bundle)) == bundle
    with pytest.raises(FileError, match="tiny"):
        fusegen.load("emojj")
    with pytest.raises(RequestError):
        fusegen.load(7)  # type: ignore[arg-type]


def test_a_folder_called_like_a_model_of_the_zoo_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "emoji").mkdir()
    monkeypatch.chdir(tmp_path)
    assert loading.locate("emoji").name == "emoji.fg"
    assert loading.locate("./emoji") == loading.locate(Path("emoji")) == Path("emoji")


@pytest.mark.parametrize(
    ("change", "say"),
    [
        ({"family": "gan"}, "gan"),
        ({"loop": {}}, "schedule"),
        ({"loop": {"schedule": {"beta": 1}, "image": {}}}, "beta"),
        ({"loop": {"schedule": {}, "image": {"width": 16}}}, "height"),
        ({"loop": {"schedule": {}, "image": {"width": 16, "height": 16, "least": 20, "most": 30}}}, "width"),
        ({"sampler": {"sampler": "none"}}, "none"),
        ({"sampler": {"step": 1}}, "step"),
        ({"components": ["text_encoder"]}, "denoiser"),
        ({"tokenizer": b"{}"}, "tokenizer.json"),
    ],
)
def test_a_bundle_of_another_kind_is_refused(bundle: Path, change: dict[str, Any], say: str, tmp_path: Path) -> None:
    from dataclasses import replace

    source = Bundle.open(bundle)
    kept = change.get("components", ["text_encoder", "denoiser"])
    files = {"tokenizer.json": change.get("tokenizer", source.file("tokenizer.json"))}
    manifest = replace(source.manifest, **{k: v for k, v in change.items() if k not in ("components", "tokenizer")})
    Bundle.write(tmp_path / "odd.fg", manifest, {n: source.program(n) for n in kept}, files)
    with pytest.raises((FileError, RequestError), match=say) as error:
        fusegen.load(tmp_path / "odd.fg")
    assert "\n" not in str(error.value)


def test_generating_imports_no_model_code(bundle: Path) -> None:
    """A fresh process, in which the architecture and heavy libraries cannot be imported, makes a picture."""
    script = f"""
        import sys
        BANNED = ("fusegen.models.unet", "fusegen.models.text_encoder", "fusegen.models.zoo.emoji",
                  "fusegen.runtime.read.capture",
                  "transformers", "diffusers", "scipy", "matplotlib")
        class Ban:
            def find_spec(self, name, path=None, target=None):
                if name in BANNED:
                    raise AssertionError(f"{{name}} was imported")
        sys.meta_path.insert(0, Ban())
        import fusegen
        assert "torch" not in sys.modules
        image, = fusegen.load({str(bundle)!r}).generate("pig face", steps=2)
        assert image.size == (16, 16)
    """
    root = Path(fusegen.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr


def test_half_of_the_guidance_is_the_empty_prompt(model: TextToImage) -> None:
    """A guidance of 0 shows the unconditional half alone, that is, the empty prompt's picture."""
    nothing = model.generate("pig face", steps=3, guidance=0.0, seeds=[2])
    empty = model.generate("", steps=3, guidance=1.0, seeds=[2])
    assert np.abs(arrays(nothing).astype(int) - arrays(empty)).max() <= 1


def encoded(model: TextToImage, text: str) -> Tensor:
    return torch.tensor(model.tokenizer.encode(text).ids)


def test_the_tokenizer_of_the_bundle_is_the_training_ones(folder: Path, model: TextToImage) -> None:
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("pig face", "", "Zürich pig", "slice " * 40):
        assert encoded(model, text).tolist() == own.encode(text).ids
