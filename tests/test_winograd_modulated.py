"""winograd_modulated_conv2d against the ops it stands for, at every level, and what a session makes of a generator."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, run_fenced, truth
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.op import Tolerance
from fusegen.models.stylegan2 import StyleGAN2Config, Synthesis
from fusegen.runtime import api
from fusegen.runtime.winograd_modulated import RULE

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
registry.ops()
OP = registry.get("winograd_modulated_conv2d")
FUSED = "kernel winograd_modulated_conv2d C++"
LEVELS = library.levels() if library.available() else ()


def arguments(up: bool, shape: tuple[int, ...], outputs: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    make = lambda *sizes: torch.randn(sizes, generator=g)  # noqa: E731
    b, i, h, w = shape
    made = {"x": make(*shape), "weight": make(outputs, i, 3, 3) / 10, "styles": 1 + 0.5 * make(b, i)}
    return made | {
        "taps": (1 + torch.rand(4, 4, generator=g)) / 6,
        "noise": make(b, 1, h << up, w << up),
        "bias": make(outputs),
    }


def one_by_one(a: dict[str, Tensor], up: bool) -> Tensor:
    """The layer as the exported graph has it, in float64."""
    ops, a = torch.ops.fusegen, {k: v.double() for k, v in a.items()}
    if not up:
        y = ops.modulated_conv2d(a["x"], a["weight"], a["styles"], None, None, True, 1, (1, 1))
    else:
        y = ops.modulated_conv2d(a["x"], a["weight"], a["styles"], None, None, True, 2, (0, 0))
        y = ops.upfirdn2d(y, a["taps"], (1, 1), (1, 1), (1, 1, 1, 1), True)
    return ops.bias_act(y + a["noise"], a["bias"], 1, "lrelu", None, None, 6.0)


def at_once(a: dict[str, Tensor], up: bool) -> Tensor:
    weight = a["weight"]
    filters, squares = torch.ops.fusegen.winograd_filters(weight, up), weight.float().square().sum((2, 3))
    rest = (a["taps"] if up else None, a["noise"], a["bias"], "lrelu", None, None, 6.0)
    return torch.ops.fusegen.winograd_modulated_conv2d(a["x"], filters, squares, a["styles"], weight.shape[0], *rest)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 12, 20), (3, 17, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3)])
@pytest.mark.parametrize("outputs", [1, 16, 40])
def test_it_is_the_layer(level: str, up: bool, shape: tuple[int, ...], outputs: int) -> None:
    a = arguments(up, shape, outputs)
    want = one_by_one(a, up)
    with library.forced(level):
        last = a | {"x": a["x"].contiguous(memory_format=torch.channels_last)}
        assert_close("channels-last", at_once(last, up), want, OP.tolerance[torch.float32])
    assert_close("reference", at_once({k: v.double() for k, v in a.items()}, up), want, Tolerance(1e-6, 1e-6))


@pytest.mark.parametrize("level", LEVELS)
def test_filters_in_float32_round_what_comes_out_alone(level: str) -> None:
    """The op's bound in bfloat16 is that of filters in pairs; the others keep the one of a single rounding."""
    for case in (c for c in OP.cases if torch.bfloat16 in c.dtypes and not c.bench):
        args = case.build(torch.Generator().manual_seed(2024), torch.bfloat16)
        kernel = next((k for k in OP.kernels if k.device == "cpu"), None)
        with library.forced(level):
            if args[1].dtype != torch.float32 or kernel is None or kernel.decline(*args) is not None:
                continue
            (got,) = run_fenced(OP, kernel, args).values()
        assert_close(f"{case.name} at {level}", got, truth(OP, args)["output 0"], Tolerance(rms=4e-3, peak=4.2e-3))


