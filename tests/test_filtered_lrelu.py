"""filtered_lrelu against SciPy, and its binding in a captured StyleGAN3 layer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from interpret import interpret
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.upfirdn2d_cases import make_filter
from fusegen.runtime.api import capture
from fusegen.runtime.rewrite import rewrite

OP = registry.get("filtered_lrelu")
SINC = make_filter("sinc12", torch.Generator())


def resample(x: np.ndarray, f: np.ndarray, up: int, down: int, pad: tuple[int, int]) -> np.ndarray:
    """Both axes by SciPy; pads after zeros are inserted."""
    signal = pytest.importorskip("scipy.signal")
    for axis in (2, 3):
        size = x.shape[axis] * up + pad[0] + pad[1]
        zeros = np.zeros([size if i == axis else n for i, n in enumerate(x.shape)])
        at = tuple(slice(pad[0], size - pad[1], up) if i == axis else slice(None) for i in range(4))
        zeros[at] = x
        x = np.apply_along_axis(lambda v: signal.convolve(v, f, "valid")[::down], axis, zeros)
    return x


@pytest.mark.parametrize(("up", "down", "taps", "pad"), [(2, 2, 12, (9, 8)), (4, 2, 24, (17, 14)), (1, 2, 5, (3, 4))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_steps_by_scipy(up: int, down: int, taps: int, pad: tuple[int, int], layout) -> None:
    g = torch.Generator().manual_seed(5)
    x, b, f = torch.randn(2, 3, 19, 17, generator=g), torch.randn(3, generator=g), torch.randn(taps, generator=g)
    y = resample(x.double().numpy() + b.double().numpy()[:, None, None], f.double().numpy(), up, 1, pad) * up * up
    y = np.clip(math.sqrt(2) * np.where(y > 0, y, 0.2 * y), -3, 3)
    want = torch.from_numpy(resample(y, SINC.double().numpy(), 1, down, (0, 0)))
    x = x.contiguous(memory_format=layout)
    got = torch.ops.fusegen.filtered_lrelu(x, f, SINC, b, up, down, (*pad, *pad), math.sqrt(2), 0.2, 3.0)
    assert_close("scipy", got, want, OP.tolerance[torch.float32])


class Layer(nn.Module):
    """What follows a convolution in StyleGAN3, with its filters (y, x) and in plain PyTorch."""

    def __init__(self, channels: int, up: int, down: int) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.bias = nn.Parameter(torch.randn(channels))
        self.register_buffer("filter", SINC.outer(SINC))

    def _filtered(self, x: Tensor, f: Tensor, stride: int) -> Tensor:
        channels = x.shape[1]
        weight = f.flip(0, 1)[None, None].expand(channels, 1, -1, -1)
        return F.conv2d(x, weight, stride=stride, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bias.reshape(1, -1, 1, 1)
        zeros = (0, self.up - 1, 0, 0, 0, self.up - 1)
        x = F.pad(F.pad(x[:, :, :, None, :, None], zeros).flatten(4, 5).flatten(2, 3), (9, 8, 9, 8))
        x = self._filtered(x, self.filter * self.up**2, 1)
        x = (F.leaky_relu(x, 0.2) * math.sqrt(2)).clamp(-256, 256)
        return self._filtered(x, self.filter, self.down)


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}}])
def test_a_captured_layer_becomes_one_op(dynamic) -> None:
    torch.manual_seed(0)
    layer, x = Layer(5, 2, 2).eval(), torch.randn(2, 5, 14, 13)
    program = rewrite(capture(layer, (x,), dynamic=dynamic) if dynamic else capture(layer, (x,)))
    assert program.counts() == {"fusegen.filtered_lrelu.default": 1}
    if dynamic is None:
        with torch.no_grad():
            want = layer.double()(x.double())
        assert_close("captured", interpret(program, x)[0], want, OP.tolerance[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bias": torch.ones(4)}, "bias has shape"), ({"clamp": -1.0}, "negative"), ({"up": 0}, "at least 1")],
)
def test_bad_arguments_are_one_line(change, message: str) -> None:
    args = {"x": torch.ones(1, 3, 9, 9), "up_filter": None, "down_filter": None, "bias": None, "up": 2, "down": 2}
    args |= {"padding": (0, 0, 0, 0), "gain": 1.0, "slope": 0.2, "clamp": None}
    with pytest.raises(ValueError, match=message) as caught:
        OP.allocate(*(args | change).values())
    assert "\n" not in str(caught.value)
