"""winograd_conv2d_int8 against the convolution, at every level, and what a quantized session makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import same_bits
from networks import relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.runtime import api
from fusegen.runtime.quantize import codes_of_weight, scale_of_weight
from fusegen.runtime.winograd import RULE_INT8

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
registry.ops()
FUSED = "kernel winograd_conv2d_int8 C++"
LEVELS = library.levels() if library.available() else ()
needs_vnni = pytest.mark.skipif("avx512_bf16" not in LEVELS[-1:], reason="plans take it at avx512_bf16 alone")


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, doubled: bool = False
) -> Tensor:
    filters, scale = torch.ops.fusegen.winograd_int8_filters(codes_of_weight(weight), scale_of_weight("w", weight))
    return torch.ops.fusegen.winograd_conv2d_int8(x, filters, scale, weight.shape[0], bias, residual, doubled)


@pytest.mark.parametrize("shape", [(2, 24, 12, 20), (3, 67, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3), (1, 640, 41, 43)])
@pytest.mark.parametrize("outputs", [1, 16, 40, 144])
def test_it_is_the_convolution_with_the_same_bits_at_every_level(shape: tuple[int, ...], outputs: int) -> None:
    """Eight bits a side: 0.7 % of a normal row each, and what the weight's own codes cost."""
    g = torch.Generator().manual_seed(0)
    x, bias = last(torch.randn(shape, generator=g)), torch.randn(outputs, generator=g)
    weight = torch.randn(outputs, shape[1], 3, 3, generator=g) / (9 * shape[1]) ** 0.5
    residual = last(torch.randn(shape[0], outputs, *shape[2:], generator=g))
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    found = []
    for level in LEVELS if shape[1] < 640 else LEVELS[-2:]:
        with library.forced(level):
            found.append(convolved(x, weight, bias, residual))
    assert relative(found[0], want) <= 2e-2
    assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("shape", [(2, 24, 6, 10), (3, 67, 7, 9), (1, 64, 1, 1), (1, 640, 21, 23)])
def test_a_doubled_image_gives_the_bits_of_its_upsampling(shape: tuple[int, ...]) -> None:
    """Points that vanish have no part in a scale, and add zero."""
    g = torch.Generator().manual_seed(0)
    x, bias = last(torch.randn(shape, generator=g)), torch.randn(40, generator=g)
    weight = torch.randn(40, shape[1], 3, 3, generator=g)
    large = last(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    residual = last(torch.randn(shape[0], 40, *large.shape[2:], generator=g))
    for level in LEVELS:
        with library.forced(level):
            want = convolved(large, weight, bias, residual)
            assert same_bits(convolved(x, weight, bias, residual, doubled=True), want)


def test_bits_do_not_depend_on_threads_or_batch() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = last(torch.randn(5, 48, 19, 23, generator=g).bfloat16()), torch.randn(80, 48, 3, 3, generator=g)
    whole, threads = convolved(x, weight), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(convolved(x, weight), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(convolved(last(x[2:3]), weight), whole[2:3])


@pytest.mark.parametrize("value", [1e4, float("inf"), float("nan")])
def test_what_a_pixel_holds_stays_in_its_tiles(value: float) -> None:
    """Pixel (4, 4) is read by the tiles whose outputs begin at rows and columns 2 and 4."""
    g = torch.Generator().manual_seed(0)
    x, weight = last(torch.randn(1, 24, 10, 10, generator=g)), torch.randn(16, 24, 3, 3, generator=g)
    before, x[0, 3, 4, 4] = convolved(x, weight), value
    after = convolved(x, weight)
    changed = (before != after).any(1)[0]
    inside = torch.zeros(10, 10, dtype=torch.bool)
    inside[2:6, 2:6] = True
    assert bool(changed[3:6, 3:6].all()) and not bool((changed & ~inside).any())
    assert value == 1e4 or bool(after[0, :, 3:6, 3:6].isnan().all())


def test_filters_that_fit_are_exact() -> None:
    weight, scale = torch.randint(-31, 32, (5, 6, 3, 3), dtype=torch.int8), torch.rand(5)
    weight[:, :, 1] = weight[:, :, :, 1] = 0  # the inner points' sums of four stay below 127
    filters, own = torch.ops.fusegen.winograd_int8_filters(weight, scale)
    g = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]).double()
    want = torch.einsum("ak,oikl,bl->aboi", g, weight.double(), g) * scale.double()[:, None]
    codes = filters[0].double().permute(0, 1, 3, 2, 4).flatten(3)[:, :, :5, :6] - 128
    assert relative(codes * own[0].double()[:, :, :5, None], want) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, f, s: (x, f, s, 33), "are not"),
        (lambda x, f, s: (x, f.to(torch.int8), s, 32), "are not"),
        (lambda x, f, s: (x, f, s[:, :, :, :5], 32), "are not"),
        (lambda x, f, s: (x, f, s, 32, torch.zeros(31)), "bias"),
        (lambda x, f, s: (x, f, s, 32, None, torch.zeros(1, 32, 4, 5)), "residual"),
    ],
    ids=["outputs", "dtype", "scale", "bias", "residual"],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    x, filters, scale = torch.zeros(1, 16, 4, 4), torch.zeros(1, 4, 4, 4, 32, 4).byte(), torch.zeros(1, 4, 4, 32)
    with pytest.raises(ValueError, match=f"winograd_conv2d_int8: .*{message}"):
        torch.ops.fusegen.winograd_conv2d_int8(*change(x, filters, scale))
    with pytest.raises(ValueError, match="winograd_int8_filters: weight"):
        torch.ops.fusegen.winograd_int8_filters(torch.zeros(3, 3, 1, 1).char(), torch.zeros(3))
    with pytest.raises(ValueError, match="winograd_int8_filters: scale"):
        torch.ops.fusegen.winograd_int8_filters(torch.zeros(3, 3, 3, 3).char(), torch.zeros(2))


