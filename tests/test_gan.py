"""The gan family with tiny random generators: what a picture is made of, and what it does not depend on."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gans
import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

import fusegen
from fusegen.kernels.noise_normal import normal_numpy
from fusegen.models.gan import Gan
from fusegen.models.pixels import pictures
from fusegen.runtime.errors import Cancelled, RequestError

LAYERS = gans.TINY.layers


def opened(folder: Path, noise: float | None = 0.3, dtype: str = "float32") -> Gan:
    """A deterministic model whose noise has that strength, or the plain one."""
    parts = {"generator": gans.plain_program()} if noise is None else gans.programs(noise)
    return fusegen.load(gans.bundle(folder, parts), dtype=dtype, deterministic=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Gan:
    return opened(tmp_path_factory.mktemp("styled"))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Gan:
    """The same without noise: a picture is its w."""
    return opened(tmp_path_factory.mktemp("quiet"), 0.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Gan:
    return opened(tmp_path_factory.mktemp("plain"), None)


def arrays(images: Iterable[Image]) -> np.ndarray:
    return np.stack([np.asarray(i) for i in images])


def w_of(seed: int) -> Tensor:
    """w (1, W) of a seed, from its noise in numpy through the module."""
    return gans.styled().mapping(torch.from_numpy(normal_numpy([seed], (gans.TINY.z_width,), 0)))


def drawn(ws: Tensor, seed: int, noise: float = 0.3) -> np.ndarray:
    """The picture of the module for styles (1, L, W) and a seed's noise."""
    shapes = [shape[1:] for shape in gans.TINY.noises(1)]
    noises = [torch.from_numpy(normal_numpy([seed], shape, k + 1)) for k, shape in enumerate(shapes)]
    return arrays(pictures(gans.styled(noise).synthesis(ws, *noises)))[0]


def truncated(w: Tensor, psi: float = 0.7) -> Tensor:
    mean = gans.statistics()["w_mean"]
    return mean + psi * (w - mean)


def near(images: Iterable[Image], expected: Iterable[np.ndarray]) -> bool:
    """Whether the pictures are the same but for the rounding of a pixel."""
    return bool(np.abs(arrays(images).astype(int) - np.stack(list(expected))).max() <= 1)


def test_pictures_are_those_of_the_modules(model: Gan, tmp_path: Path) -> None:
    """The whole path against plain PyTorch: z and noise of the seed, mapping, truncation, synthesis, rounding."""
    expected = [drawn(truncated(w_of(seed))[:, None].expand(-1, LAYERS, -1), seed) for seed in (3, 9)]
    assert near(model.generate([3, 9]), expected)
    assert arrays(model.generate([3, 9])).std() > 20  # not one colour
    half = arrays(opened(tmp_path, dtype="bfloat16").generate([3, 9])).astype(int)
    assert 0 < np.abs(half - expected).mean() < 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("noise", [0.3, None], ids=["styled", "plain"])
def test_a_picture_depends_on_its_seed_alone(noise: float | None, dtype: str, tmp_path: Path) -> None:
    model = opened(tmp_path, noise, dtype)
    several = arrays(model.generate([5, 8, 13]))
    assert np.array_equal(arrays(model.generate([8])), several[1:2])
    assert np.array_equal(arrays(model.generate([13, 8, 5, 5])), several[[2, 1, 0, 0]])
    assert len({picture.tobytes() for picture in several}) == 3


