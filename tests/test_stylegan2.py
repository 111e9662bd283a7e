"""StyleGAN2 and DCGAN: the networks against the paper's equations, the published names, and what a capture binds."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fusegen
from fusegen.kernels.op import Tolerance
from fusegen.models.dcgan import DCGANConfig, DCGANDiscriminator, DCGANGenerator
from fusegen.models.stylegan2 import Generator, Mapping, StyleGAN2Config, Synthesis, config_f
from fusegen.models.stylegan2_discriminator import Discriminator, with_spread
from fusegen.runtime.api import capture
from fusegen.runtime.rewrite import rewrite

EXACT = Tolerance(rms=1e-12, peak=1e-11)
TINY = StyleGAN2Config(16, z_width=10, w_width=12, mapping_layers=3, channels=(9, 8, 6))


def random_generator(cfg: StyleGAN2Config) -> Generator:
    """Every parameter random, those too that begin at zero."""
    torch.manual_seed(1)
    net = Generator(cfg)
    for name, p in net.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def inputs(cfg: StyleGAN2Config, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(2)
    ws = torch.randn(batch, cfg.layers, cfg.w_width, generator=g, dtype=dtype)
    return ws, [torch.randn(shape, generator=g, dtype=dtype) for shape in cfg.noises(batch)]


def upfirdn2d(x: Tensor, taps: Tensor, up: int, down: int, pad: tuple[int, int], gain: float) -> Tensor:
    """By its definition: zeros put in, zeros around, a true convolution, every ``down``-th pixel."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h * up, w * up)
    wide[:, :, ::up, ::up] = x
    wide = F.pad(wide, (*pad, *pad))
    n = len(taps)
    out = x.new_zeros(b, c, wide.shape[2] - n + 1, wide.shape[3] - n + 1)
    for i in range(n):
        for j in range(n):
            out += taps[n - 1 - i, n - 1 - j] * wide[:, :, i : i + out.shape[2], j : j + out.shape[3]]
    return gain * out[:, :, ::down, ::down]


