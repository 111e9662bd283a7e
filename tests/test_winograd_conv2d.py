"""winograd_conv2d against the convolution it stands for, at every level, and what a session makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.op import Tolerance
from fusegen.runtime import api
from fusegen.runtime.winograd import RULE

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
registry.ops()
FUSED = "kernel winograd_conv2d C++"
FORMS = ("winograd_filters", "winograd_taps")
LEVELS = library.levels() if library.available() else ()
needs_pairs = pytest.mark.skipif("avx512_bf16" not in LEVELS[-1:], reason="bfloat16 is served at avx512_bf16 alone")


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    doubled: bool = False,
    form: str = "winograd_filters",
) -> Tensor:
    filters = getattr(torch.ops.fusegen, "conv_taps" if weight.dtype == torch.bfloat16 else form)(weight)
    return torch.ops.fusegen.winograd_conv2d(x, filters, weight.shape[0], bias, residual, doubled)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 24, 14, 20), (3, 17, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3), (2, 150, 5, 9)])
@pytest.mark.parametrize("outputs", [1, 16, 40, 144])
def test_it_is_the_convolution(level: str, form: str, shape: tuple[int, ...], outputs: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, shape[1], 3, 3, generator=g) / 10, torch.randn(outputs, generator=g)
    residual = torch.randn(shape[0], outputs, *shape[2:], generator=g).contiguous(memory_format=torch.channels_last)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    with library.forced(level):
        got = convolved(x, weight, bias, residual, form=form)
    assert_close("y", got, want, registry.get("winograd_conv2d").tolerance[torch.float32])


@needs_pairs
@pytest.mark.parametrize("shape", [(2, 24, 12, 20), (3, 37, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3), (1, 640, 41, 43)])
@pytest.mark.parametrize("outputs", [1, 16, 40, 144])
def test_in_bfloat16_it_is_the_convolution(shape: tuple[int, ...], outputs: int) -> None:
    """The op's tolerance is for given filters; here their own rounding comes on top.  The last is in several parts."""
    g = torch.Generator().manual_seed(0)
    x = last(torch.randn(shape, generator=g).bfloat16())
    weight = (torch.randn(outputs, shape[1], 3, 3, generator=g) / (9 * shape[1]) ** 0.5).bfloat16()
    residual = last(torch.randn(shape[0], outputs, *shape[2:], generator=g).bfloat16())
    bound = registry.get("winograd_conv2d").tolerance[torch.bfloat16]
    for bias in (torch.randn(outputs, generator=g), torch.randn(outputs, generator=g).bfloat16()):
        want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
        got = convolved(x, weight, bias, residual)
        assert_close("y", got, want, Tolerance(1.5 * bound.rms, 1.5 * bound.peak))


