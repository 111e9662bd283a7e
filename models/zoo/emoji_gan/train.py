"""Train the emoji-gan model: ``python -m fusegen.models.zoo.emoji_gan.train --out build/emoji-gan``.

One command, deterministic on one machine and thread count (set OMP_NUM_THREADS), resumable from its folder's
checkpoint: all randomness of a step comes from the step's number.  The folder's file ``steps`` holds the number of
steps and may be changed while the training runs.  Needs Debian's ``fonts-noto-color-emoji``.

StyleGAN2 (Karras et al. 2020): the non-saturating loss, R1 on every 16th step, a moving average of the generator, and
adaptive augmentation for so small a set.  Path length regularisation is left off, as its authors do at this size.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import deterministic

from fusegen.models.stylegan2 import Generator, StyleGAN2Config
from fusegen.models.stylegan2_discriminator import Discriminator
from fusegen.models.zoo.emoji import data
from fusegen.models.zoo.emoji.train import name_of
from fusegen.models.zoo.emoji_gan.augment import Adaptive, Changes
from fusegen.models.zoo.emoji_gan.watch import Losses, grid

LAZY = 16  # steps between two of R1, which then counts as much as all between
AVERAGED = 10_000  # pictures in which the moving average forgets half, a twentieth of those seen at first
MIXED = 0.3  # how often a picture's layers come from two latents, so that styles can be mixed
LOG, SAVE, SAMPLE = 50, 500, 1000  # steps between two
_SMALL = dict(z_width=128, w_width=128, mapping_layers=4, mapping_rate=0.1, clamp=None)
NETWORKS = {  # by the pictures' side in pixels
    32: StyleGAN2Config(32, channels=(192, 128, 64, 32), **_SMALL),  # type: ignore[arg-type]
    64: StyleGAN2Config(64, channels=(256, 256, 192, 96, 48), **_SMALL),  # type: ignore[arg-type]
}


@dataclass(frozen=True)
class Settings:
    """``steps`` of ``batch`` pictures; ``peak``: the learning rate; ``gamma``: the weight of R1."""

    steps: int
    config: StyleGAN2Config = NETWORKS[32]
    batch: int = 16
    peak: float = 2.5e-3
    gamma: float = 0.05
    device: str = "cpu"
    font: Path = data.FONT


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Constant, then linearly down to a twentieth over the last fifth."""
    return peak * min(1.0, max(0.05, 5 * (1 - step / steps)))


class Random:
    """All randomness of step ``step``, in the order in which it is asked for."""

    def __init__(self, step: int, settings: Settings):
        self.settings, self.host = settings, np.random.default_rng(step)
        self.device = torch.Generator(settings.device).manual_seed(step)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.device, device=self.settings.device)

    def noises(self) -> list[Tensor]:
        cfg, batch = self.settings.config, self.settings.batch
        return [self.normal(*shape).bfloat16() for shape in cfg.noises(batch)]

    def changes(self, p: float) -> Changes:
        cfg, batch = self.settings.config, self.settings.batch
        return Changes.drawn(self.host, p, batch, cfg.resolution, self.settings.device)


def halved(net: nn.Module, wide: str = "-") -> dict[str, Tensor]:
    """The parameters and buffers in bfloat16, those whose names begin with ``wide`` as they are; gradients pass."""
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {k: v if k.startswith(wide) else v.bfloat16() for k, v in named.items()}


