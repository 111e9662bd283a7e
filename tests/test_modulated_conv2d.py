"""modulated_conv2d against the paper's equations, what does not depend on scale, and its binding in a generator."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_all_close, assert_close, cloned, run_fenced, same_bits, truth, tuples
from hypothesis import given, note
from hypothesis import strategies as st
from interpret import interpret
from torch import Tensor, nn

from fusegen.kernels import onednn
from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.modulated_conv2d import alone
from fusegen.runtime.api import capture
from fusegen.runtime.rewrite import rewrite

OP = registry.get("modulated_conv2d")


@pytest.mark.parametrize("up", [1, 2])
def test_it_is_equations_1_and_3(up: int) -> None:
    """w' = s_i w_ijk; w'' = w' / sqrt(sum w'^2 + eps) (Karras et al. 2020), by grouped convolution in float64."""
    g = torch.Generator().manual_seed(2)
    x, w, s = (torch.randn(n, generator=g) for n in ((3, 7, 9, 8), (5, 7, 3, 3), (3, 7)))
    own = torch.einsum("oiyx,bi->boiyx", w.double(), s.double())
    own = own / (own.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    grouped = x.double().reshape(1, 21, 9, 8)
    if up == 1:
        want = F.conv2d(grouped, own.reshape(15, 7, 3, 3), padding=1, groups=3).reshape(3, 5, 9, 8)
    else:
        weight = own.transpose(1, 2).reshape(21, 5, 3, 3)
        want = F.conv_transpose2d(grouped, weight, stride=2, groups=3).reshape(3, 5, 19, 17)
    got = torch.ops.fusegen.modulated_conv2d(x, w, s, None, None, True, up, (1, 1) if up == 1 else (0, 0))
    assert_close("grouped", got, want, OP.tolerance[torch.float32])


def test_the_scale_of_a_demodulated_style_does_not_matter() -> None:
    g = torch.Generator().manual_seed(4)
    x, w, s = (torch.randn(n, generator=g) for n in ((1, 16, 8, 8), (8, 16, 3, 3), (1, 16)))
    one, many = (torch.ops.fusegen.modulated_conv2d(x, w, s * k, None, None, True, 1, (1, 1)) for k in (1.0, 64.0))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


@st.composite
def arguments(draw: st.DrawFn):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    few, up = st.integers(1, 3), draw(st.sampled_from([1, 1, 2, 3]))
    b, i, o, h, w = (
        draw(few),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        *(draw(st.integers(2, 40)) for _ in "hw"),
    )
    ky, kx = (draw(st.integers(1, 4)) for _ in "yx")
    pad = [
        min(draw(st.integers(0, 3)), n - 1) if up > 1 else k // 2 + draw(st.integers(0, 2))
        for n, k in ((h, ky), (w, kx))
    ]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    own = draw(st.sampled_from([torch.float32, dtype]))
    pad = [p if (n - 1) * up + k - 2 * p > 0 else 0 for p, n, k in zip(pad, (h, w), (ky, kx), strict=True)]
    out = [
        n - k + 1 + 2 * p if up == 1 else (n - 1) * up + k - 2 * p
        for n, k, p in zip((h, w), (ky, kx), pad, strict=True)
    ]
    make = lambda *shape: torch.randn(shape, generator=g).to(own)  # noqa: E731
    x = torch.randn(b, i, h, w, generator=g).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else x
    noise = draw(st.sampled_from([None, make(b, 1, *out), make(1, 1, *out)]))
    bias = draw(st.sampled_from([None, make(o)]))
    act = draw(st.sampled_from(["linear", "lrelu"]))
    return (x, make(o, i, ky, kx), make(b, i), noise, bias, draw(st.booleans()), up, pad, act, None, None, None, 1e-8)


@pytest.mark.skipif(not library.available(), reason=str(library.missing()))
@given(arguments(), st.sampled_from(library.levels() if library.available() else ("",)))
def test_random_arguments(args, level: str) -> None:
    note(f"{[tuple(a.shape) if isinstance(a, Tensor) else a for a in args]} {args[0].dtype} at {level}")
    with library.forced(level):
        got = {f"output {i}": out for i, out in enumerate(tuples(registry.run(OP, cloned(args))))}
    assert_all_close(OP, f"random at {level}", got, truth(OP, args))


def blur(x: Tensor, f: Tensor, pad: tuple[int, ...], up: int = 1) -> Tensor:
    """Resampling as one writes it in plain PyTorch."""
    if up > 1:
        x = F.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1)).flatten(4, 5).flatten(2, 3)
    weight = f.flip(0, 1)[None, None].expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, pad), weight, groups=x.shape[1])


