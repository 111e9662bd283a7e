"""The emoji training: a step depends on its number alone, and a run that was stopped goes on with the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusegen.models.unet import UNetConfig
from fusegen.models.zoo.emoji import data, export, train
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.schedule import ScheduleConfig, alphas_cumprod

SIX = train.Settings(steps=6, size=8, batch=4, peak=1e-3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four made-up pictures and a network that trains in a moment."""
    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 8, 8)).astype(np.float32)
    captions = ["red circle", "blue heart", "pig face", "slice of pizza"]
    monkeypatch.setattr(data, "load", lambda size, font=None: data.Emoji(captions, images))
    monkeypatch.setitem(train.NETWORKS, 8, UNetConfig(widths=(32, 32), attention=(False, True), head_dim=16))


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    train.train(tmp_path / "whole", SIX)
    first = train.train(tmp_path / "stopped", SIX, until=3)
    assert first.step == 3
    second = train.train(tmp_path / "stopped", SIX)
    assert second.step == 6
    whole, stopped = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name
    weights = [k for k in whole if k.startswith("model.unet") and k.endswith("weight")]
    start = train.Run(
        data.tokenizer(data.load(8).captions).get_vocab_size(), tmp_path / "fresh", train.NETWORKS[8]
    ).model.state_dict()
    assert any(not torch.equal(whole[k], start[k.removeprefix("model.")]) for k in weights)


def test_a_run_begins_with_the_weights_of_a_bundle(tmp_path: Path) -> None:
    first = train.train(tmp_path / "first", train.Settings(2, 8, 4, 1e-3))
    programs = export.programs(first.model.text_encoder.eval(), first.model.unet.eval(), 8)
    Bundle.write(tmp_path / "first.fg", Manifest(name="first"), programs, {})
    second = train.train(tmp_path / "second", train.Settings(2, 8, 4, 1e-3), until=0, start=tmp_path / "first.fg")
    assert second.step == 0
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
        assert torch.equal(second.average[name], value), name


def test_a_batch_depends_on_its_number() -> None:
    emoji = data.load(8)
    batches = train.Batches(emoji, data.tokenizer(emoji.captions), "cpu")
    once, again, other = (batches(step, 4) for step in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])


def test_the_schedule_is_that_of_the_manifest() -> None:
    theirs = alphas_cumprod(ScheduleConfig.of(export.SCHEDULE))
    np.testing.assert_allclose(train.alphas_cumprod().numpy(), theirs, rtol=1e-12)


def test_words_make_tokens_and_unknown_words_fall_apart() -> None:
    tok = data.tokenizer(["pig face", "red circle"])
    assert tok.encode("Pig FACE").tokens[:3] == ["[cls]", "pig", "face"]
    assert tok.encode("gif").tokens[:4] == ["[cls]", "g", "##i", "##f"]
    assert len(tok.encode("red " * 40).ids) == data.LENGTH
