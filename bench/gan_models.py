"""Benchmark generators: seconds a picture, and from a cold process to the first.

emoji-gan as a user runs it, and StyleGAN2 at its published size for 256 pixels with random weights.  The peers are the
same networks in plain PyTorch, channels-last, eager and compiled, and StyleGAN2 in the form it was published in.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusegen.bench import stylegan2_published, verify, whole
from fusegen.bench.picture_models import COLD, Contender, pixels
from fusegen.bench.row import Row
from fusegen.kernels import op as registry
from fusegen.kernels.op import Tolerance
from fusegen.models.load import locate
from fusegen.models.stylegan2 import Generator, StyleGAN2Config, Synthesis, config_f
from fusegen.runtime import noise
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.derived import values

MODULE, PSI = "fusegen.bench.gan_models", 0.7
EMOJI_BATCHES, LARGE_BATCHES = {"batch 1": 1, "batch 16": 16}, {"batch 1": 1, "batch 4": 4}
# Against eager float32, of pixels in [0, 1] and of a picture of random weights: three times what was measured.
PIXELS = {"float32": Tolerance(1e-3, 1.2e-2), "bfloat16": Tolerance(1.5e-2, 0.15)}
LARGE = {"float32": Tolerance(2e-5, 1e-4), "bfloat16": Tolerance(6e-2, 0.15)}


def peer(net: nn.Module, compiled: bool, dtype: str) -> Callable[..., Tensor]:
    """``net`` in its strongest plain form: channels-last, in inference mode or compiled with frozen weights."""
    net = net.eval().to(getattr(torch, dtype), memory_format=torch.channels_last)  # type: ignore[call-overload]
    mode = torch.no_grad if compiled else torch.inference_mode
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True
        net = torch.compile(net, dynamic=False, mode="max-autotune-no-cudagraphs")  # type: ignore[assignment]

    def call(*inputs: Tensor) -> Tensor:
        with mode():
            out: Tensor = net(*(x.to(getattr(torch, dtype)) for x in inputs))
        return out

    return call


def contender(name: str, dtype: str) -> Contender:
    """Who makes emoji-gan's pictures of seeds from 0 on, by name."""
    import fusegen

    if name == "fusegen":
        model = fusegen.load("emoji-gan", dtype=dtype)
        return Contender(name, dtype, lambda n: lambda: model.generate(range(n), psi=PSI))
    pair = emoji_networks(Bundle.open(locate("emoji-gan")), name == "compile", dtype)
    return Contender(name, dtype, lambda n: lambda: eager_pictures(*pair, n))


def emoji_networks(
    bundle: Bundle, compiled: bool, dtype: str
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    """The bundle's mapping network, in float32, and its synthesis network, as plain PyTorch, and the mean of w."""
    from safetensors.torch import load

    from fusegen.models.zoo.emoji_gan.train import NETWORKS

    registry.ops()  # the noise of a seed is one
    net = Generator(NETWORKS[bundle.manifest.loop["image"]["width"]])
    for part in ("mapping", "synthesis"):
        weights = {k: v.clone() for k, v in values(bundle.program(part).weights).items()}
        getattr(net, part).load_state_dict(weights, strict=False)  # the constant noise is not in a bundle
    mean = load(bundle.file("latents.safetensors"))["w_mean"]
    return peer(net.mapping, False, "float32"), peer(net.synthesis, compiled, dtype), mean


def eager_pictures(mapping: Callable[..., Tensor], synthesis: Callable[..., Tensor], mean: Tensor, count: int) -> Any:
    """The pictures of seeds from 0 on, as the family makes them."""
    from fusegen.models.pixels import pictures
    from fusegen.models.zoo.emoji_gan.train import NETWORKS

    keys, cfg = noise.seed_tensor(range(count)), NETWORKS[32]
    w = mapping(noise.initial(keys, [cfg.z_width]))
    ws = (mean + PSI * (w - mean))[:, None].expand(-1, cfg.layers, -1)
    drawn = [noise.at(keys, list(shape[1:]), k + 1) for k, shape in enumerate(cfg.noises(1))]
    return pictures(synthesis(ws, *drawn), "eager")


def emoji_gan(who: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], seconds: float) -> Iterator[list[Row]]:
    """emoji-gan: from seeds to pictures, batches of 1 and 16, then the first picture of a process."""
    for dtype in dtypes or ("float32", "bfloat16"):
        made = [contender(name, dtype) for name in who or whole.WHO] if set(cases) != {COLD} else []
        for case in cases:
            if case == COLD:
                yield whole.cold("emoji-gan", COLD, MODULE, who or whole.WHO, dtype, ["emoji-gan"])
            else:
                expected = pixels(contender("eager", "float32").make(EMOJI_BATCHES[case])())
                calls = {c.name: c.make(EMOJI_BATCHES[case]) for c in made}
                check = lambda images: verify.check([pixels(images)], [expected], PIXELS[dtype])  # noqa: B023, E731
                yield _steady("emoji-gan", case, dtype, calls, check, EMOJI_BATCHES[case], seconds)


