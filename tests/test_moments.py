"""The moments that a convolution leaves, and the group norm that a session makes of them."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from networks import relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.group_norm_cases import moments_of
from fusegen.runtime import api, moments

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
registry.ops()
LEVELS = library.levels() if library.available() else ()
PAIRS = pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="this CPU has no products of bfloat16")
FORMS = [("winograd_conv2d", torch.float32), ("winograd_taps", torch.float32), ("packed_conv2d", torch.bfloat16)]
FORMS = [*FORMS, pytest.param("winograd_conv2d", torch.bfloat16, marks=PAIRS)]  # type: ignore[list-item]
LEAVES, PLAIN = "kernel winograd_conv2d_moments C++", "kernel winograd_conv2d C++"


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def levels(op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Those at which the op takes the dtype."""
    return ("avx512_bf16",) if (op, dtype) == ("winograd_conv2d", torch.bfloat16) else LEVELS


def arguments(
    op: str, dtype: torch.dtype, shape: tuple[int, ...], outputs: int, doubled: bool = False
) -> dict[str, Any]:
    """Of a convolution: an image whose channels have means far from each other and from zero, by random filters."""
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(outputs, shape[1], 3, 3, generator=g) / (9 * shape[1]) ** 0.5).to(dtype)
    if op == "packed_conv2d":
        filters = {"taps": torch.ops.fusegen.conv_taps(weight, doubled)}
    else:
        form = op if op == "winograd_taps" else "winograd_filters"
        filters = {"filters": getattr(torch.ops.fusegen, "conv_taps" if dtype == torch.bfloat16 else form)(weight)}
    x, bias = last(torch.randn(shape, generator=g).to(dtype)), 100 * torch.randn(outputs, generator=g)
    residual = torch.randn(shape[0], outputs, *(n * (2 if doubled else 1) for n in shape[2:]), generator=g)
    more = {"outputs": outputs, "bias": bias.to(dtype), "residual": last(residual.to(dtype)), "doubled": doubled}
    return {"x": x, **filters, **more}


def plain(op: str) -> str:
    """The op of a form: "winograd_taps" is winograd_conv2d by such."""
    return "winograd_conv2d" if op == "winograd_taps" else op


