"""An upsampling and the convolution after it become one op where a kernel takes them, and stay two where none does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.runtime import api, moments
from fusegen.runtime.backends import cpu
from fusegen.runtime.upsample import RULE

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
FUSED = "kernel upsample2x_conv C++"
LEVELS = library.levels() if library.available() else ()


class Decoder(nn.Module):
    """Two convolutions with a nearest upsampling between; ``scale`` and the second convolution's options as given."""

    def __init__(self, scale: float = 2.0, size: tuple[int, int] | None = None, inner: int = 24, **options: int):
        super().__init__()
        self.first = nn.Conv2d(4, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, 20, **{"kernel_size": 3, "padding": 1, **options})
        self.scale, self.size = scale, size

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.size is not None:
            h = F.interpolate(h, size=self.size, mode="nearest")
        else:
            h = F.interpolate(h, scale_factor=self.scale, mode="nearest")
        return torch.tanh(self.second(h))


def planned(module: nn.Module, x: Tensor, bound: float = 1e-5, **more: object) -> tuple[dict[str, int], list[str]]:
    """The plan's bindings and why the rule left a match, once the session gives what the module gives."""
    session = api.compile(api.capture(module.eval(), (x,)), **more)
    with torch.no_grad():
        want = module(x)
    assert relative(session(x), want) <= bound
    left = [line for a in session.plan.applied if a.rule == RULE for line in a.left]
    return session.plan.counts(), left


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_two_become_one(dtype: str, bound: float) -> None:
    torch.manual_seed(0)
    counts, left = planned(Decoder(), torch.randn(2, 4, 9, 11), bound, dtype=dtype)
    assert counts[FUSED] == 1 and left == []
    assert not [name for name in counts if "upsample_nearest" in name]


@pytest.mark.skipif("avx512_bf16" not in LEVELS[-1:], reason="bfloat16 is served at avx512_bf16 alone")
def test_in_bfloat16_winograd_s_form_has_fewer_products() -> None:
    torch.manual_seed(0)
    counts, left = planned(Decoder(inner=64), torch.randn(2, 4, 9, 11), 2e-2, dtype="bfloat16")
    assert counts["kernel winograd_conv2d C++"] == 1 and FUSED not in counts and left == []
    assert not [name for name in counts if "upsample_nearest" in name]


def test_a_size_that_doubles_is_the_same() -> None:
    counts, _ = planned(Decoder(size=(10, 12)), torch.randn(1, 4, 5, 6))
    assert counts[FUSED] == 1


@pytest.mark.parametrize(
    "module",
    [
        Decoder(scale=3.0),
        Decoder(size=(10, 13)),
        Decoder(kernel_size=1, padding=0),
        Decoder(stride=2),
        Decoder(padding=0),
        Decoder(groups=4),
        Decoder(padding=2, dilation=2),
    ],
    ids=["three times", "other sides", "1x1", "stride", "no padding", "groups", "dilation"],
)
def test_other_upsamplings_and_convolutions_stay(module: Decoder) -> None:
    counts, _ = planned(module, torch.randn(1, 4, 5, 6))
    assert FUSED not in counts


def test_an_upsampled_image_that_is_used_twice_stays() -> None:
    class Twice(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            h = F.interpolate(self.first(x), scale_factor=2.0, mode="nearest")
            return self.second(h).mean(1, keepdim=True) + h

    assert FUSED not in planned(Twice(), torch.randn(1, 4, 5, 6))[0]


def test_where_no_kernel_takes_it_the_plan_says_why() -> None:
    op = registry.get("upsample2x_conv")
    kernels, op.kernels[:] = list(op.kernels), []
    try:
        counts, left = planned(Decoder(), torch.randn(1, 4, 5, 6))
    finally:
        op.kernels[:] = kernels
    assert FUSED not in counts and len(left) == 1 and left[0].endswith("no kernel")


def test_diffusers_upsampling_block() -> None:
    from diffusers.models.upsampling import Upsample2D

    torch.manual_seed(0)
    counts, _ = planned(Upsample2D(32, use_conv=True, out_channels=32), torch.randn(2, 32, 6, 5))
    assert counts[FUSED] == 1


class Upsampled(nn.Module):
    """A convolution, and one of what is upsampled, each with a norm behind it."""

    def __init__(self, inner: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(n, inner, 3, padding=1) for n in (3, inner, inner))
        self.norms = nn.ModuleList(nn.GroupNorm(4, inner) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        enter, one, two = self.convolutions
        y = F.silu(self.norms[0](one(F.silu(enter(x)))))
        return self.norms[1](two(F.interpolate(y, scale_factor=2.0, mode="nearest")))


@pytest.mark.parametrize(("inner", "served"), [(40, 2), (24, 0)])
@pytest.mark.parametrize("least", [0, 1 << 30])
def test_by_packed_taps_with_the_moments_that_a_norm_wants(
    monkeypatch: pytest.MonkeyPatch, inner: int, served: int, least: int
) -> None:
    """As with tiles, at this machine's level."""
    monkeypatch.setattr(cpu.Cpu, "unpacked_convolutions", lambda self: None)
    monkeypatch.setattr(moments, "LEAST", least)
    torch.manual_seed(1)
    module, x = Upsampled(inner), torch.randn(2, 3, 9, 11)
    counts, left = planned(module, x, 2e-2, dtype="bfloat16", without=["winograd_conv2d"])
    assert counts.get(f"kernel packed_conv2d{'' if least else '_moments'} C++", 0) == served
    assert counts.get(FUSED, 0) == (0 if served else 1) and left == []
    assert counts.get("kernel conv_taps C++", 0) == served and not any("upsample_nearest" in name for name in counts)
