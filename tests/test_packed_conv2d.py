"""packed_conv2d against the convolution at every level; a sample's bits whatever its batch is; what a plan makes of
3x3 convolutions in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, same_bits
from networks import plainly, relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.runtime import api, direct_conv, stored, winograd
from fusegen.runtime.backends import cpu

OP = registry.get("packed_conv2d")
FUSED = "kernel packed_conv2d C++"
LEVELS = library.levels() if library.available() else ()
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
needs_tiles = pytest.mark.skipif("amx" not in LEVELS, reason="this CPU has no AMX")


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def data(shape: tuple[int, ...], outputs: int, stride: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, I, H, W), weight (O, I, 3, 3), bias (O,) in float32, and a residual of the output's shape."""
    g = torch.Generator().manual_seed(0)
    x = last(torch.randn(shape, generator=g).bfloat16())
    weight = (torch.randn(outputs, shape[1], 3, 3, generator=g) / (9 * shape[1]) ** 0.5).bfloat16()
    size = (shape[0], outputs, *(-(-n // stride) for n in shape[2:]))
    residual = last(torch.randn(size, generator=g).bfloat16())
    return x, weight, torch.randn(outputs, generator=g), residual


def convolved(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
    return torch.ops.fusegen.packed_conv2d(x, torch.ops.fusegen.conv_taps(weight), weight.shape[0], *more)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 24, 12, 20), (3, 37, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3), (2, 70, 8, 8)])
@pytest.mark.parametrize("outputs", [1, 16, 40, 144])
def test_it_is_the_convolution(level: str, stride: int, shape: tuple[int, ...], outputs: int) -> None:
    x, weight, bias, residual = data(shape, outputs, stride)
    for offset in (bias, bias.bfloat16()):
        want = F.conv2d(x.double(), weight.double(), offset.double(), stride, 1) + residual.double()
        with library.forced(level):
            got = convolved(x, weight, offset, residual, stride)
        assert_close("y", got, want, OP.tolerance[x.dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "outputs"), [((5, 48, 19, 23), 80), ((7, 65, 8, 8), 33), ((2, 32, 3, 70), 64)])
def test_bits_do_not_depend_on_threads_or_batch(level: str, stride: int, shape: tuple[int, ...], outputs: int) -> None:
    x, weight, bias, residual = data(shape, outputs, stride)
    threads = torch.get_num_threads()
    with library.forced(level):
        whole = convolved(x, weight, bias, residual, stride)
        try:
            for count in (1, 5):
                torch.set_num_threads(count)
                assert same_bits(convolved(x, weight, bias, residual, stride), whole)
        finally:
            torch.set_num_threads(threads)
        for some in (slice(0, 1), slice(1, 2), slice(1, shape[0])):
            assert same_bits(convolved(last(x[some]), weight, bias, last(residual[some]), stride), whole[some])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "shape", [(2, 24, 12, 20), (3, 37, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3), (2, 70, 8, 8), (1, 16, 3, 67)]
)
@pytest.mark.parametrize("outputs", [1, 40, 144])
def test_it_is_the_convolution_of_the_upsampled_image(level: str, shape: tuple[int, ...], outputs: int) -> None:
    """By weights of so few bits that phases, sums of up to four of them, are not rounded."""
    x, weight, bias, _ = data(shape, outputs)
    weight = (weight * 64).round().clamp(-31, 31) / 64
    image = F.interpolate(x, scale_factor=2.0, mode="nearest")
    residual = last(
        torch.randn((shape[0], outputs, *image.shape[2:]), generator=torch.Generator().manual_seed(1)).bfloat16()
    )
    want = F.conv2d(image.double(), weight.double(), bias.double(), 1, 1) + residual.double()
    with library.forced(level):
        got = doubled(x, weight, bias, residual)
        assert_close("y", got, want, OP.tolerance[x.dtype])
        assert same_bits(doubled(last(x[-1:]), weight, bias, last(residual[-1:])), got[-1:])