def modulated(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, up: int, taps: Tensor) -> Tensor:
    """Equations 1 and 3, sample by sample, each with weights of its own; upsampling as the convolution of the image
    with zeros put in by the flipped weight, then the filter (the published conv2d_resample)."""
    out = []
    for image, style in zip(x, styles, strict=True):
        w = weight * style[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        image = image[None]
        if up == 1:
            out.append(F.conv2d(image, w, padding=w.shape[2] // 2))
            continue
        wide = image.new_zeros(1, image.shape[1], 2 * image.shape[2] - 1, 2 * image.shape[3] - 1)
        wide[:, :, ::2, ::2] = image
        out.append(upfirdn2d(F.conv2d(wide, w.flip(2, 3), padding=2), taps, 1, 1, (1, 1), 4.0))
    return torch.cat(out)


def linear(state: dict[str, Tensor], name: str, x: Tensor, rate: float = 1.0) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return x @ (weight * (rate / math.sqrt(weight.shape[1]))).t() + bias * rate


def layer(state: dict[str, Tensor], name: str, x: Tensor, w: Tensor, noise: Tensor, up: int, clamp: float) -> Tensor:
    taps = state[f"{name}.resample_filter"]
    x = modulated(x, state[f"{name}.weight"], linear(state, f"{name}.affine", w), True, up, taps)
    x = x + noise * state[f"{name}.noise_strength"] + state[f"{name}.bias"].reshape(1, -1, 1, 1)
    return (torch.where(x < 0, 0.2 * x, x) * math.sqrt(2)).clamp(-clamp, clamp)


def synthesis(state: dict[str, Tensor], cfg: StyleGAN2Config, ws: Tensor, noise: list[Tensor]) -> Tensor:
    """The whole network from the published names, unfused."""
    clamp, noises = cfg.clamp or math.inf, iter(noise)
    x, image, at = state["b4.const"].expand(len(ws), -1, -1, -1), None, 0
    for r in cfg.resolutions:
        if r > 4:
            x = layer(state, f"b{r}.conv0", x, ws[:, at], next(noises), 2, clamp)
            at += 1
        x = layer(state, f"b{r}.conv1", x, ws[:, at], next(noises), 1, clamp)
        at += 1
        weight, bias = state[f"b{r}.torgb.weight"], state[f"b{r}.torgb.bias"]
        styles = linear(state, f"b{r}.torgb.affine", ws[:, at]) / math.sqrt(weight.shape[1])
        rgb = modulated(x, weight, styles, False, 1, state[f"b{r}.resample_filter"]) + bias.reshape(1, -1, 1, 1)
        rgb = rgb.clamp(-clamp, clamp)
        wide = None if image is None else upfirdn2d(image, state[f"b{r}.resample_filter"], 2, 1, (2, 1), 4.0)
        image = rgb if wide is None else wide + rgb
    assert image is not None
    return image


@pytest.mark.parametrize("clamp", [None, 0.8])
def test_the_networks_are_the_papers(clamp: float | None) -> None:
    cfg = StyleGAN2Config(16, z_width=10, w_width=12, mapping_layers=3, channels=(9, 8, 6), clamp=clamp)
    net = random_generator(cfg).double()
    for block in net.synthesis.children():  # a filter that is not symmetric shows which way it is turned
        for name, buffer in block.named_buffers():
            if name.endswith("resample_filter"):
                buffer.copy_(torch.arange(16, dtype=torch.float64).reshape(4, 4) / 120)
    ws, noise = inputs(cfg, 3, torch.float64)
    want = synthesis(dict(net.synthesis.state_dict()), cfg, ws, noise)
    assert_close("synthesis", net.synthesis(ws, *noise), want, EXACT)
    state, z = dict(net.mapping.state_dict()), torch.randn(3, 10, dtype=torch.float64)
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(3):
        w = F.leaky_relu(linear(state, f"fc{i}", w, 0.01), 0.2) * math.sqrt(2)
    assert_close("mapping", net.mapping(z), w, EXACT)
    same = synthesis(dict(net.synthesis.state_dict()), cfg, w[:, None].expand(-1, cfg.layers, -1), noise)
    assert_close("generator", net(z, *noise), same, EXACT)


def test_the_published_names_load(tmp_path) -> None:
    layer = ("weight", "noise_strength", "bias", "resample_filter", "noise_const", "affine.weight", "affine.bias")
    rgb = ("weight", "bias", "affine.weight", "affine.bias")
    names = {"mapping.w_avg", "synthesis.b4.const", "synthesis.b4.resample_filter", "synthesis.b8.resample_filter"}
    names |= {f"mapping.fc{i}.{k}" for i in range(8) for k in ("weight", "bias")}
    names |= {f"synthesis.{at}.{k}" for at in ("b4.conv1", "b8.conv0", "b8.conv1") for k in layer}
    names |= {f"synthesis.{at}.torgb.{k}" for at in ("b4", "b8") for k in rgb}
    net = Generator(StyleGAN2Config(8, channel_max=16, w_width=24, z_width=20))
    state = net.state_dict()
    assert state.keys() == names
    shapes = {
        "mapping.fc0.weight": (24, 20),
        "synthesis.b4.const": (16, 4, 4),
        "synthesis.b8.conv0.weight": (16, 16, 3, 3),
    }
    shapes |= {
        "synthesis.b8.conv0.affine.weight": (16, 24),
        "synthesis.b8.conv1.noise_const": (8, 8),
        "mapping.w_avg": (24,),
    }
    shapes |= {"synthesis.b8.torgb.weight": (3, 16, 1, 1), "synthesis.b4.conv1.noise_strength": ()}
    assert {k: tuple(state[k].shape) for k in shapes} == shapes
    drawn = {k: torch.randn(v.shape) for k, v in state.items()}
    save_file(drawn, tmp_path / "network.safetensors")
    net.load_state_dict(load_file(tmp_path / "network.safetensors"))
    assert all(torch.equal(v, drawn[k]) for k, v in net.state_dict().items())
    assert [tuple(n.shape) for n in net.synthesis.constant_noise()] == [(1, 1, r, r) for r in (4, 8, 8)]


def test_equal_learning_rates_are_of_unit_variance() -> None:
    net = Generator(StyleGAN2Config(8))
    assert abs(float(net.mapping.fc3.weight.std()) - 100) < 1  # of a hundredth of the rate
    assert abs(float(net.synthesis.b8.conv0.weight.std()) - 1) < 0.01
    w = net.mapping(torch.randn(64, 512))
    assert 0.5 < float(w.square().mean().sqrt()) < 2  # magnitudes are kept


@pytest.mark.parametrize(
    ("resolution", "widths", "layers"),
    [
        (256, (512, 512, 512, 512, 512, 256, 128), 14),
        (512, (512, 512, 512, 512, 512, 256, 128, 64), 16),
        (1024, (512, 512, 512, 512, 512, 256, 128, 64, 32), 18),
    ],
)
def test_configuration_f(resolution: int, widths: tuple[int, ...], layers: int) -> None:
    cfg = config_f(resolution)
    assert (cfg.widths, cfg.layers, cfg.mapping_layers) == (widths, layers, 8)
    sides = [shape[-1] for shape in cfg.noises(1)]
    assert sides == [4, *(r for r in cfg.resolutions[1:] for _ in range(2))] and len(sides) == layers - 1
    with torch.device("meta"):
        net, judge = Generator(cfg), Discriminator(cfg)
        noise = [torch.empty(shape) for shape in cfg.noises(1)]
        image = net(torch.empty(1, 512), *noise)
        assert image.shape == (1, 3, resolution, resolution) and judge(image).shape == (1, 1)
    if resolution == 1024:
        assert 28e6 < sum(p.numel() for p in net.parameters()) < 31e6  # "30M weights"


@pytest.mark.parametrize("bad", [dict(resolution=24), dict(resolution=2), dict(channels=(8, 8))])
def test_sizes_that_do_not_fit_are_refused(bad) -> None:
    with pytest.raises(ValueError):
        StyleGAN2Config(**bad)
    with pytest.raises(ValueError, match="published for"):
        config_f(128)


@pytest.mark.parametrize("batch", [1, 2, 6, 8])
def test_the_spread_of_a_minibatch(batch: int) -> None:
    x = torch.randn(batch, 5, 4, 4, dtype=torch.float64)
    group = math.gcd(batch, 4)
    want = torch.cat([x, x.new_zeros(batch, 1, 4, 4)], dim=1)
    for first in range(batch // group):
        members = range(first, batch, batch // group)
        deviation = (x[members].var(0, unbiased=False) + 1e-8).sqrt().mean()
        want[members, 5] = deviation
    assert_close("spread", with_spread(x), want, EXACT)


def test_the_discriminator_is_the_papers() -> None:
    """A residual block by definition: the filter, then the strided convolution; the skip filtered and halved."""
    torch.manual_seed(3)
    cfg = StyleGAN2Config(8, channels=(7, 5), clamp=None)
    net = Discriminator(cfg).double()
    for p in net.parameters():
        nn.init.normal_(p.requires_grad_(False))
    s, x = net.state_dict(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    act = lambda x, b: F.leaky_relu(x + b.reshape(1, -1, 1, 1), 0.2) * math.sqrt(2)  # noqa: E731
    scaled = lambda name: s[name] / math.sqrt(s[name][0].numel())  # noqa: E731
    y = act(F.conv2d(x, scaled("b8.fromrgb.weight")), s["b8.fromrgb.bias"])
    skip = F.conv2d(upfirdn2d(y, s["b8.resample_filter"], 1, 2, (1, 1), 1.0), scaled("b8.skip.weight"))
    y = act(F.conv2d(y, scaled("b8.conv0.weight"), padding=1), s["b8.conv0.bias"])
    y = upfirdn2d(y, s["b8.resample_filter"], 1, 1, (2, 2), 1.0)
    y = act(F.conv2d(y, scaled("b8.conv1.weight"), stride=2), s["b8.conv1.bias"])
    y = (skip + y) * math.sqrt(0.5)
    y = act(F.conv2d(with_spread(y), scaled("b4.conv.weight"), padding=1), s["b4.conv.bias"]).flatten(1)
    y = F.leaky_relu(linear(s, "b4.fc", y), 0.2) * math.sqrt(2)
    assert_close("logits", net(x), linear(s, "b4.out", y), EXACT)


def fused(program) -> dict[str, int]:
    return {k.split(".")[1]: v for k, v in rewrite(program).counts().items() if k.startswith("fusegen.")}


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("clamp", [None, 256.0])
def test_a_capture_binds_every_layer(free: bool, clamp: float | None) -> None:
    cfg = StyleGAN2Config(32, channels=(20, 18, 17, 16), w_width=12, z_width=10, mapping_layers=4, clamp=clamp)
    batch = {0: ("batch", 1, 8)}
    ws, noise = inputs(cfg, 2)
    dynamic = {"ws": batch, "noise": tuple(batch for _ in noise)} if free else None
    program = capture(Synthesis(cfg), (ws, *noise), dynamic=dynamic)
    assert list(program.inputs) == ["ws", *(f"noise_{i}" for i in range(7))]
    # Seven layers and four to RGB; a filter after each of three transposed layers and for each of three skips.
    assert fused(program) == {"modulated_conv2d": 11, "upfirdn2d": 6, "bias_act": 3}
    left = Counter(rewrite(program).counts())
    assert not {"aten.conv2d.default", "aten.conv_transpose2d.input", "aten.leaky_relu.default"} & left.keys()
    mapping = capture(Mapping(cfg), (torch.randn(2, 10),), dynamic={"z": batch} if free else None)
    assert fused(mapping) == {"bias_act": 4} and rewrite(mapping).counts()["aten.linear.default"] == 4


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("float32", Tolerance(rms=1e-5, peak=3e-5)), ("bfloat16", Tolerance(rms=3e-2, peak=8e-2))],
)
def test_a_session_makes_the_papers_picture(dtype: str, bound: Tolerance) -> None:
    net, (ws, noise) = random_generator(TINY), inputs(TINY, 3)
    session = fusegen.compile(capture(net.synthesis, (ws, *noise)), dtype=dtype)
    got = session(ws, *noise)
    state = {k: v.double() for k, v in net.synthesis.state_dict().items()}
    want = synthesis(state, TINY, ws.double(), [n.double() for n in noise])
    assert_close("picture", got, want, bound)


@pytest.mark.parametrize("resolution", [8, 64, 128])
def test_dcgan(resolution: int) -> None:
    cfg = DCGANConfig(resolution, width=4)
    net, judge = DCGANGenerator(cfg), DCGANDiscriminator(cfg)
    image = net(torch.randn(3, 100))
    assert image.shape == (3, 3, resolution, resolution) and float(image.abs().max()) <= 1
    assert judge(image).shape == (3,)
    state = DCGANGenerator().state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if v.dim() == 4}
    assert shapes == {  # the paper's figure 1, half as wide: 512, 256, 128 and 64 channels
        "main.0.weight": (100, 512, 4, 4),
        "main.3.weight": (512, 256, 4, 4),
        "main.6.weight": (256, 128, 4, 4),
        "main.9.weight": (128, 64, 4, 4),
        "main.12.weight": (64, 3, 4, 4),
    }


def test_a_captured_dcgan_makes_the_same_picture() -> None:
    torch.manual_seed(0)
    net, z = DCGANGenerator(DCGANConfig(32, width=8)).eval(), torch.randn(2, 100)
    session = fusegen.compile(capture(net, (z,), dynamic={"z": {0: ("batch", 1, 4)}}), dtype="float32")
    with torch.no_grad():
        assert_close("picture", session(z), net(z), Tolerance(rms=1e-5, peak=1e-5))
