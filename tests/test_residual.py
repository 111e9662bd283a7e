"""A residual addition behind a linear layer and views of it is done in the product, where memory allows."""

from __future__ import annotations

import pytest
import torch
from networks import relative
from torch import Tensor, nn

from fusegen.runtime import api
from fusegen.runtime.residual import RULE


class Block(nn.Module):
    """Rows of pixels through a linear layer, seen as an image again, and the image added; options change one thing."""

    def __init__(self, change: str = ""):
        super().__init__()
        self.change = change
        self.before, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(4, 24)
        self.rows = nn.Linear(24, 24, bias=change != "no bias")

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        b, c, height, width = x.shape
        rows = self.rows(self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c))
        if self.change == "rows used":
            x = x * rows.mean()
        if self.change == "transposed":
            image = rows.reshape(b, width, height, c).permute(0, 3, 2, 1)
        else:
            image = rows.reshape(b, height, width, c).permute(0, 3, 1, 2)
        if self.change == "image used":
            return torch.sin(image) + torch.cos(image + x)
        if self.change == "twice the image":
            return torch.cos(torch.add(x, image, alpha=2))
        return torch.cos(image + x if self.change == "image first" else x + image)


def applied(module: nn.Module, batch: int = 2, bound: float = 1e-5, **more: object) -> int:
    """How often the rule was applied, once the session gives what the module gives."""
    x = torch.randn(batch, 3, 6, 5)
    session = api.compile(api.capture(module.eval(), (x,)), **more)
    with torch.no_grad():
        want = module(x)
    for _ in range(2):  # the second run replays what the first one bound
        assert relative(session(x), want) <= bound
    return sum(a.count for a in session.plan.applied if a.rule == RULE)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("change", ["", "image first", "no bias"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_addition_is_in_the_product(change: str, dtype: str, bound: float, batch: int) -> None:
    torch.manual_seed(0)
    assert applied(Block(change), batch, bound, dtype=dtype) == 1


@pytest.mark.parametrize("change", ["rows used", "transposed", "image used", "twice the image"])
def test_other_additions_stay(change: str) -> None:
    torch.manual_seed(0)
    assert applied(Block(change)) == 0


def test_a_sample_keeps_its_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(3, 3, 6, 5)
    session = api.compile(api.capture(module, (x,), dynamic={"x": {0: ("batch", 1, 8)}}), deterministic=True)
    assert torch.equal(session(x)[1:2], session(x[1:2]))