def _steady(
    what: str, case: str, dtype: str, calls: Mapping[str, Callable[[], Any]], check: Any, batch: int, seconds: float
) -> list[Row]:
    rows, good = {}, {}
    for name, call in calls.items():
        verdict = check(call())
        rows[name] = whole.gated(what, case, name, dtype, verdict)
        if verdict.ok:
            good[name] = call
    return whole.timed(rows, good, seconds, lambda t: {"seconds_per_image": t / batch})


def large_network() -> Synthesis:
    """The published synthesis network for 256 pixels with random weights, noise and biases included."""
    torch.manual_seed(0)
    net = Synthesis(config_f(256))
    for name, p in net.named_parameters():
        if name.endswith((".bias", "noise_strength")) and "affine" not in name:
            nn.init.normal_(p, std=0.1)
    return net.eval().requires_grad_(False)


def large_inputs(cfg: StyleGAN2Config, batch: int) -> list[Tensor]:
    """w of every layer, and its noise."""
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, cfg.layers, cfg.w_width), *cfg.noises(batch)]
    return [torch.randn(shape, generator=g) for shape in shapes]


def large_files(folder: Path, net: Synthesis) -> None:
    """A bundle for fusegen and the published state dict for its peers, whose processes begin with them."""
    two, free = large_inputs(net.cfg, 2), {0: ("batch", 1, max(LARGE_BATCHES.values()))}
    program = capture(net, two, dynamic={"ws": free, "noise": tuple(free for _ in two[1:])}, name="synthesis")
    Bundle.write(folder / "synthesis.fg", Manifest(name="stylegan2-256"), {"synthesis": program}, {})
    save_file(net.state_dict(), folder / "synthesis.safetensors")


def large_caller(name: str, dtype: str, folder: Path) -> Callable[..., Tensor]:
    """A contender, from the files of :func:`large_files`."""
    if name == "fusegen":
        return compile_program(Bundle.open(folder / "synthesis.fg").program("synthesis"), "cpu", dtype)
    state = load_file(folder / "synthesis.safetensors")
    if name == "published":
        return stylegan2_published.synthesis(state, config_f(256), getattr(torch, dtype))
    with torch.device("meta"):
        net = Synthesis(config_f(256))
    net.load_state_dict(state, assign=True)
    return peer(net, name == "compile", dtype)


def stylegan2_256(
    who: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], seconds: float
) -> Iterator[list[Row]]:
    """StyleGAN2's synthesis network for 256 pixels, batches of 1 and 4, then the first picture of a process."""
    net = large_network()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large_files(folder, net)
        for dtype in dtypes or ("float32", "bfloat16"):
            for case in cases:
                if case == COLD:
                    yield whole.cold("stylegan2-256", COLD, MODULE, who or whole.WHO, dtype, [str(folder)])
                    continue
                inputs = large_inputs(net.cfg, LARGE_BATCHES[case])
                callers = {name: large_caller(name, dtype, folder) for name in who or whole.WHO}
                calls = {name: functools.partial(call, *inputs) for name, call in callers.items()}
                want = [net(*inputs)]
                check = lambda y: verify.check([y.float()], want, LARGE[dtype])  # noqa: B023, E731
                yield _steady("stylegan2-256", case, dtype, calls, check, LARGE_BATCHES[case], seconds)


EMOJI_GAN = whole.Suite((*EMOJI_BATCHES, COLD), emoji_gan)
STYLEGAN2_256 = whole.Suite((*LARGE_BATCHES, COLD), stylegan2_256, ("eager", "published", "compile", "fusegen"))


def first(name: str, dtype: str, what: str) -> float:
    """The mean of the first picture of a process: of emoji-gan, or of the folder of :func:`large_files`."""
    if what == "emoji-gan":
        return float(pixels(contender(name, dtype).make(1)()).mean())
    call = large_caller(name, dtype, Path(what))
    return float(call(*large_inputs(config_f(256), 1)).float().mean())


if __name__ == "__main__":
    whole.say({"mean": first(*sys.argv[1:])})