def test_bits_do_not_depend_on_threads_or_batch() -> None:
    a = arguments(True, (5, 48, 19, 23), 80)
    a["x"] = a["x"].contiguous(memory_format=torch.channels_last)
    whole, threads = at_once(a, True), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(at_once(a, True), whole)
    finally:
        torch.set_num_threads(threads)
    own = {k: v[2:3] if k in ("x", "styles", "noise") else v for k, v in a.items()}
    own["x"] = own["x"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(at_once(own, True), whole[2:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": 33}, "are not"),
        ({"styles": torch.ones(1, 15)}, "styles"),
        ({"squares": torch.ones(16, 32)}, "squares"),
        ({"taps": torch.ones(3, 3)}, "taps"),
        ({"taps": torch.ones(4, 4), "filters": torch.zeros(1, 8, 3, 3, 32, 2)}, "not in pairs"),
        ({"noise": torch.ones(1, 1, 8, 8)}, "noise"),
        ({"bias": torch.ones(31)}, "bias"),
        ({"act": "mish"}, "no activation"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    args = {"x": torch.zeros(1, 16, 4, 4), "filters": torch.zeros(6, 6, 2, 16, 16), "squares": torch.ones(32, 16)}
    args |= {"styles": torch.ones(1, 16), "outputs": 32, "taps": None, "noise": None, "bias": None, "act": "linear"}
    with pytest.raises(ValueError, match=message):
        OP.allocate(*(args | change).values())


CFG = StyleGAN2Config(32, w_width=8, channels=(20, 18, 17, 16))


def planned(cfg: StyleGAN2Config, batch: int, **more: object) -> tuple[dict[str, int], list[str]]:
    """The plan's bindings and why the rule left a layer, once the session gives what the module gives."""
    torch.manual_seed(0)
    net = Synthesis(cfg)
    for name, p in net.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            torch.nn.init.normal_(p, std=0.3)
    inputs = [torch.randn(batch, cfg.layers, cfg.w_width), *(torch.randn(shape) for shape in cfg.noises(batch))]
    session = api.compile(api.capture(net, tuple(inputs)), **more)
    with torch.no_grad():
        want = net(*inputs)
    bound = 3e-2 if more.get("dtype") == "bfloat16" else 1e-5
    for _ in range(2):  # the second run replays what the first one bound
        assert float((session(*inputs) - want).norm() / want.norm()) <= bound
    return session.plan.counts(), [line for a in session.plan.applied if a.rule == RULE for line in a.left]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("clamp", [None, 256.0])
def test_a_generator_takes_it_for_every_layer(batch: int, deterministic: bool, clamp: float | None) -> None:
    """Seven layers: after the first, channels-last from one to the next, without a copy between."""
    cfg = StyleGAN2Config(32, w_width=8, channels=(20, 18, 17, 16), clamp=clamp)
    counts, left = planned(cfg, batch, dtype="float32", deterministic=deterministic)
    assert counts[FUSED] == 7 and left == []
    assert counts["kernel upfirdn2d C++"] == 3 and "kernel bias_act C++" not in counts
    assert counts["aten aten.clone.default"] == 1
    assert counts["kernel modulated_conv2d C++"] == 4  # to RGB


def test_bfloat16_keeps_transposed_convolutions_of_few_pixels_where_the_cpu_has_products_of_it(monkeypatch) -> None:
    from fusegen.kernels.cpu import winograd_modulated_conv2d as launcher

    if "avx512_bf16" not in LEVELS:
        pytest.skip("needs products of bfloat16")
    every = ("avx512_bf16", launcher.LEAST, launcher.MANY, 7)
    for level, least, many, taken in (
        every,
        ("avx512_bf16", 0, 17, 6),
        ("avx512_bf16", 0, 17**2, 4),
        ("avx512", 0, 17**2, 7),
    ):
        monkeypatch.setattr(launcher, "LEAST", least)
        monkeypatch.setattr(launcher, "MANY", many)
        with library.forced(level):
            counts, left = planned(CFG, 1, dtype="bfloat16")
        assert counts[FUSED] == taken and len(left) == 7 - taken and all("bfloat16" in line for line in left)
        assert counts.get("kernel conv_taps C++", 0) == (4 if level == "avx512_bf16" else 0)


def test_where_no_kernel_takes_it_the_plan_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusegen.kernels.cpu import winograd_conv2d

    monkeypatch.setattr(winograd_conv2d, "MOST_FILTERS", 1)
    counts, left = planned(CFG, 1, dtype="float32")
    assert FUSED not in counts and len(left) == 7 and all("MiB" in line for line in left)


def test_few_channels_stay() -> None:
    cfg = StyleGAN2Config(8, w_width=8, channels=(8, 8))
    counts, left = planned(cfg, 1, dtype="float32")
    assert FUSED not in counts and left == []
