"""The emoji-gan training: a stopped run goes on with the same bits, what augmentation does, and the bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from safetensors.torch import load_file, save_file

from fusegen.kernels.op import Tolerance
from fusegen.models.stylegan2 import StyleGAN2Config
from fusegen.models.zoo.emoji import data
from fusegen.models.zoo.emoji_gan import export, train
from fusegen.models.zoo.emoji_gan.augment import Adaptive, Changes
from fusegen.runtime.bundle import Bundle

TINY = StyleGAN2Config(8, z_width=6, w_width=8, mapping_layers=2, mapping_rate=0.1, channels=(12, 10), clamp=None)
SIX = train.Settings(steps=6, config=TINY, batch=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five made-up pictures."""
    images = np.random.default_rng(0).uniform(-1, 1, (5, 3, 8, 8)).astype(np.float32)
    monkeypatch.setattr(data, "load", lambda size, font=None: data.Emoji(["a"] * 5, images))
    monkeypatch.setattr(train, "LAZY", 2)
    monkeypatch.setattr(train, "SAMPLE", 4)


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Stopped between two changes of p, after a step without R1; p is made to be above zero."""
    for name, stops in (("whole", (None,)), ("stopped", (1, 3, None))):
        (tmp_path / name).mkdir()
        first = train.Run(tmp_path / name, SIX)
        first.advance(torch.from_numpy(data.load(8).images))
        first.adaptive.p = 0.7
        first.save()
        for until in stops:
            run = train.train(tmp_path / name, SIX, until)
        assert run.step == 6 and run.adaptive.p != 0.7
    whole, stopped = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name
    start = train.Run(tmp_path / "fresh", SIX)
    for name, p in start.nets.named_parameters():
        assert not torch.equal(p, whole[name]), f"{name} has not moved"
    assert not torch.equal(whole["average.synthesis.b8.conv1.weight"], whole["generator.synthesis.b8.conv1.weight"])
    assert (tmp_path / "whole" / "sample-000004.png").exists()


def test_the_end_can_be_moved_while_it_runs(tmp_path: Path) -> None:
    tmp_path.joinpath("steps").write_text("2\n")
    assert train.train(tmp_path, SIX).step == 2
    tmp_path.joinpath("steps").write_text("3\n")
    assert train.train(tmp_path, SIX).step == 3


def test_the_rate_falls_over_the_last_fifth() -> None:
    rates = [train.learning_rate(step, 100, 1.0) for step in (0, 79, 80, 90, 100)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.05])


def test_p_follows_the_signs_of_the_real_logits() -> None:
    adaptive, real = Adaptive(images=160), torch.ones(8, 1)
    for step in range(8):
        adaptive.observe(real, step)
    assert adaptive.p == pytest.approx(2 * 8 * 4 / 160)
    for step in range(8, 40):
        adaptive.observe(torch.cat([real, -real]), step)  # half of them: below the target
    assert adaptive.p == 0.0


def test_augmentation_with_p_0_changes_nothing_and_with_1_much() -> None:
    x = torch.rand(64, 3, 8, 8) * 2 - 1
    same = Changes.drawn(np.random.default_rng(1), 0.0, 64, 8, "cpu")(x)
    assert_close("same", same, x, Tolerance(rms=1e-6, peak=1e-5))
    changed = Changes.drawn(np.random.default_rng(1), 1.0, 64, 8, "cpu")(x)
    assert all(float((a - b).abs().mean()) > 0.05 for a, b in zip(changed, x, strict=True))
    again = Changes.drawn(np.random.default_rng(1), 1.0, 64, 8, "cpu")(x)
    assert torch.equal(changed, again)


def test_turned_by_right_angles_and_moved_by_whole_pixels_no_pixel_is_blurred() -> None:
    x = torch.rand(1, 3, 8, 8)
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    keep = torch.eye(3, 4)[None]
    turned = Changes(quarter, keep)(x)
    close = [torch.allclose(turned, x.rot90(k, (2, 3)), atol=1e-5) for k in range(4)]
    assert close.count(True) == 1 and not close[0]
    moved = Changes(torch.tensor([[[1.0, 0.0, 2 * 2 / 8], [0.0, 1.0, 0.0]]]), keep)(x)
    torch.testing.assert_close(moved[..., :6], x[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[..., 6:], x[..., 7:].expand(-1, -1, -1, 2), rtol=0, atol=1e-5)


def test_the_bundle(tmp_path: Path) -> None:
    run = train.train(tmp_path, replace(SIX, steps=2))
    manifest = export.export(tmp_path, tmp_path / "tiny.fg")
    assert (manifest.family, manifest.loop["kind"]) == ("gan", "single") and "{" not in manifest.card
    opened = Bundle.open(tmp_path / "tiny.fg")
    assert set(opened.manifest.components) == {"mapping", "synthesis"}
    synthesis = opened.program("synthesis")
    assert [spec.shape[1:] for spec in synthesis.inputs.values()] == [(4, 8), (1, 4, 4), (1, 8, 8), (1, 8, 8)]
    assert {spec.shape[0] for spec in synthesis.inputs.values()} == {"batch"} and synthesis.symbols["batch"] == (1, 128)
    (tmp_path / "latents").write_bytes(opened.file("latents.safetensors"))
    latents = load_file(tmp_path / "latents")
    assert {k: tuple(v.shape) for k, v in latents.items()} == {
        "w_mean": (8,), "directions": (8, 8), "deviations": (8,)
    }  # fmt: skip
    assert_close("unit", latents["directions"] @ latents["directions"].t(), torch.eye(8), Tolerance(1e-5, 1e-5))
    assert bool((latents["deviations"].diff() <= 0).all())
    net, _ = export.generator(tmp_path)
    for name, value in run.average.items():
        assert torch.equal(net.state_dict()[name], value), name
    z = torch.randn(4000, 6)
    with torch.no_grad():
        w = net.mapping(z)
    along = ((w - latents["w_mean"]) @ latents["directions"].t()).std(0)
    torch.testing.assert_close(along, latents["deviations"], rtol=0.1, atol=1e-4)
    assert json.loads((tmp_path / "config.json").read_text())["pictures"] == 5


def test_the_checkpoint_is_data(tmp_path: Path) -> None:
    """A checkpoint of another network is refused, not half loaded."""
    train.train(tmp_path, SIX, until=1)
    state = load_file(tmp_path / "checkpoint.safetensors")
    del state["generator.synthesis.b4.const"]
    save_file(state, tmp_path / "checkpoint.safetensors", {"step": "1", "seconds": "0", "p": "0", "signs": "0"})
    with pytest.raises(KeyError, match=r"b4\.const"):
        train.train(tmp_path, SIX)