class Layer(nn.Module):
    """A layer of StyleGAN2's synthesis network in plain PyTorch."""

    def __init__(self, channels: int, outputs: int, size: int, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.affine, self.bias = nn.Linear(12, channels), nn.Parameter(torch.randn(outputs))
        self.weight, self.strength = nn.Parameter(torch.randn(outputs, channels, 3, 3)), nn.Parameter(torch.tensor(0.3))
        self.register_buffer("noise", torch.randn(1, 1, size, size))

    def forward(self, x: Tensor, w: Tensor, f: Tensor) -> Tensor:
        s = self.affine(w)
        norm = torch.rsqrt(s.square() @ self.weight.square().sum((2, 3)).t() + 1e-8)
        x = x * s[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
        else:
            x = F.conv2d(x, self.weight, padding=1)
        x = x * norm[:, :, None, None]
        if self.up:
            x = blur(x, f * 4, (1, 1, 1, 1))
        x = x + self.noise * self.strength
        return (F.leaky_relu(x + self.bias.reshape(1, -1, 1, 1), 0.2) * math.sqrt(2)).clamp(-256, 256)


class Generator(nn.Module):
    """Two layers, to-RGB and the upsampled skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(6, 5, 8), Layer(5, 4, 16, up=True)
        self.rgb, self.affine = nn.Conv2d(4, 3, 1), nn.Linear(12, 4)
        f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("filter", f.outer(f))

    def forward(self, x: Tensor, w: Tensor, image: Tensor) -> Tensor:
        x = self.second(self.first(x, w, self.filter), w, self.filter)
        rgb = F.conv2d(x * self.affine(w)[:, :, None, None], self.rgb.weight, self.rgb.bias)
        return rgb + blur(image, self.filter * 4, (2, 1, 2, 1), up=2)


@pytest.mark.parametrize("dynamic", [None, {name: {0: "batch"} for name in ("x", "w", "image")}])
def test_a_captured_generator_binds_every_op(dynamic) -> None:
    torch.manual_seed(0)
    net, args = Generator().eval(), (torch.randn(2, 6, 8, 8), torch.randn(2, 12), torch.randn(2, 3, 8, 8))
    program = rewrite(capture(net, args, dynamic=dynamic) if dynamic else capture(net, args))
    counts = program.counts()
    assert {k: v for k, v in counts.items() if k.startswith("fusegen.")} == {
        "fusegen.modulated_conv2d.default": 3,  # with noise and activation, transposed, to RGB
        "fusegen.upfirdn2d.default": 2,
        "fusegen.bias_act.default": 1,  # after the transposed one's filter
    }
    assert not {"aten.conv2d.default", "aten.leaky_relu.default", "aten.clamp.default"} & counts.keys()
    if dynamic is None:
        with torch.no_grad():
            want = net.double()(*(a.double() for a in args))
        assert_close("captured", interpret(program, *args)[0], want, OP.tolerance[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"styles": torch.ones(2, 4)}, "styles have shape"),
        ({"noise": torch.ones(1, 1, 4, 4)}, "noise has shape"),
        ({"bias": torch.ones(3)}, "bias has shape"),
        ({"weight": torch.ones(5, 4, 3, 3)}, "are not"),
        ({"act": "mish"}, "no activation"),
    ],
)
def test_bad_arguments_are_one_line(change, message: str) -> None:
    args = {"x": torch.ones(2, 3, 9, 9), "weight": torch.ones(5, 3, 3, 3), "styles": torch.ones(2, 3), "noise": None}
    args |= {"bias": None, "demodulate": True, "up": 1, "padding": (1, 1), "act": "linear"}
    with pytest.raises(ValueError, match=message) as caught:
        OP.allocate(*(args | change).values())
    assert "\n" not in str(caught.value)


THROUGH = next((k for k in OP.kernels if k.name == "modulated_conv2d oneDNN"), None)


@pytest.mark.skipif(THROUGH is None or not torch.backends.mkldnn.is_available(), reason="needs C++ kernels and oneDNN")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("up", [1, 2])
def test_through_a_library(up: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """The truth; the same bits for any number of threads and a sample alone; and weights that are written are read."""
    g = torch.Generator().manual_seed(5)
    make = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    padding, out = ([1, 1], (61, 67)) if up == 1 else ([0, 0], (123, 135))
    x, weight = make(2, 69, 61, 67).contiguous(memory_format=layout), make(70, 69, 3, 3)
    rest = (make(2, 69), make(2, 1, *out), make(70), True, up, padding, "lrelu", None, None, 256.0, 1e-8)
    args = (x, weight, *rest)
    assert THROUGH is not None
    if not onednn.serves(dtype):
        assert THROUGH.decline(*args) == "oneDNN has no bfloat16 products here"
        return
    assert THROUGH.decline(*args) is None
    assert_all_close(OP, "through", run_fenced(OP, THROUGH, args), truth(OP, args))
    outs, before = OP.allocate(*args), torch.get_num_threads()
    launch, results = THROUGH.bind(outs, args), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            launch.run()
            results.append(outs[0].clone())
    finally:
        torch.set_num_threads(before)
    own = OP.allocate(*alone(args, 1))
    THROUGH.bind(own, alone(args, 1)).run()
    assert all(same_bits(results[0], r) for r in results[1:]) and same_bits(results[0][1:], own[0])
    weight.mul_(torch.linspace(0.5, 2.0, 69, dtype=dtype)[:, None, None])
    launch.run()
    assert_all_close(OP, "written", {"output 0": outs[0]}, truth(OP, args))
    for index in range(len(args)):
        launch.keep(index)
    for _ in range(2):  # the second run goes by what the first one kept
        launch.run()
        assert_all_close(OP, "kept", {"output 0": outs[0]}, truth(OP, args))
    moved = weight.flip(0)
    launch.move(1, moved)
    launch.run()
    assert_all_close(OP, "moved", {"output 0": outs[0]}, truth(OP, (x, moved, *rest)))