class Block(nn.Module):
    """Three convolutions, the last two quantized, the last one as the options say, with what was added to it."""

    def __init__(self, inner: int = 64, **options: int):
        super().__init__()
        self.first = nn.Conv2d(3, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, inner, 3, padding=1)
        self.third = nn.Conv2d(inner, inner, **{"kernel_size": 3, "padding": 1, **options})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        y = self.third(torch.tanh(self.second(h)))
        return torch.tanh(y + h if y.shape == h.shape else y)


def planned(module: nn.Module, dtype: str = "bfloat16", **more: object) -> tuple[dict[str, int], list[str]]:
    """The plan's bindings and why the rule left a match, once the session is as close as int8 can be to the module."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 11)
    session = api.compile(api.capture(module.eval(), (x,)), dtype=dtype, quantize="int8", **more)
    with torch.no_grad():
        want = module(x)
    for _ in range(2):  # the second run replays what the first one bound
        assert relative(session(x), want) <= 2.5e-2
    return session.plan.counts(), [line for a in session.plan.applied if a.rule == RULE_INT8 for line in a.left]


@needs_vnni
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_quantized_session_takes_it(dtype: str, deterministic: bool) -> None:
    """With the residual added in it; and nothing is quantized for a library any more."""
    torch.manual_seed(0)
    counts, left = planned(Block(), dtype, deterministic=deterministic)
    assert counts[FUSED] == counts["kernel winograd_int8_filters C++"] == 2 and left == []
    assert not any("quantize_uint8" in k or "onednn conv2d_int8" in k or "add" in k for k in counts)


@needs_vnni
def test_where_products_are_not_faster_the_plan_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusegen.kernels.cpu import winograd_conv2d_int8

    with library.forced("avx512"):
        counts, left = planned(Block())
    assert FUSED not in counts and len(left) == 2 and "at level avx512 they are oneDNN's" in left[0]
    monkeypatch.setattr(winograd_conv2d_int8, "FEW_TILES", 1000)
    monkeypatch.setattr(winograd_conv2d_int8, "MANY_FILTERS", 1)
    counts, left = planned(Block())
    assert FUSED not in counts and len(left) == 2 and "tiles are too few" in left[0]


@needs_vnni
def test_few_channels_stay() -> None:
    assert planned(Block(48))[0].get(FUSED, 0) == 0


@needs_vnni
@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 0}, {"padding": 2, "dilation": 2}],
    ids=["stride", "no padding", "dilation"],
)
def test_other_convolutions_stay(options: dict[str, int]) -> None:
    counts, left = planned(Block(**options))
    assert counts[FUSED] == 1 and counts["kernel quantize_uint8 C++"] == 1 and left == []


class Larger(nn.Module):
    """A convolution of what is upsampled, by twice or as the options say."""

    def __init__(self, **options: float):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 64, 3, padding=1)
        self.options = options or {"scale_factor": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(F.interpolate(torch.tanh(self.first(x)), mode="nearest", **self.options)))


@needs_vnni
def test_an_upsampling_by_two_is_done_in_it() -> None:
    torch.manual_seed(0)
    counts, left = planned(Larger())
    assert counts[FUSED] == 1 and left == []
    assert not any("upsample" in k or "quantize_uint8" in k for k in counts)


@needs_vnni
def test_another_upsampling_is_not() -> None:
    torch.manual_seed(0)
    counts, left = planned(Larger(scale_factor=3.0))
    assert counts[FUSED] == 1 and left == []
    assert any("upsample" in k for k in counts)


@pytest.mark.parametrize("level", LEVELS)
def test_an_upsampling_by_two_elsewhere_is_quantized_as_it_comes(level: str) -> None:
    torch.manual_seed(0)
    with library.forced(level):
        counts, _ = planned(Larger())
    assert (counts.get(FUSED, 0) == 1) == (level == "avx512_bf16")


@needs_vnni
def test_convolutions_of_one_input_and_weight_share_what_is_made_of_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
            self.down = nn.Conv2d(64, 64, 3, padding=1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.down(h) + self.same(self.same(h))[..., ::2, ::2]

    counts, _ = planned(Twice())
    assert counts[FUSED] == 2 and counts["kernel winograd_int8_filters C++"] == 1
    assert counts["kernel quantize_uint8 C++"] == 1  # for the other convolution of that input


@needs_vnni
def test_a_sample_is_its_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    program = api.capture(Block().eval(), (x,), dynamic={"x": {0: ("batch", 1, 8)}})
    session = api.compile(program, dtype="bfloat16", quantize="int8", deterministic=True)
    assert torch.equal(session(x)[1:], session(x[1:]))
