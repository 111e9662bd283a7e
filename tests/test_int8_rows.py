"""1x1 convolutions of a quantized session as linear layers over rows of pixels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import relative
from torch import Tensor, nn

from fusegen.kernels.cpu import library
from fusegen.runtime import api
from fusegen.runtime.engine import Session
from fusegen.runtime.int8_rows import RULE

LEVELS = library.levels() if library.available() else ()
pytestmark = pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="plans take it at avx512_bf16 and amx alone")


@pytest.fixture(autouse=True, params=[level for level in LEVELS if level in ("avx512_bf16", "amx")])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test at each level that has them."""
    with library.forced(request.param):
        yield request.param


class Block(nn.Module):
    """A 1x1 convolution with an activation, one with a residual, one of the second's weight, a strided one."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 1, stride=2)
        self.one, self.two = nn.Conv2d(width, width, 1, bias=False), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        y = self.two(F.relu(self.one(x))) + x
        return self.down(self.two(y))


def compiled(module: nn.Module, x: Tensor, dtype: str = "bfloat16", **more: object) -> Session:
    session = api.compile(api.capture(module.eval(), (x,)), dtype=dtype, quantize="int8", **more)
    with torch.no_grad():
        want = module(x)
    for _ in range(2):  # the second run replays what the first one bound
        assert relative(session(x), want) <= 2.5e-2
    return session


def left(session: Session) -> list[tuple[int, tuple[str, ...]]]:
    return [(a.count, a.left) for a in session.plan.applied if a.rule == RULE]


def layers(counts: dict[str, int]) -> int:
    """How many int8 layers there are, by a weight as it lies or, where AMX has many rows, in panels."""
    return sum(counts.get(f"kernel {op} C++", 0) for op in ("linear_int8", "packed_linear_int8"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 7, 9), (3, 3, 1, 5)])
def test_they_are_rows_of_pixels(dtype: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    session = compiled(Block(), torch.randn(shape), dtype)
    counts = session.plan.counts()
    assert layers(counts) == 3 and left(session) == [(3, ())]
    assert not any("add" in name for name in counts)  # the residual is the product's
    assert counts["library onednn conv2d_int8"] == 1  # the strided one


def test_each_pixel_has_a_scale_of_its_own() -> None:
    """A large pixel coarsens the codes of a sample, not those of other pixels."""
    torch.manual_seed(0)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.first(x))

    module, x = One().eval(), torch.randn(1, 3, 4, 4)
    x[..., 0, 0] *= 1000
    session = api.compile(api.capture(module, (x,)), quantize="int8")
    with torch.no_grad():
        assert relative(session(x)[..., 1:, :], module(x)[..., 1:, :]) < 0.02
    assert layers(session.plan.counts()) == 1


def test_few_channels_and_other_levels_stay() -> None:
    torch.manual_seed(0)
    assert left(compiled(Block(48), torch.randn(2, 3, 8, 8))) == []
    with library.forced("avx512"):
        ((count, why),) = left(compiled(Block(), torch.randn(2, 3, 8, 8)))
    assert count == 0 and len(why) == 3 and all("at level avx512" in line for line in why)


def test_a_sample_is_its_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    program = api.capture(Block().eval(), (x,), dynamic={"x": {0: ("batch", 1, 8)}})
    session = api.compile(program, dtype="bfloat16", quantize="int8", deterministic=True)
    assert torch.equal(session(x)[1:], session(x[1:]))
