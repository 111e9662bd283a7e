"""packed_conv2d_int8 against the convolution at every level; a sample's bits whatever its batch is; what a plan makes
of a quantized program's 3x3 convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, same_bits
from networks import relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.runtime import api, direct_conv_int8
from fusegen.runtime.backends import cpu
from fusegen.runtime.quantize import codes_of_weight, scale_of_weight

OP = registry.get("packed_conv2d_int8")
FUSED, TAPS = "kernel packed_conv2d_int8 C++", "kernel conv_taps_int8 C++"
LEVELS = library.levels() if library.available() else ()
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
needs_tiles = pytest.mark.skipif("amx" not in LEVELS, reason="this CPU has no AMX")


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def data(shape: tuple[int, ...], outputs: int, stride: int = 1, times: int = 1) -> tuple[Tensor, ...]:
    """x (B, I, H, W) off zero, codes (O, I, 3, 3), scale and bias (O,), and a residual of the output's shape."""
    g = torch.Generator().manual_seed(0)
    x = last(torch.randn(shape, generator=g) + 0.5)
    weight = torch.randn(outputs, shape[1], 3, 3, generator=g) / (9 * shape[1]) ** 0.5
    size = (shape[0], outputs, *(-(-n * times // stride) for n in shape[2:]))
    residual, bias = last(torch.randn(size, generator=g)), torch.randn(outputs, generator=g)
    return x, codes_of_weight(weight), scale_of_weight("w", weight), bias, residual


def convolved(x: Tensor, codes: Tensor, scale: Tensor, *more: Any) -> Tensor:
    taps, sums = torch.ops.fusegen.conv_taps_int8(codes)
    return torch.ops.fusegen.packed_conv2d_int8(x, taps, sums, scale, codes.shape[0], *more)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 24, 12, 20), (3, 67, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3), (2, 129, 8, 8)])
@pytest.mark.parametrize("outputs", [1, 16, 40, 144])
def test_it_is_conv2d_int8_with_the_same_bits_at_every_level(stride: int, shape: tuple[int, ...], outputs: int) -> None:
    x, codes, scale, bias, residual = data(shape, outputs, stride)
    where = ("none", (stride, stride), (1, 1), (1, 1))
    want = registry.get("conv2d_int8").reference(x.double(), codes, scale, bias, residual.double(), *where)
    found = []
    for level in LEVELS:
        with library.forced(level):
            found.append(convolved(x, codes, scale, bias, residual, stride))
    for got in found:
        assert_close("y", got, want, OP.tolerance[torch.float32])
        assert same_bits(got, found[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(2, 24, 6, 10), (3, 67, 7, 9), (1, 64, 1, 2), (2, 70, 8, 8), (1, 40, 21, 43)])
def test_a_doubled_image_gives_the_bits_of_its_upsampling(level: str, shape: tuple[int, ...]) -> None:
    x, codes, scale, bias, residual = data(shape, 40, times=2)
    large = last(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    with library.forced(level):
        want = convolved(large, codes, scale, bias, residual)
        assert same_bits(convolved(x, codes, scale, bias, residual, 1, True), want)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("stride", "doubled"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((5, 48, 19, 23), 80), ((8, 65, 8, 8), 33), ((67, 16, 3, 5), 24), ((2, 32, 3, 70), 64)]
)
def test_bits_do_not_depend_on_threads_or_batch(
    level: str, stride: int, doubled: bool, shape: tuple[int, ...], outputs: int
) -> None:
    x, codes, scale, bias, residual = data(shape, outputs, stride, 2 if doubled else 1)
    x[0] *= 3  # another scale than the others'
    more, threads = (stride, doubled), torch.get_num_threads()
    with library.forced(level):
        whole = convolved(x, codes, scale, bias, residual, *more)
        try:
            for count in (1, 5):
                torch.set_num_threads(count)
                assert same_bits(convolved(x, codes, scale, bias, residual, *more), whole)
        finally:
            torch.set_num_threads(threads)
        for some in (slice(0, 1), slice(1, 2), slice(1, shape[0]), slice(shape[0] - 1, shape[0])):
            got = convolved(last(x[some]), codes, scale, bias, last(residual[some]), *more)
            assert same_bits(got, whole[some])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_stays_in_its_sample(level: str, value: float, dtype: torch.dtype) -> None:
    x, codes, scale, _, _ = data((3, 33, 7, 11), 40)
    x = x.to(dtype)
    with library.forced(level):
        want = convolved(x, codes, scale)
        x[1, 32, 3, 5] = value
        got = convolved(x, codes, scale)
    assert bool(got[1].isnan().all()) and same_bits(got[::2], want[::2])


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_sums_are_exact(level: str) -> None:
    """255 by 127 as often as sums may have it: all of an int32."""
    inputs = 2**16 // 9
    x, codes = last(torch.ones(1, inputs, 3, 3)), torch.full((2, inputs, 3, 3), 127, dtype=torch.int8)
    codes[1] = -127
    with library.forced(level):
        got = convolved(x, codes, torch.ones(2))
    want = torch.tensor([1.0, -1.0]) * inputs * 9 * 127
    assert relative(got[0, :, 1, 1], want) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": 65}, "at most 32 P"),
        ({"x": torch.zeros(1, 65, 4, 4)}, "int8 (P, ceil(I / 64), 3, 3, 16, 32, 4)"),
        ({"x": torch.zeros(8, 4, 4)}, "not (B, I, H, W)"),
        ({"sums": torch.zeros(2, 31).int()}, "int32 (P, 32)"),
        ({"stride": 3}, "the stride is 3"),
        ({"stride": 2, "doubled": True}, "the stride is 2"),
        ({"scale": torch.ones(5)}, "one value for each of 40"),
        ({"bias": torch.ones(5)}, "one value for each of 40"),
        ({"bias": torch.ones(40).half()}, "bias is torch.float16"),
        ({"residual": torch.ones(1, 40, 4, 4), "stride": 2}, "not torch.float32 (1, 40, 2, 3)"),
        ({"residual": torch.ones(1, 40, 4, 5).double()}, "residual is torch.float64"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(1, 8, 4, 5), "taps": torch.zeros(2, 1, 3, 3, 16, 32, 4).char(), "outputs": 40}
    given |= {"sums": torch.zeros(2, 32).int(), "scale": torch.ones(40)}
    with pytest.raises(ValueError) as caught:
        OP.allocate(**given | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_kind_are_refused() -> None:
    for weight in (torch.zeros(3, 3, 1, 1).char(), torch.zeros(3, 3, 3, 3)):
        with pytest.raises(ValueError, match="conv_taps_int8: weight is"):
            torch.ops.fusegen.conv_taps_int8(weight)


class Block(nn.Module):
    """Four convolutions, the last three quantized: with what was added to it, of stride 2, and of what is upsampled."""

    def __init__(self, inner: int = 40, scale: float = 2.0, **options: Any):
        super().__init__()
        self.scale = scale
        self.first, self.second = nn.Conv2d(3, inner, 3, padding=1), nn.Conv2d(inner, inner, 3, padding=1)
        self.down = nn.Conv2d(inner, 96, 3, stride=2, padding=1)
        self.third = nn.Conv2d(96, inner, **{"kernel_size": 3, "padding": 1, **options})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.second(h) + h)
        return torch.tanh(self.third(F.interpolate(torch.tanh(self.down(h)), scale_factor=self.scale, mode="nearest")))