def test_a_large_request_is_cut_and_counted_as_one(model: Gan, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = arrays(model.generate(range(5)))
    monkeypatch.setattr(model, "most", 2)
    told: list[tuple[int, int]] = []
    cut = model.generate(range(5), progress=lambda *a: told.append(a))
    assert told == [(2, 5), (4, 5), (5, 5)] and np.array_equal(arrays(cut), whole)


def test_psi_zero_is_the_mean_picture_whatever_the_seed(model: Gan, quiet: Gan) -> None:
    mean = gans.statistics()["w_mean"].expand(1, LAYERS, -1)
    made = quiet.generate([1, 2, 3], psi=0)
    assert near(made, [drawn(mean, 0, 0.0)] * 3) and len({m.tobytes() for m in made}) == 1
    assert near(model.generate([1, 2], psi=0), [drawn(mean, 1), drawn(mean, 2)])  # but for the noise


def test_psi_is_the_models_own_unless_told_and_has_a_cutoff(model: Gan) -> None:
    assert model.settings() == {"psi": 0.7, "psi_cutoff": LAYERS}
    assert model.settings(0.5, 2) == {"psi": 0.5, "psi_cutoff": 2}
    own, none, some = (arrays(model.generate([4], **more)) for more in ({}, {"psi": 1}, {"psi": 0.7, "psi_cutoff": 2}))
    assert np.array_equal(own, arrays(model.generate([4], psi=0.7, psi_cutoff=LAYERS)))
    assert np.array_equal(none, arrays(model.generate([4], psi_cutoff=0)))
    ws = torch.cat([truncated(w_of(4))[:, None].expand(-1, 2, -1), w_of(4)[:, None].expand(-1, LAYERS - 2, -1)], 1)
    assert near(model.generate([4], psi=0.7, psi_cutoff=2), [drawn(ws, 4)])
    assert len({a.tobytes() for a in (own, none, some)}) == 3


def test_mixing_takes_the_layers_of_the_other_seed(model: Gan, quiet: Gan) -> None:
    assert np.array_equal(
        arrays(quiet.generate([1, 2], mix=range(LAYERS), mix_seeds=[3])), arrays(quiet.generate([3, 3]))
    )
    ws = truncated(w_of(1))[:, None].repeat(1, LAYERS, 1)
    ws[:, [1, 4]] = truncated(w_of(3))[:, None]
    assert near(model.generate([1], mix=[4, 1], mix_seeds=[3]), [drawn(ws, 1)])  # the noise is the first seed's
    assert np.array_equal(arrays(model.generate([1], mix=[4, 1], mix_seeds=[1])), arrays(model.generate([1])))
    pairs = arrays(model.generate([1, 2], mix=[0], mix_seeds=[3, 4]))
    assert np.array_equal(pairs[1:], arrays(model.generate([2], mix=[0], mix_seeds=[4])))


def test_edits_go_along_directions_in_standard_deviations(model: Gan) -> None:
    known = gans.statistics()
    ws = truncated(w_of(6)) + 2 * known["deviations"][0] * known["directions"][0]
    ws = ws - 1.5 * known["deviations"][2] * known["directions"][2]
    edited = model.generate([6], edit={2: -1.5, 0: 2})
    assert near(edited, [drawn(ws[:, None].expand(-1, LAYERS, -1), 6)])
    assert edited[0].tobytes() == model.generate([6], edit={0: 2, 2: -1.5})[0].tobytes()
    as_it_is = model.generate([6])[0].tobytes()
    assert edited[0].tobytes() != as_it_is
    assert model.generate([6], edit={1: 0})[0].tobytes() == model.generate([6], edit={})[0].tobytes() == as_it_is


@pytest.mark.parametrize("space", ["w", "z"])
def test_a_walk_passes_exactly_through_the_pictures(space: str, quiet: Gan, plain: Gan) -> None:
    seeds = [7, 1, 4]
    for one in (quiet, plain) if space == "z" else (quiet,):
        there = [m.tobytes() for m in one.generate(seeds)]
        frames = [f.tobytes() for f in one.walk(seeds, 10, space)]
        assert len(frames) == len(set(frames)) == 10 and [frames[i] for i in (0, 3, 6)] == there
        ending = [f.tobytes() for f in one.walk(seeds, 9, space, loop=False)]
        assert len(ending) == 9 and [ending[i] for i in (0, 4, 8)] == there
        assert [f.tobytes() for f in one.walk(seeds, 3, space)] == there


def test_a_walk_keeps_the_noise_of_its_first_seed(model: Gan) -> None:
    frames = list(model.walk([7, 1], 6))
    every = range(LAYERS)
    keys = model.generate([7, 7], mix=every, mix_seeds=[7, 1])
    assert [frames[i].tobytes() for i in (0, 3)] == [k.tobytes() for k in keys]
    assert len({f.tobytes() for f in model.walk([7, 7], 6)}) == 1
    edited = next(model.walk([7, 1], 2, psi=0.4, edit={0: 3}))
    assert edited.tobytes() == model.generate([7], psi=0.4, edit={0: 3})[0].tobytes()


def test_cancelling_returns_nothing_and_the_next_request_works(model: Gan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "most", 2)
    done: list[int] = []
    follow: dict[str, Any] = {"progress": lambda n, _: done.append(n), "cancel": lambda: done[-1:] == [4]}
    with pytest.raises(Cancelled, match="after 4 of 9"):
        model.generate(range(9), **follow)
    done.clear()
    frames = []
    with pytest.raises(Cancelled, match="after 4 of 8"):
        for frame in model.walk([1, 2], 8, **follow):
            frames.append(frame)
    assert len(frames) == 4 and len(model.generate()) == 1


WRONG: list[dict[str, Any]] = [
    *({"seeds": v} for v in ([], 5, "5", [-1], [2**64], [0.5], range(1025), [True])),
    *({"psi": v} for v in (math.nan, math.inf, 1e9, "0.7", [1.0], True, 10**400)),
    *({"psi_cutoff": v} for v in (-1, LAYERS + 1, 1.5, "2", True)),
    *({"mix": v, "mix_seeds": [1]} for v in ([], 3, "3", [LAYERS], [-1], [0.5], [True], None)),
    *({"mix": [0], "mix_seeds": v} for v in (None, [], [1, 2, 3], [-1], 7)),
    *({"edit": v} for v in ([0], {3: 1}, {-1: 1}, {"0": 1}, {0: "1"}, {0: math.nan}, {0: 1e9}, "0:1")),
]
WRONG_WALKS: list[dict[str, Any]] = [
    *({"frames": v} for v in (1, 0, -3, 10**9, 2.5, "60", True)),
    *({"seeds": v} for v in ([1], [], range(1025))),
    *({"space": v} for v in ("x", 3, ["w"])),
    {"loop": 1},
    {"psi": "1"},
    {"edit": {9: 1}},
]


def label(wrong: dict[str, Any]) -> str:
    return ", ".join(f"{k}={str(v)[:20]}" for k, v in wrong.items())


@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_WALKS], ids=label)
def test_wrong_requests_are_refused_in_one_line(
    wrong: dict[str, Any], model: Gan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_z", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(RequestError) as error:
        if wrong in WRONG_WALKS:
            model.walk(**{"seeds": [1, 2], "frames": 8, **wrong})
        else:
            model.generate(**{"seeds": [1, 2], **wrong})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_model_without_w_refuses_what_needs_it(plain: Gan) -> None:
    assert plain.settings() == {} and len(plain.generate([1, 2])) == 2
    for name, value in (("psi", 0.7), ("psi_cutoff", 1), ("mix", [0]), ("mix_seeds", [1]), ("edit", {0: 1.0})):
        with pytest.raises(RequestError, match="this model has no w space"):
            plain.generate([1], **{name: value})
    with pytest.raises(RequestError, match="this model has no w space"):
        plain.walk([1, 2], 8, "w")
    assert [f.tobytes() for f in plain.walk([1, 2], 4)] == [f.tobytes() for f in plain.walk([1, 2], 4, "z")]


def test_generating_imports_no_model_code(tmp_path: Path) -> None:
    """A fresh process, in which the architecture and heavy libraries cannot be imported, makes a picture."""
    script = f"""
        import sys
        BANNED = ("fusegen.models.stylegan2", "fusegen.models.dcgan", "fusegen.models.text_to_image",
                  "fusegen.runtime.read.capture", "tokenizers", "av",
                  "transformers", "diffusers", "scipy", "matplotlib")
        class Ban:
            def find_spec(self, name, path=None, target=None):
                if name in BANNED:
                    raise AssertionError(f"{{name}} was imported")
        sys.meta_path.insert(0, Ban())
        import fusegen
        image, = fusegen.load({str(gans.bundle(tmp_path))!r}).generate([7])
        assert image.size == (16, 16)
    """
    root = Path(fusegen.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
