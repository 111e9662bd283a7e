"""What the backend of GPUs does before any GPU is there: its lowering, its layouts, its plain calls, on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import plainly, relative
from torch import nn

from fusegen.models.load import locate
from fusegen.runtime import api, backends
from fusegen.runtime.backends import cuda, plain
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.engine import Session
from fusegen.runtime.rewrite import rewrite


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_a_plain_convolution_of_single_pixels_is_a_product(last, stride, monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 6, 7), torch.randn(3, 5, 1, 1), torch.randn(3)
    want = F.conv2d(x, weight, bias, stride)
    residual, layout = torch.randn_like(want), torch.channels_last if last else torch.contiguous_format
    called = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: called.append(args) or convolve(*args))
    values = dict(input=x.contiguous(memory_format=layout), weight=weight, bias=bias, residual=residual)
    values |= dict(activation="relu", multiplier=None, stride=stride, padding=(0, 0), dilation=(1, 1), groups=1)
    got = plain.conv2d(**values)
    assert relative(got, torch.relu(want + residual)) <= 1e-6
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert bool(called) == (not last or stride != (1, 1))


class OnCpu(cuda.Cuda):
    """The backend of GPUs, its lowering and its layouts, where there is none."""

    device, graph = "cpu", False

    def check(self):
        pass

    def prepare(self, plan):  # its launches are not Triton's
        pass


class Picture(nn.Module):
    """A learned picture, expanded to the batch, and convolutions of several kinds."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 6, 4, 5))
        self.wide, self.point = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        h = self.start.expand(x.shape[0], -1, -1, -1) * x[:, :6, None, None]
        h = self.norm(self.wide(h))
        return self.point(h) + self.wide.weight.flatten(2).sum(2).mean() + h.flatten(2).mean(2)[:, :4, None, None]


@pytest.mark.parametrize("dtype, bound", [(None, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_backend_of_gpus_gives_its_layouts_to_convolutions_alone(dtype, bound):
    torch.manual_seed(0)
    module, x = Picture().eval(), torch.randn(3, 8)
    session = Session(rewrite(api.capture(module, (x,)), dtype), OnCpu())
    for _ in range(2):
        assert relative(session(x).float(), plainly(module, x)) <= bound
    weights = {s.node.args["weight"].name for s in session.plan.steps if s.node.op == "runtime.conv2d"}
    assert weights and all(name.endswith(".last") for name in weights)


def test_the_backend_of_gpus_leaves_a_learned_picture_as_it_lies():
    """StyleGAN2's constant has four dimensions and is no convolution's weight."""
    torch.manual_seed(0)
    program = Bundle.open(locate("emoji-gan")).program("synthesis")
    inputs = [torch.randn([n if isinstance(n, int) else 2 for n in spec.shape]) for spec in program.inputs.values()]
    want = Session(rewrite(program, None), backends.get("cpu"))(*inputs)
    assert relative(Session(rewrite(program, None), OnCpu())(*inputs), want) <= 1e-4