def doubled(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    taps = torch.ops.fusegen.conv_taps(weight, True)
    return torch.ops.fusegen.packed_conv2d(x, taps, weight.shape[0], bias, residual, 1, True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inputs", [1, 16, 31, 33])
def test_a_pixel_reads_its_neighbours_alone(level: str, inputs: int) -> None:
    """One infinity in a sample's middle: the 3 x 3 pixels around it are not finite, all others have the same bits."""
    x, weight, _, _ = data((3, inputs, 7, 11), 40)
    weight[weight == 0] = 1
    want = x.clone(memory_format=torch.channels_last)
    x[1, inputs - 1, 3, 5] = float("inf")
    with library.forced(level):
        got, want = convolved(x, weight), convolved(want, weight)
    near = torch.zeros(3, 40, 7, 11, dtype=torch.bool)
    near[1, :, 2:5, 4:7] = True
    assert not got[near].isfinite().any() and same_bits(got[~near], want[~near])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": 65}, "at most 32 P"),
        ({"x": torch.zeros(1, 9, 4, 4)}, "taps (2, 4, 3, 3, 32, 2)"),
        ({"doubled": True}, "taps (2, 4, 3, 3, 32, 2)"),
        ({"doubled": True, "stride": 2}, "x is doubled"),
        ({"x": torch.zeros(8, 4, 4)}, "not (B, I, H, W)"),
        ({"stride": 3}, "neither 1 nor 2"),
        ({"bias": torch.ones(5)}, "bias is torch.float32 (5,)"),
        ({"bias": torch.ones(40).half()}, "bias is torch.float16"),
        ({"residual": torch.ones(1, 40, 4, 4), "stride": 2}, "not torch.float32 (1, 40, 2, 3)"),
        ({"residual": torch.ones(1, 40, 4, 5).double()}, "residual is torch.float64"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(1, 8, 4, 5), "taps": torch.zeros(2, 4, 3, 3, 32, 2), "outputs": 40}
    with pytest.raises(ValueError) as caught:
        OP.allocate(**given | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Block(nn.Module):
    """A residual block behind a first convolution of few channels, and one of stride 2; ``options`` change the block's
    second convolution, ``act`` what stands behind it."""

    def __init__(self, inner: int = 40, act: bool = False, **options: Any):
        super().__init__()
        self.act = act
        self.enter, self.one = nn.Conv2d(3, inner, 3, padding=1), nn.Conv2d(inner, inner, 3, padding=1)
        self.two = nn.Conv2d(inner, inner, **{"kernel_size": 3, "padding": 1, **options})
        self.norm, self.down = nn.GroupNorm(4, inner), nn.Conv2d(inner, 48, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.two(F.silu(self.norm(self.one(F.silu(x)))))
        y = F.relu(y) if self.act else y
        return self.down(y + x if y.shape == x.shape else y)


def image(batch: int, side: int = 9) -> Tensor:
    return torch.randn(batch, 3, side, side + 2, generator=torch.Generator().manual_seed(3))


def session(more: dict[str, Any] | None = None, **given: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(1)
    module = Block(**more or {}).eval()
    dynamic = None if more else {"x": {0: ("batch", 1, 64), 2: ("side", 3, 64)}}
    program = api.capture(module, (image(2),), dynamic=dynamic)
    return api.compile(program, **{"dtype": "bfloat16", **given}), module


def applied(plan: Any) -> tuple[int, tuple[str, ...]]:
    """How many convolutions the rule took, and why it left others."""
    found = [a for a in plan.applied if a.rule == direct_conv.RULE]
    return sum(a.count for a in found), tuple(line for a in found for line in a.left)


@pytest.fixture
def at_any_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan takes the op at this machine's level, where other kernels may be faster, Winograd's algorithm left out."""
    monkeypatch.setattr(cpu.Cpu, "unpacked_convolutions", lambda self: None)
    monkeypatch.delitem(winograd._FORMS, torch.bfloat16)


@needs_library
def test_a_session_has_them(at_any_level: None) -> None:
    made, module = session()
    for height in (9, 12):
        x = torch.randn(2, 3, height, 11, generator=torch.Generator().manual_seed(height))
        for _ in range(2):  # the second run replays what the first one bound
            assert relative(made(x), plainly(module, x)) <= 2e-2
        assert made.plan.counts()[FUSED] == 3 and applied(made.plan) == (3, ())
    assert sum("conv_taps" in request for request in made.weights.made) == 3  # for both captures
    residuals = [s.node.args["residual"] is not None for s in made.plan.steps if s.binding.name == "packed_conv2d C++"]
    assert sorted(residuals) == [False, False, True]


@needs_tiles
def test_with_tiles_the_plan_takes_them_and_at_other_levels_says_why_not() -> None:
    for level in LEVELS:
        with library.forced(level):
            made, module = session()
            assert relative(made(image(2)), plainly(module, image(2))) <= 2e-2
        count, left = applied(made.plan)
        assert made.plan.counts().get(FUSED, 0) == count == (3 if level == "amx" else 0)
        if level == "avx512_bf16":
            assert left == ("1 convolutions: at level avx512_bf16 they are Winograd's or oneDNN's",)
        elif level != "amx":
            assert left == (f"3 convolutions: at level {level} they are oneDNN's",)


@needs_tiles
def test_float32_is_not_for_it() -> None:
    with library.forced("amx"):
        made, _ = session(dtype="float32")
        made(image(2))
    assert applied(made.plan) == (0, ()) and FUSED not in made.plan.counts()


@needs_library
def test_taps_are_made_of_what_is_stored_and_the_weight_is_held_once(at_any_level: None) -> None:
    """To the bit what a copy in bfloat16 gives, without one."""
    made, _ = session()
    got = made(image(2))
    steps = [s for s in made.plan.steps if s.node.op == "fusegen.conv_taps.default"]
    assert len(steps) == 3 and all(s.binding.name == "conv_taps C++" and s.phase == "constant" for s in steps)
    for step in steps:
        assert {made.plan.program.weights[name].dtype for name in step.node.inputs()} == {torch.float32}
    readers = [n.op for n in made.plan.program.nodes for s in steps if set(n.inputs()) & set(s.node.inputs())]
    assert readers == ["fusegen.conv_taps.default"] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "folded", lambda program: program)
        assert torch.equal(session()[0](image(2)), got)


@needs_library
def test_a_deterministic_plan_does_not_cut_the_batch(at_any_level: None) -> None:
    made, _ = session(deterministic=True)
    whole = made(image(5))
    cut = [s.node.name for s in made.plan.steps if s.binding.by_sample]
    assert made.plan.counts()[FUSED] == 3 and len(cut) == 1  # the first convolution alone
    assert torch.equal(made(image(5)[:1])[0], whole[0]) and torch.equal(made(image(5)[2:4]), whole[2:4])


@needs_library
def test_it_stays_where_it_was_asked_to_do_without(at_any_level: None) -> None:
    made, module = session(without=["packed_conv2d"])
    assert relative(made(image(2)), plainly(module, image(2))) <= 2e-2
    count, left = applied(made.plan)
    assert count == 0 and len(left) == 3 and all("packed_conv2d: it was asked to do without" in line for line in left)
    assert not any("conv_taps" in name for name in made.plan.counts())


@needs_library
@pytest.mark.parametrize(
    ("more", "served"),
    [
        ({"kernel_size": 1, "padding": 0}, 2),
        ({"stride": 2}, 3),
        ({"stride": (1, 2)}, 2),
        ({"padding": 0}, 2),
        ({"groups": 4}, 2),
        ({"padding": 2, "dilation": 2}, 2),
        ({"act": True}, 2),
        ({"inner": 24}, 0),
    ],
    ids=str,
)
def test_what_does_not_fit_stays(at_any_level: None, more: dict[str, Any], served: int) -> None:
    made, module = session(more)
    assert relative(made(image(2)), plainly(module, image(2))) <= 2e-2
    assert made.plan.counts().get(FUSED, 0) == served and applied(made.plan) == (served, ())