def both(op: str, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = getattr(torch.ops.fusegen, f"{plain(op)}_moments")(**args)
    return made


@pytest.mark.parametrize(("op", "dtype"), FORMS)
@pytest.mark.parametrize("kind", ["plain", "stripe", "corner", "same"])
@pytest.mark.parametrize("shape", [(2, 24, 60, 97), (1, 33, 13, 17), (3, 32, 4, 192), (1, 64, 1, 1)])
def test_they_are_those_of_what_was_stored(op: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    """Deviations far below the mean; a stripe or corner, where bands begin, unlike the rest; no deviation at all."""
    bounds = (2e-6, 1e-5) if dtype == torch.float32 else (1e-5, 1e-3)  # far below what the norm itself is rounded by
    for level in levels(op, dtype):
        with library.forced(level):
            args = arguments(op, dtype, shape, 70)
            if kind == "stripe":
                args["residual"][..., :2] += 3000
            elif kind == "corner":
                args["residual"][..., 0, 0] += 3000
            elif kind == "same":
                args["x"].zero_(), args["residual"].zero_()
            out, got = both(op, args)
            assert torch.equal(out, getattr(torch.ops.fusegen, plain(op))(**args))
            (mean, variance), (true, spread) = got.unbind(1), moments_of(out).unbind(1)
            assert float(((mean - true).abs() / (spread.sqrt() + 1e-12)).max()) < bounds[0], (level, "mean")
            assert float(((variance - spread).abs() / (spread + 1e-24)).max()) < bounds[1], (level, "variance")


@pytest.mark.parametrize(("op", "dtype"), FORMS[2:])
@pytest.mark.parametrize("shape", [(2, 32, 9, 31), (1, 70, 37, 40)])
def test_of_a_doubled_image(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for level in levels(op, dtype):
        with library.forced(level):
            out, got = both(op, arguments(op, dtype, shape, 40, True))
        torch.testing.assert_close(got, moments_of(out), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("op", "dtype"), FORMS)
@pytest.mark.parametrize("shape", [(3, 48, 39, 43), (3, 48, 5, 8)])
def test_bits_do_not_depend_on_threads_or_batch(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args, threads = arguments(op, dtype, shape, 80), torch.get_num_threads()
    alone = {**args, "x": last(args["x"][1:2]), "residual": last(args["residual"][1:2])}
    for level in levels(op, dtype):
        with library.forced(level):
            _, whole = both(op, args)
            try:
                for count in (1, 5):
                    torch.set_num_threads(count)
                    assert torch.equal(both(op, alone)[1], whole[1:2])
            finally:
                torch.set_num_threads(threads)


class Block(nn.Module):
    """A residual block, and the norm of its sum; ``time`` is added to what the second norm reads, ``behind`` stands
    before the third."""

    def __init__(self, inner: int = 32, behind: nn.Module | None = None, time: bool = False):
        super().__init__()
        self.first, self.one, self.two = (nn.Conv2d(n, inner, 3, padding=1) for n in (3, inner, inner))
        self.norms = nn.ModuleList(nn.GroupNorm(4, inner) for _ in range(3))
        self.behind, self.time = behind or nn.Identity(), nn.Parameter(torch.randn(1, inner)) if time else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.one(nn.functional.silu(self.norms[0](h)))
        y = y if self.time is None else y + self.time[:, :, None, None]
        h = self.behind(h + self.two(nn.functional.silu(self.norms[1](y))))
        return torch.tanh(self.norms[2](h))


def planned(module: nn.Module, bound: float = 1e-5, **more: object) -> tuple[dict[str, int], int, list[str]]:
    """The plan's bindings, how often the rule was applied and why not, once the session gives what the module gives."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 20)
    session = api.compile(api.capture(module.eval(), (x,)), **more)
    with torch.no_grad():
        want = module(x)
    for _ in range(2):  # the second run replays what the first one bound
        assert relative(session(x), want) <= bound
    applied = [a for a in session.plan.applied if a.rule == moments.RULE]
    return session.plan.counts(), sum(a.count for a in applied), [line for a in applied for line in a.left]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "LEAST", 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_norms_of_convolutions_go_by_their_moments(level: str, time: bool) -> None:
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
        torch.manual_seed(0)
        with library.forced(level):
            counts, applied, left = planned(Block(time=time), bound, dtype=dtype)
        leaves = LEAVES.replace("winograd", "packed") if (level, dtype) == ("amx", "bfloat16") else LEAVES
        served = dtype == "float32" or level in ("amx", "avx512_bf16")
        assert counts.get(leaves, 0) == applied == (2 if served else 0) and left == []
        assert PLAIN not in counts and "kernel packed_conv2d C++" not in counts


@pytest.mark.usefixtures("small")
def test_a_norm_of_something_else_stays() -> None:
    torch.manual_seed(0)
    counts, applied, _ = planned(Block(behind=nn.Tanh()))
    assert counts[LEAVES] == applied == 1 and counts[PLAIN] == 1  # the sum is not the convolution's own


class Skip(nn.Module):
    """Two convolutions whose outputs are concatenated, the second's behind ``behind``, and the norm of both."""

    def __init__(self, behind: nn.Module | None = None):
        super().__init__()
        self.first, self.one, self.two = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 32), (32, 48), (32, 48)))
        self.norm, self.last = nn.GroupNorm(8, 96), nn.Conv2d(96, 32, 1)
        self.behind = behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        joined = torch.cat([self.one(h), self.behind(self.two(h))], 1)
        return self.last(joined) + self.last(nn.functional.silu(self.norm(joined)))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("level", LEVELS)
def test_norms_of_what_two_convolutions_leave(level: str) -> None:
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
        torch.manual_seed(0)
        with library.forced(level):
            counts, applied, left = planned(Skip(), bound, dtype=dtype)
            others, _, _ = planned(Skip(nn.Tanh()), bound, dtype=dtype)
        leaves = LEAVES.replace("winograd", "packed") if (level, dtype) == ("amx", "bfloat16") else LEAVES
        served = dtype == "float32" or level in ("amx", "avx512_bf16")
        assert applied == served and counts.get(leaves, 0) == 2 * served and left == []
        assert counts["kernel join_group_norm C++"] == 1 and leaves not in others  # one of two is of no use


@pytest.mark.usefixtures("small")
def test_bits_that_are_a_sample_s_own() -> None:
    torch.manual_seed(0)
    assert planned(Block(), deterministic=True)[1] == 2


def test_small_images_stay() -> None:
    torch.manual_seed(0)
    assert planned(Block())[1] == 0


@pytest.mark.usefixtures("small")
def test_where_no_kernel_takes_it_the_plan_says_why() -> None:
    torch.manual_seed(0)
    counts, applied, left = planned(Block(), without=["winograd_conv2d_moments"])
    assert applied == 0 and LEAVES not in counts and len(left) == 2 and "asked to do without" in left[0]


@pytest.mark.usefixtures("small")
def test_the_vae_decoder_is_within_its_bound_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion's decoder, smaller: as far from float64 by moments as without them."""
    torch.manual_seed(0)
    net = peers.diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
    ).decoder.eval()  # fmt: skip
    x = torch.randn(1, 4, 12, 12)
    with torch.no_grad():
        want = net.double()(x.double()).float()
    program, found = api.capture(net.float(), (x,)), {}
    for least in (1, 1 << 40):
        monkeypatch.setattr(moments, "LEAST", least)
        session = api.compile(program)
        found[least] = relative(session(x), want)
        assert (session.plan.counts().get(LEAVES, 0) > 4) == (least == 1)
    assert found[1] <= 1e-5 and found[1 << 40] <= 1e-5, found
