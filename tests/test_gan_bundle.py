"""What a bundle of the gan family must hold, and the latents it brings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gans
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fusegen
from fusegen.models import latents
from fusegen.models.latents import Latents
from fusegen.runtime.api import capture
from fusegen.runtime.errors import Error, FileError
from fusegen.runtime.program import TensorSpec


def test_saving_writes_the_same_bundle(tmp_path: Path) -> None:
    file = gans.bundle(tmp_path)
    fusegen.save(fusegen.load(file), tmp_path / "again.fg")
    assert (tmp_path / "again.fg").read_bytes() == file.read_bytes()


def spoilt(name: str, value: float) -> dict[str, Tensor]:
    """The statistics with one element changed."""
    made = gans.statistics()
    made[name].view(-1)[1] = value
    return made


def shaped(name: str, *shape: int) -> dict[str, Tensor]:
    return gans.statistics() | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("statistics", "says"),
    [
        *((spoilt(name, bad), f"{name} has values that are not finite") for name, bad in (
            ("w_mean", math.nan), ("directions", math.inf), ("deviations", math.nan))),
        (spoilt("deviations", -1), "a deviation is negative"),
        (spoilt("directions", 3), "a direction is not of length 1"),
        (shaped("w_mean", 31), r"w_mean is float32 of shape \(31,\).*W = 32"),
        (shaped("w_mean", 1, 32), "w_mean is float32 of shape"),
        (shaped("directions", 2, 32), "directions is float32 of shape"),
        (shaped("directions", 3, 33), "directions is float32 of shape"),
        (shaped("deviations"), "of shape"),
        (gans.statistics() | {"w_mean": torch.zeros(32, dtype=torch.float64)}, "w_mean is float64"),
        ({k: v for k, v in gans.statistics().items() if k != "w_mean"}, "it needs w_mean"),
        (gans.statistics() | {"more": torch.zeros(1)}, "it holds .*more"),
    ],
)  # fmt: skip
def test_latents_that_are_not_as_they_should_be_are_refused_when_opened(
    statistics: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=says) as error:
        fusegen.load(gans.bundle(tmp_path, latents=statistics))
    assert "\n" not in str(error.value) and "latents.safetensors" in str(error.value)


def test_a_model_may_have_no_directions(tmp_path: Path) -> None:
    model = fusegen.load(gans.bundle(tmp_path, latents=gans.statistics(0)))
    with pytest.raises(Error, match="no directions"):
        model.generate(edit={0: 1.0})


STYLED, PLAIN = gans.programs(), {"generator": gans.plain_program()}


def changed(name: str, entry: str, shape: tuple[int | str, ...]) -> dict[str, Any]:
    """The programs with an input of another shape."""
    program = STYLED[name]
    return STYLED | {name: replace(program, inputs={**program.inputs, entry: TensorSpec(shape, torch.float32)})}


@pytest.mark.parametrize(
    ("bundle", "says"),
    [
        ({"parts": {"mapping": STYLED["mapping"]}}, "mapping and synthesis, or generator"),
        ({"parts": STYLED | PLAIN}, "mapping and synthesis, or generator"),
        ({"files": {}}, "no latents.safetensors"),
        ({"files": {"latents.safetensors": b"{}"}}, "safetensors header"),
        ({"loop": {}}, "'single'"),
        ({"loop": {"kind": "decode", "image": gans.image()}}, "'single'"),
        ({"loop": {"kind": "single", "image": gans.image(), "steps": 3}}, "'single'"),
        ({"loop": {"kind": "single", "image": {"width": 16}}}, "incomplete"),
        ({"loop": {"kind": "single", "image": gans.image(32)}}, "the manifest states pictures"),
        ({"parts": PLAIN, "loop": {"kind": "single", "image": gans.image(32)}}, "the manifest states pictures"),
        ({"sampler": {"psi": "much"}}, "psi is not a number"),
        ({"sampler": {"temperature": 1}}, "temperature"),
        ({"sampler": {"psi_cutoff": 40}}, "the generator has 6 layers"),
        ({"parts": PLAIN, "sampler": {"psi": 0.7}}, "has no sampler"),
        ({"parts": STYLED | {"mapping": PLAIN["generator"]}}, "the mapping gives w .*the synthesis takes w"),
        ({"parts": STYLED | {"synthesis": PLAIN["generator"]}}, "it must take ws"),
        ({"parts": {"generator": STYLED["synthesis"]}, "sampler": {}}, "it must take one latent"),
        ({"parts": changed("synthesis", "noise_1", ("batch", 2, 8, 8))}, "it must take ws"),
        ({"parts": changed("synthesis", "noise_1", (2, 1, 8, 8))}, "its batch must be free"),
        ({"parts": changed("mapping", "z", ("batch", "batch"))}, "it must take one latent"),
        ({"parts": changed("mapping", "z", ("batch", 10**9))}, "it must take one latent"),
        ({"parts": changed("synthesis", "noise_1", ("batch", 1, 10**5, 10**5))}, "it must take ws"),
        ({"parts": changed("synthesis", "ws", ("batch", 65, 32))}, "the synthesis has 65 layers"),
    ],
)
def test_a_bundle_of_another_kind_is_refused(bundle: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=says) as error:
        fusegen.load(gans.bundle(tmp_path, **bundle))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@given(st.integers(2, 30), st.integers(0, 100), st.booleans())
def test_a_path_stands_on_every_key_once_and_goes_evenly(keys: int, more: int, loop: bool) -> None:
    frames = keys + more
    way = latents.path(keys, frames, loop)
    assert len(way) == frames and [f.first for f in way if f.t == 0] == list(range(keys))
    assert all(f.second == (f.first + 1) % keys for f in way if f.t > 0)
    at = [f.first + f.t for f in way]
    assert at == sorted(at) and all(0 <= f.t < 1 for f in way)
    lengths = [sum(f.first == key for f in way) for key in range(keys if loop else keys - 1)]
    assert max(lengths) - min(lengths) <= 1 + (not loop)


def test_slerp_keeps_the_norm_and_the_pace() -> None:
    keys = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    keys = keys / keys.norm(dim=1, keepdim=True) * 8
    way = latents.path(3, 30, True)
    arc = latents.slerp(keys, way)
    assert torch.allclose(arc.norm(dim=1), torch.full((30,), 8.0), rtol=1e-6, atol=0)
    assert torch.equal(arc[::10], keys)
    steps = torch.nn.functional.cosine_similarity(arc[:10], arc[1:11]).acos()
    assert float(steps.max() - steps.min()) < 1e-3
    straight = latents.lerp(keys, way)
    assert torch.equal(straight[::10], keys) and float(straight.norm(dim=1).min()) < 7
    assert torch.allclose(straight[5], (keys[0] + keys[1]) / 2)


def test_slerp_goes_between_lengths_and_takes_any_shape() -> None:
    keys = torch.randn(2, 4, 3, 1)
    keys[1] *= 5
    arc = latents.slerp(keys, latents.path(2, 9, False))
    norms = arc.flatten(1).norm(dim=1)
    assert arc.shape == (9, 4, 3, 1) and torch.equal(arc[0], keys[0]) and torch.equal(arc[-1], keys[1])
    assert torch.allclose(norms, torch.linspace(float(norms[0]), float(norms[-1]), 9))


@pytest.mark.parametrize("second", [1.0, -1.0, 3.0, 0.0])
def test_slerp_of_what_lies_on_a_line_is_finite(second: float) -> None:
    keys = torch.stack([torch.ones(5), second * torch.ones(5)])
    arc = latents.slerp(keys, latents.path(2, 8, True))
    assert bool(torch.isfinite(arc).all()) and torch.equal(arc[[0, 4]], keys)


def test_truncation_rounds_each_row_by_itself() -> None:
    known = Latents(**gans.statistics())
    w = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    together = known.styles(w, 6, 0.7, 4)
    assert torch.equal(together, torch.cat([known.styles(row[None], 6, 0.7, 4) for row in w]))
    assert torch.equal(together[:, 4:], w[:, None].expand(-1, 2, -1)) and torch.equal(
        known.styles(w, 6, 1.0, 6), w[:, None].expand(-1, 6, -1)
    )


def test_a_program_for_one_picture_makes_them_one_by_one(tmp_path: Path) -> None:
    net, shapes = gans.styled(), gans.TINY.noises(1)
    ws = torch.randn(1, gans.TINY.layers, gans.TINY.w_width)
    parts = {
        "mapping": capture(net.mapping, (torch.randn(1, gans.TINY.z_width),), name="mapping"),
        "synthesis": capture(net.synthesis, (ws, *(torch.randn(s) for s in shapes)), name="synthesis"),
    }
    model = fusegen.load(gans.bundle(tmp_path, parts), dtype="float32")
    free = fusegen.load(gans.bundle(tmp_path), dtype="float32")
    for one, other in zip(model.generate(range(3)), free.generate(range(3)), strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert len(list(model.walk([1, 2], 3, "w"))) == 3