class Run:
    """A training run: both networks, the moving average, the optimizers, and the file that holds them between stops.

    The convolutions compute in bfloat16; the mapping network, the discriminator's last layers and all parameters are
    float32.
    """

    def __init__(self, folder: Path, settings: Settings):
        torch.manual_seed(0)
        self.settings, cfg = settings, settings.config
        self.generator, self.discriminator = Generator(cfg), Discriminator(cfg)
        self.nets = nn.ModuleDict({"generator": self.generator, "discriminator": self.discriminator})
        self.nets.to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = {k: v.detach().clone() for k, v in self.generator.state_dict().items()}
        lazy = LAZY / (LAZY + 1)  # Adam as if R1 were a step of its own among them (Karras et al. 2020, appendix B)
        rates, betas = {"generator": 1.0, "discriminator": lazy}, {"generator": 0.99, "discriminator": 0.99**lazy}
        self.rates = rates
        self.optimizers = {
            k: torch.optim.Adam(net.parameters(), 0.0, (0.0, betas[k]), fused=True) for k, net in self.nets.items()
        }
        self.adaptive = Adaptive()
        self.step, self.seconds, self.file = 0, 0.0, folder / "checkpoint.safetensors"
        if self.file.exists():
            self.load()

    def moments(self) -> dict[str, Tensor]:
        """The optimizers' state by name, under the key of each."""
        out: dict[str, Tensor] = {}
        for k, optimizer in self.optimizers.items():
            for name, p in self.nets[k].named_parameters():
                out |= {f"{m}.{k}.{name}": optimizer.state[p][m] for m in ("exp_avg", "exp_avg_sq")}
        return out

    def save(self) -> None:
        """Write the checkpoint beside the last one, then take its place."""
        state = {**self.nets.state_dict(), **{f"average.{k}": v for k, v in self.average.items()}, **self.moments()}
        facts = {"step": self.step, "seconds": self.seconds, "p": self.adaptive.p, "signs": self.adaptive.signs}
        part = self.file.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in state.items()}, part, metadata={k: repr(v) for k, v in facts.items()})
        part.replace(self.file)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = load_file(self.file, self.settings.device)
        with safe_open(self.file, "pt") as f:
            facts = f.metadata()
        self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
        self.adaptive.p, self.adaptive.signs = float(facts["p"]), float(facts["signs"])
        self.nets.load_state_dict({k: state[k] for k in self.nets.state_dict()})
        self.average = {k: state[f"average.{k}"] for k in self.average}
        for k, optimizer in self.optimizers.items():
            for name, p in self.nets[k].named_parameters():
                # The fused optimizer goes through memory as it lies: the moments must lie as their parameter does.
                moments = {m: torch.empty_like(p).copy_(state[f"{m}.{k}.{name}"]) for m in ("exp_avg", "exp_avg_sq")}
                step = torch.tensor(float(self.step), device=self.settings.device)
                optimizer.state[p] = {"step": step, **moments}

    def fake(self, random: Random) -> Tensor:
        """A batch of pictures of new latents, some mixed of two, (B, 3, R, R) float32."""
        cfg, batch, mapping = self.settings.config, self.settings.batch, self.generator.mapping
        z = random.normal(2 * batch, cfg.z_width)
        first, second = mapping(z).bfloat16().chunk(2)
        mixed = random.host.random(batch) < MIXED
        cut = np.where(mixed, random.host.integers(1, cfg.layers, batch), cfg.layers)
        own = torch.arange(cfg.layers) < torch.from_numpy(cut)[:, None]
        ws = torch.where(own[..., None].to(z.device), first[:, None], second[:, None])
        synthesis = self.generator.synthesis
        return functional_call(synthesis, halved(synthesis), (ws, *random.noises())).float()

    def judged(self, images: Tensor) -> Tensor:
        """The logits (B, 1) of augmented pictures."""
        net, x = self.discriminator, images.bfloat16().contiguous(memory_format=torch.channels_last)
        return functional_call(net, halved(net, "b4."), (x,))

    def _descend(self, which: str, loss: Tensor) -> None:
        optimizer = self.optimizers[which]
        for group in optimizer.param_groups:
            rate = learning_rate(self.step, self.settings.steps, self.settings.peak)
            group["lr"] = rate * self.rates[which]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def learn_discriminator(self, real: Tensor, random: Random) -> dict[str, Tensor]:
        """A step of the discriminator on ``real`` pictures and as many generated ones."""
        with torch.no_grad():
            fake = random.changes(self.adaptive.p)(self.fake(random))
        real, lazy = random.changes(self.adaptive.p)(real), self.step % LAZY == 0
        real.requires_grad_(lazy)
        true, false = self.judged(real), self.judged(fake)
        loss = F.softplus(-true).mean() + F.softplus(false).mean()
        parts = {"discriminator": loss.detach()}
        if lazy:
            (slope,) = torch.autograd.grad(true.sum(), real, create_graph=True)
            parts["r1"] = (penalty := slope.square().sum((1, 2, 3)).mean()).detach()
            loss = loss + penalty * (self.settings.gamma / 2 * LAZY)
        self._descend("discriminator", loss)
        self.adaptive.observe(true, self.step)
        return parts | {"real": true.detach().sign().mean()}

    def learn_generator(self, random: Random) -> dict[str, Tensor]:
        """A step of the generator, and of the moving average."""
        self.discriminator.requires_grad_(False)
        loss = F.softplus(-self.judged(random.changes(self.adaptive.p)(self.fake(random)))).mean()
        self._descend("generator", loss)
        self.discriminator.requires_grad_(True)
        seen = (self.step + 1) * self.settings.batch
        keep = 0.5 ** (self.settings.batch / min(AVERAGED, 0.05 * seen))
        for k, v in self.generator.state_dict().items():
            self.average[k].lerp_(v, 1 - keep)
        return {"generator": loss.detach()}

    def advance(self, images: Tensor) -> dict[str, Tensor]:
        """One step of each network on the training set ``images`` (N, 3, R, R); returns the losses."""
        random = Random(self.step, self.settings)
        index = torch.from_numpy(random.host.integers(0, len(images), self.settings.batch))
        out = self.learn_discriminator(images[index.to(images.device)], random) | self.learn_generator(random)
        self.step += 1
        return out


