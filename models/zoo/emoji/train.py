"""Train the emoji text-to-image model: ``python -m fusegen.models.zoo.emoji.train --out build/emoji``.

Velocity prediction (Salimans & Ho 2022) under the cosine schedule (Nichol & Dhariwal 2021), captions dropped one time
in ten for classifier-free guidance, an exponential moving average of the weights.  Every step draws from a generator
seeded with the step's own number, so a run that was stopped goes on with the bits it would have had.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import UNet, UNetConfig
from fusegen.models.zoo.emoji import data
from fusegen.runtime.bundle import Bundle

TRAIN_STEPS = 1000  # the schedule's time steps


def alphas_cumprod() -> Tensor:
    """The cosine schedule's cumulative alphas, (1000,), float64, betas clipped at 0.999."""
    t = np.arange(TRAIN_STEPS + 1) / TRAIN_STEPS
    bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.from_numpy(np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999)))


class Denoiser(nn.Module):
    """The text encoder and the U-Net, trained together."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder = TextEncoder(TextEncoderConfig(vocabulary=vocabulary))
        self.unet = UNet(UNetConfig())

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, self.text_encoder(tokens))


def words_dropped(captions: list[str], rng: np.random.Generator) -> list[str]:
    """A tenth of the captions empty (the unconditional case), a tenth with some words missing, the rest whole."""
    out = []
    for caption in captions:
        u, words = rng.random(), caption.split()
        if u < 0.1:
            out.append("")
        elif u < 0.2 and len(words) > 1:
            out.append(" ".join(w for w in words if rng.random() < 0.7))
        else:
            out.append(caption)
    return out


def batch(
    step: int, size: int, emoji: data.Emoji, tok: Tokenizer, alphas: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The noisy pictures, time steps, tokens and velocities of one training step, from the step's number alone."""
    rng, gen = np.random.default_rng(step), torch.Generator().manual_seed(step)
    index = rng.integers(0, len(emoji.captions), size)
    tokens = torch.tensor([e.ids for e in tok.encode_batch(words_dropped([emoji.captions[i] for i in index], rng))])
    x0 = torch.from_numpy(emoji.images[index])
    t = torch.randint(0, TRAIN_STEPS, (size,), generator=gen)
    noise = torch.randn(x0.shape, generator=gen)
    a, s = alphas[t].sqrt().float().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().float().view(-1, 1, 1, 1)
    return a * x0 + s * noise, t.float(), tokens, a * noise - s * x0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, constant, then a cosine down to zero over the last 40 %."""
    tail = max(0.0, (step - 0.6 * steps) / (0.4 * steps))
    return peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(tail, 1.0)))


class Run:
    """A training run: the model, its moving average, the optimizer, and the file that holds them between stops."""

    def __init__(self, vocabulary: int, folder: Path):
        torch.manual_seed(0)
        self.model = Denoiser(vocabulary).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds, self.file = 0, 0.0, folder / "checkpoint.safetensors"
        if self.file.exists():
            self.load()

    def save(self) -> None:
        """Write the checkpoint beside the last one, then take its place."""
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.items()}
        for name, parameter in self.model.named_parameters():
            state |= {f"{k}.{name}": self.optimizer.state[parameter][k] for k in ("exp_avg", "exp_avg_sq")}
        part = self.file.with_suffix(".part")
        meta = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({k: v.contiguous() for k, v in state.items()}, part, metadata=meta)
        part.replace(self.file)

    def load(self) -> None:
        """Go on from the checkpoint."""
        from safetensors import safe_open

        state = load_file(self.file)
        with safe_open(self.file, "pt") as f:
            self.step, self.seconds = int(f.metadata()["step"]), float(f.metadata()["seconds"])
        self.model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        self.average = {k[8:]: v for k, v in state.items() if k.startswith("average.")}
        for name, p in self.model.named_parameters():
            moments = {k: state[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}

    def begin(self, bundle: Path) -> None:
        """Take the weights of a bundle that an earlier training was exported to."""
        opened = Bundle.open(bundle)
        parts = {"unet": opened.program("denoiser"), "text_encoder": opened.program("text_encoder")}
        weights = {f"{part}.{k}": v for part, program in parts.items() for k, v in program.weights.items()}
        self.model.load_state_dict({k: weights[k] for k in self.model.state_dict()})
        self.average = {k: weights[k].detach().clone() for k in self.average}

    def advance(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor], rate: float) -> float:
        """One optimizer step; returns the loss."""
        start = time.monotonic()
        x, t, tokens, velocity = inputs
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # On a CPU the flash form's backward pass is several times slower than the plain one at 64 tokens.
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            out = self.model(x.contiguous(memory_format=torch.channels_last), t, tokens)
        loss = F.mse_loss(out.float(), velocity)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        for key, value in self.model.state_dict().items():
            self.average[key].lerp_(value, 1 - decay)
        self.step += 1
        self.seconds += time.monotonic() - start
        return float(loss.detach())


def train(
    folder: Path,
    steps: int,
    size: int,
    batch_size: int,
    peak: float,
    until: int | None = None,
    start: Path | None = None,
) -> Run:
    """Train for ``steps`` (from the folder's checkpoint, if there is one), logging one JSON line in fifty steps.

    ``until`` stops before the end; a later call goes on from there.  ``start`` is a bundle whose weights a new run
    begins with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    emoji = data.load(size)
    tok = data.tokenizer(emoji.captions)
    tok.save(str(folder / "tokenizer.json"))
    run, alphas, smooth = Run(tok.get_vocab_size(), folder), alphas_cumprod(), None
    if start is not None and run.step == 0:
        run.begin(start)
    configs = {"unet": asdict(run.model.unet.cfg), "text_encoder": asdict(run.model.text_encoder.cfg), "size": size}
    (folder / "config.json").write_text(json.dumps(configs, indent=1))
    loss_text = TextColumn("loss {task.fields[loss]:.4f}")
    with Progress(TextColumn("emoji"), BarColumn(), MofNCompleteColumn(), loss_text, TimeRemainingColumn()) as progress:
        task = progress.add_task("train", total=steps, completed=run.step, loss=math.nan)
        while run.step < (steps if until is None else until):
            loss = run.advance(batch(run.step, batch_size, emoji, tok, alphas), learning_rate(run.step, steps, peak))
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            progress.update(task, completed=run.step, loss=smooth)
            if run.step % 50 == 0:
                with open(folder / "log.jsonl", "a") as log:
                    log.write(json.dumps({"step": run.step, "loss": smooth, "seconds": round(run.seconds, 1)}) + "\n")
            if run.step % 250 == 0 or run.step in (steps, until):
                run.save()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/emoji"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--start", type=Path, help="a bundle whose weights a new run begins with")
    args = parser.parse_args()
    train(args.out, args.steps, args.size, args.batch, args.lr, start=args.start)


if __name__ == "__main__":
    main()
