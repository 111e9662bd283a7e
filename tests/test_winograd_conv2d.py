"""winograd_conv2d against the convolution it stands for, at every level, and what a session makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.runtime import api
from fusegen.runtime.winograd import RULE

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
registry.ops()
FUSED = "kernel winograd_conv2d C++"
LEVELS = library.levels() if library.available() else ()


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    filters = torch.ops.fusegen.winograd_filters(weight)
    return torch.ops.fusegen.winograd_conv2d(x, filters, weight.shape[0], bias, residual)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(2, 24, 12, 20), (3, 17, 7, 9), (1, 64, 1, 1), (5, 33, 4, 3)])
@pytest.mark.parametrize("outputs", [1, 16, 40, 144])
def test_it_is_the_convolution(level: str, shape: tuple[int, ...], outputs: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, shape[1], 3, 3, generator=g) / 10, torch.randn(outputs, generator=g)
    residual = torch.randn(shape[0], outputs, *shape[2:], generator=g).contiguous(memory_format=torch.channels_last)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    with library.forced(level):
        got = convolved(x, weight, bias, residual)
    assert_close("y", got, want, registry.get("winograd_conv2d").tolerance[torch.float32])


def test_bits_do_not_depend_on_threads_or_batch() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, 19, 23, generator=g).contiguous(memory_format=torch.channels_last)
    weight, threads = torch.randn(80, 48, 3, 3, generator=g), torch.get_num_threads()
    whole = convolved(x, weight)
    try:
        torch.set_num_threads(1)
        assert torch.equal(convolved(x, weight), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(convolved(x[2:3].contiguous(memory_format=torch.channels_last), weight), whole[2:3])


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
    with pytest.raises(ValueError, match="winograd_filters"):
        torch.ops.fusegen.winograd_filters(torch.zeros(3, 3, 1, 1))


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


def test_bfloat16_and_few_channels_stay() -> None:
    assert FUSED not in planned(Block(), 2e-2, dtype="bfloat16")[0]
    assert FUSED not in planned(Block(8))[0]


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
    counts, left = planned(Block())
    assert FUSED not in counts and len(left) == 1 and "MiB" in left[0]