def steps_of(folder: Path, given: int) -> int:
    """How many steps the run has: what the folder's file ``steps`` says, else ``given``, which is written there."""
    file = folder / "steps"
    if not file.exists():
        file.write_text(f"{given}\n")
    return int(file.read_text())


def train(folder: Path, settings: Settings, until: int | None = None) -> Run:
    """Train (from the folder's checkpoint, if there is one), logging one JSON line in fifty steps.

    ``until`` stops before the end; a later call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, steps=steps_of(folder, settings.steps))
    emoji, run = data.load(settings.config.resolution, settings.font), Run(folder, settings)
    images = torch.from_numpy(emoji.images).to(settings.device)
    facts = {"network": asdict(settings.config), "batch": settings.batch, "device": name_of(settings.device)}
    (folder / "config.json").write_text(json.dumps(facts | {"pictures": len(images)}, indent=1))
    began, before, losses = time.monotonic(), run.seconds, Losses()
    columns = TextColumn("emoji-gan"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=settings.steps, completed=run.step)
        while run.step < (run.settings.steps if until is None else until):
            losses.add(run.advance(images))
            run.seconds = before + time.monotonic() - began
            if run.step % LOG == 0:
                line = {"step": run.step, "kimg": run.step * settings.batch / 1000, **losses.means()}
                line |= {"p": round(run.adaptive.p, 4), "seconds": round(run.seconds, 1)}
                with open(folder / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
                run.settings = replace(run.settings, steps=steps_of(folder, settings.steps))
                text = f"D {line['discriminator']:.2f}, G {line['generator']:.2f}, p {run.adaptive.p:.2f}"
                progress.update(task, total=run.settings.steps, completed=run.step, description=text)
            if run.step % SAMPLE == 0:
                grid(run.average, settings.config, settings.device).save(folder / f"sample-{run.step:06}.png")
            if run.step % SAVE == 0 or run.step == (until or run.settings.steps):
                run.save()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/emoji-gan"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, choices=NETWORKS, help="pixels a side: 64 on a GPU, 32 on a CPU")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, help="64 on a GPU, 16 on a CPU")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--gamma", type=float, default=0.05, help="the weight of R1")
    parser.add_argument("--font", type=Path, default=data.FONT)
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS's sums may differ from run to run
    torch.use_deterministic_algorithms(True, warn_only=args.device == "cuda")
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check for tests, which costs a pass over memory
    size, batch = (64, 64) if args.device == "cuda" else (32, 16)
    network = NETWORKS[args.size or size]
    train(args.out, Settings(args.steps, network, args.batch or batch, args.lr, args.gamma, args.device, args.font))


if __name__ == "__main__":
    main()