def planned(module: nn.Module, dtype: str = "bfloat16", **more: Any) -> tuple[dict[str, int], Any]:
    """The plan's bindings and the session, once it is as close as int8 can be to the module."""
    x = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    session = api.compile(api.capture(module.eval(), (x,)), dtype=dtype, quantize="int8", **more)
    with torch.no_grad():
        want = module(x)
    for _ in range(2):  # the second run replays what the first one bound
        assert relative(session(x), want) <= 2.5e-2
    return session.plan.counts(), session


def applied(session: Any) -> tuple[int, tuple[str, ...]]:
    """How many convolutions the rule took, and why it left others."""
    found = [a for a in session.plan.applied if a.rule == direct_conv_int8.RULE]
    return sum(a.count for a in found), tuple(line for a in found for line in a.left)


@pytest.fixture
def at_any_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan takes the op at this machine's level, where other kernels may be faster."""
    monkeypatch.setattr(cpu.Cpu, "unpacked_convolutions", lambda self: None)
    monkeypatch.setattr(cpu.Cpu, "no_int8_convolutions", lambda self: None)
    torch.manual_seed(1)


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_quantized_session_has_them(at_any_level: None, dtype: str, deterministic: bool) -> None:
    """With residual and upsampling in it, and nothing quantized for a library any more."""
    counts, session = planned(Block(), dtype, deterministic=deterministic)
    assert counts[FUSED] == counts[TAPS] == 3 and applied(session) == (3, ())
    assert not any(word in k for k in counts for word in ("quantize_uint8", "conv2d_int8 +", "upsample", "add"))
    nodes = [n for n in session.plan.program.nodes if n.op == "fusegen.packed_conv2d_int8.default"]
    assert [n.args["doubled"] for n in nodes] == [False, False, True]
    assert [n.args["residual"] is not None for n in nodes] == [True, False, False]
    assert all(s.phase == "constant" for s in session.plan.steps if s.node.op == "fusegen.conv_taps_int8.default")


@needs_tiles
def test_with_tiles_the_plan_takes_them_and_at_other_levels_says_why_not() -> None:
    for level in LEVELS:
        torch.manual_seed(1)
        with library.forced(level):
            counts, session = planned(Block())
        count, left = applied(session)
        assert counts.get(FUSED, 0) == count == (3 if level == "amx" else 0)
        assert level == "amx" or (len(left) == 1 and left[0].startswith(f"3 convolutions: at level {level} they are"))


@needs_library
def test_it_stays_where_it_was_asked_to_do_without(at_any_level: None) -> None:
    counts, session = planned(Block(), without=["packed_conv2d_int8"])
    count, left = applied(session)
    assert count == 0 and len(left) == 3 and all("it was asked to do without" in line for line in left)
    assert FUSED not in counts and TAPS not in counts


@needs_library
@pytest.mark.parametrize(
    ("more", "served"),
    [
        ({"kernel_size": 1, "padding": 0}, 2),
        ({"stride": (1, 2)}, 2),
        ({"padding": 0}, 2),
        ({"padding": 2, "dilation": 2}, 2),
        ({"stride": 2}, 3),
        ({"scale": 3.0}, 3),
        ({"inner": 24}, 0),
    ],
    ids=str,
)
def test_what_does_not_fit_stays(at_any_level: None, more: dict[str, Any], served: int) -> None:
    counts, session = planned(Block(**more))
    assert counts.get(FUSED, 0) == served == applied(session)[0]
    assert served < 3 or any("upsample" in k for k in counts)  # what is not doubled stays upsampled


@needs_library
def test_convolutions_of_one_weight_share_its_taps(at_any_level: None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.same(torch.tanh(self.same(torch.tanh(self.first(x)))))

    counts, _ = planned(Twice())
    assert counts[FUSED] == 2 and counts[TAPS] == 1
