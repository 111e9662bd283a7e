"""What the backend of GPUs does before any GPU is there: its lowering, its layouts, its plain calls, on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import plainly, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


class Recording(TorchDispatchMode):
    """Keeps what comes out in new memory."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs or {}))
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        out = function(*args, **(kwargs or {}))
        new = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.made += [t for t in new if t.untyped_storage().data_ptr() not in given]
        return out


class Recorded(OnCpu):
    """A backend whose graphs compute nothing while they are recorded; replayed, they write the recording's memory."""

    graph = True

    def record(self, run):
        with Recording() as seen:
            run()
        for value in seen.made:
            value.fill_(-3)

        def replay():
            with Recording() as again:
                run()
            for value, new in zip(seen.made, again.made, strict=True):
                value.copy_(new)

        return replay


@pytest.mark.parametrize("dtype, bound", [(None, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_first_call_gives_what_was_computed_and_not_what_was_recorded(dtype, bound):
    """The generator of emoji-gan gave grey at its first call on a GPU: its output is no planned value."""
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x):
            h = self.inner(x)
            return h.cumsum(1), torch.relu(h), h.sort(1)[0]

    module, x = Last().eval(), torch.randn(3, 6)
    session = Session(rewrite(api.capture(module, (x,)), dtype), Recorded())
    for _ in range(3):
        for got, want in zip(session(x), plainly(module, x), strict=True):
            assert relative(got.float(), want) <= bound


@pytest.mark.parametrize("rows, op", [(1, "fusegen.linear.default"), (16, "fusegen.linear.default"),
                                      (17, "aten.linear.default")])  # fmt: skip
def test_layers_of_up_to_sixteen_rows_are_products_of_our_own(rows, op):
    torch.manual_seed(0)
    module, x = nn.Linear(4096, 3000).eval(), torch.randn(rows, 4096)
    session = Session(rewrite(api.capture(module, (x,)), None), OnCpu())
    assert relative(session(x), plainly(module, x)) <= 1e-5
    assert [s.node.op for s in session.plan.steps] == [op]
