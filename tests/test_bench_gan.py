"""The benchmark of generators: its peers make the pictures that fusegen makes, so that the gate compares equals."""

from __future__ import annotations

from pathlib import Path

import torch

import fusegen
from fusegen.bench import gan_models, verify
from fusegen.bench.models import MODELS
from fusegen.bench.picture_models import pixels
from fusegen.models.load import locate
from fusegen.models.stylegan2 import StyleGAN2Config, Synthesis
from fusegen.runtime.bundle import Bundle


def test_the_peer_of_emoji_gan_makes_its_pictures() -> None:
    pair = gan_models.emoji_networks(Bundle.open(locate("emoji-gan")), False, "float32")
    want = pixels(gan_models.eager_pictures(*pair, 3))
    got = pixels(fusegen.load("emoji-gan", dtype="float32").generate(range(3), psi=gan_models.PSI))
    assert verify.check([got], [want], gan_models.PIXELS["float32"]).ok
    assert not verify.check([got.roll(1, 0)], [want], gan_models.PIXELS["bfloat16"]).ok


def test_the_large_generator_goes_through_its_files(tmp_path: Path, monkeypatch) -> None:
    """At a small size: each kind of contender, from a bundle and a state dict, in a batch that was not exported."""
    cfg = StyleGAN2Config(16, w_width=16, channels=(24, 20, 16))
    monkeypatch.setattr(gan_models, "config_f", lambda resolution: cfg)
    net = gan_models.large_network()
    gan_models.large_files(tmp_path, net)
    inputs = gan_models.large_inputs(cfg, 4)
    with torch.no_grad():
        want = Synthesis.forward(net, *inputs)
    for name in ("eager", "published", "fusegen"):
        got = gan_models.large_caller(name, "float32", tmp_path)(*inputs)
        assert verify.check([got], [want], gan_models.LARGE["float32"]).ok, name


def test_every_case_of_a_suite_can_be_named() -> None:
    assert {"emoji-gan", "stylegan2-256"} <= MODELS.keys()
    assert list(MODELS["stylegan2-256"].cases) == ["batch 1", "batch 4", "first picture of a process"]