@needs_pairs
@pytest.mark.parametrize("shape", [(2, 24, 6, 10), (3, 37, 3, 5), (1, 64, 1, 1), (1, 640, 21, 11)])
@pytest.mark.parametrize("outputs", [1, 40])
def test_a_doubled_image_is_upsampled_first(shape: tuple[int, ...], outputs: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = last(torch.randn(shape, generator=g).bfloat16())
    weight = (torch.randn(outputs, shape[1], 3, 3, generator=g) / (9 * shape[1]) ** 0.5).bfloat16()
    bias = torch.randn(outputs, generator=g).bfloat16()
    residual = last(torch.randn(shape[0], outputs, 2 * shape[2], 2 * shape[3], generator=g).bfloat16())
    large = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    want = F.conv2d(large, weight.double(), bias.double(), padding=1) + residual.double()
    bound = registry.get("winograd_conv2d").tolerance[torch.bfloat16]
    assert_close("y", convolved(x, weight, bias, residual, True), want, Tolerance(1.5 * bound.rms, 1.5 * bound.peak))


@needs_pairs
@pytest.mark.parametrize("doubled", [False, True])
def test_few_tiles_have_the_bits_of_many(doubled: bool) -> None:
    """Filters are made in parts for 512 tiles and fewer, all at once for more: of the same taps, added in order."""
    g = torch.Generator().manual_seed(0)
    x = last(torch.randn(9, 300, 16, 16, generator=g).bfloat16())
    weight = (torch.randn(70, 300, 3, 3, generator=g) / 50).bfloat16()
    assert torch.equal(convolved(x, weight, doubled=doubled)[:1], convolved(last(x[:1]), weight, doubled=doubled))


@pytest.mark.parametrize(
    ("dtype", "form"),
    [*((torch.float32, form) for form in FORMS), pytest.param(torch.bfloat16, "conv_taps", marks=needs_pairs)],
)
def test_bits_do_not_depend_on_threads_or_batch(dtype: torch.dtype, form: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = last(torch.randn(5, 48, 19, 23, generator=g).to(dtype))
    weight, threads = torch.randn(80, 48, 3, 3, generator=g).to(dtype), torch.get_num_threads()
    whole = convolved(x, weight, form=form)
    try:
        torch.set_num_threads(1)
        assert torch.equal(convolved(x, weight, form=form), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(convolved(last(x[2:3]), weight, form=form), whole[2:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, f: (x, f, 33), "are not"),
        (lambda x, f: (x, f, 32, torch.zeros(31)), "bias"),
        (lambda x, f: (x, f, 32, None, torch.zeros(1, 32, 4, 5)), "residual"),
        (lambda x, f: (x[0], f, 32), "are not"),
    ],
    ids=["outputs", "bias", "residual", "rank"],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    x, filters = torch.zeros(1, 16, 4, 4), torch.zeros(6, 6, 2, 16, 16)
    with pytest.raises(ValueError, match=f"winograd_conv2d: .*{message}"):
        torch.ops.fusegen.winograd_conv2d(*change(x, filters))
    for name in ("winograd_filters", "winograd_taps", "conv_taps"):
        with pytest.raises(ValueError, match=name):
            getattr(torch.ops.fusegen, name)(torch.zeros(3, 3, 1, 1))


class Block(nn.Module):
    """Two convolutions, the second one as the options say, and what was added to it."""

    def __init__(self, inner: int = 24, residual: bool = True, **options: int):
        super().__init__()
        self.residual = residual
        self.first = nn.Conv2d(3, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, inner, **{"kernel_size": 3, "padding": 1, **options})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        y = self.second(h)
        return torch.tanh(y + h if self.residual else y)


def planned(module: nn.Module, bound: float = 1e-5, **more: object) -> tuple[dict[str, int], list[str]]:
    """The plan's bindings and why the rule left a match, once the session gives what the module gives."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 11)
    session = api.compile(api.capture(module.eval(), (x,)), **more)
    with torch.no_grad():
        want = module(x)
    for _ in range(2):  # the second run replays what the first one bound
        assert float((session(x) - want).norm() / want.norm()) <= bound
    return session.plan.counts(), [line for a in session.plan.applied if a.rule == RULE for line in a.left]


@pytest.mark.parametrize("residual", [True, False])
def test_a_session_takes_it_for_float32(residual: bool) -> None:
    counts, left = planned(Block(residual=residual))
    assert counts[FUSED] == 1 and left == []


def test_a_session_whose_bits_are_to_be_a_samples_own_takes_it() -> None:
    assert planned(Block(), deterministic=True)[0][FUSED] == 1


@needs_pairs
def test_a_session_takes_it_for_bfloat16() -> None:
    counts, left = planned(Block(), 2e-2, dtype="bfloat16")
    assert counts[FUSED] == counts["kernel conv_taps C++"] == 1 and left == []
    with library.forced("avx512"):
        counts, left = planned(Block(), 2e-2, dtype="bfloat16")
    assert FUSED not in counts and "the level avx512 has no products of bfloat16" in left[0]


@needs_pairs
@pytest.mark.parametrize(
    ("shape", "outputs", "served"), [((2, 1280, 4, 4), 1280, True), ((1, 1280, 4, 4), 1280, False)]
)
def test_where_bfloat16_would_be_slower_it_is_declined(shape: tuple[int, ...], outputs: int, served: bool) -> None:
    x = last(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    weight = torch.empty(outputs, shape[1], 3, 3, dtype=torch.bfloat16, device="meta")
    (filters,) = registry.get("conv_taps").allocate(weight)
    picked = registry.pick(registry.get("winograd_conv2d"), "cpu", (x, filters, outputs, None, None, False))
    assert (picked.kernel is not None) == served and bool(picked.declined) != served


def test_it_stays_where_it_was_asked_to_do_without() -> None:
    counts, left = planned(Block(), without=["winograd_conv2d"])
    assert FUSED not in counts and "winograd_conv2d: it was asked to do without" in left[0]
    assert not any("winograd" in name for name in counts)  # nor are its filters made


def test_few_channels_stay() -> None:
    assert FUSED not in planned(Block(8))[0]
    assert FUSED not in planned(Block(16), 2e-2, dtype="bfloat16")[0]


@needs_pairs
def test_two_shapes_of_a_session_share_the_filters() -> None:
    torch.manual_seed(0)
    program = api.capture(Block().eval(), (torch.randn(2, 3, 9, 11),), dynamic={"x": {2: "height"}})
    session = api.compile(program, dtype="bfloat16")
    found = set()
    for height in (9, 12):
        session(torch.randn(2, 3, height, 11))
        capture = next(reversed(session._captures.values()))
        node = next(n for n in capture.plan.program.nodes if n.op == "fusegen.winograd_conv2d.default")
        found.add(capture.value(node.args["filters"].name).data_ptr())
    assert len(found) == 1


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 1, "padding": 0}, {"stride": 2}, {"padding": 0}, {"groups": 4}, {"padding": 2, "dilation": 2}],
    ids=["1x1", "stride", "no padding", "groups", "dilation"],
)
def test_other_convolutions_stay(options: dict[str, int]) -> None:
    assert FUSED not in planned(Block(residual=False, **options))[0]


def test_where_no_kernel_takes_it_the_plan_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusegen.kernels.cpu import winograd_conv2d

    monkeypatch.setattr(winograd_conv2d, "MOST_FILTERS", 1)
    monkeypatch.setattr(winograd_conv2d, "FEW_MADE", 61)
    monkeypatch.setattr(winograd_conv2d, "MANY_FILTERS", 1)  # there are 60 tiles of 2 x 2 outputs
    counts, left = planned(Block())
    assert FUSED not in counts and len(left) == 1 and "MiB" in left[0] and "60 tiles are too few" in left[0]


def test_where_filters_would_take_too_much_memory_they_are_made_of_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusegen.kernels.cpu import winograd_conv2d

    monkeypatch.setattr(winograd_conv2d, "MOST_FILTERS", 1)
    counts, left = planned(Block())
    assert counts[FUSED] == 1 and left == [] and any("winograd_taps" in name for name in counts)
    assert not any("winograd_filters" in name for name in counts)


def test_a_deterministic_plan_takes_the_form_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch had enough tiles for filters that a sample made of taps: other bits."""
    from fusegen.kernels.cpu import winograd_conv2d

    monkeypatch.setattr(winograd_conv2d, "MANY_FILTERS", 1)
    monkeypatch.setattr(winograd_conv2d, "FEW_TILES", 18)  # a sample has 9
    monkeypatch.setattr(winograd_conv2d, "FEW_MADE", 1)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 11)
    program = api.capture(Block().eval(), (x,), dynamic={"x": {0: ("batch", 1, 9)}})
    plain, sure = (api.compile(program, deterministic=d) for d in (False, True))
    plain(x)
    assert any("winograd_filters" in name for name in plain.plan.counts())
    whole = sure(x)
    assert any("winograd_taps" in name for name in sure.plan.counts())
    assert all(torch.equal(sure(x[i : i + 1])[0], whole[i]) for i in range(2))
