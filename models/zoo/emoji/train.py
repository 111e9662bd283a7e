"""Train the emoji text-to-image model: ``python -m fusegen.models.zoo.emoji.train --out build/emoji``.

Velocity prediction (Salimans & Ho 2022) under the cosine schedule (Nichol & Dhariwal 2021), captions dropped one time
in ten for classifier-free guidance, an exponential moving average of the weights.  Every step draws from generators
seeded with the step's own number, so a run that was stopped goes on with the bits it would have had.

On a GPU the networks are compiled and a whole step is one CUDA graph, or the host would be what takes the time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import deterministic

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import UNet, UNetConfig
from fusegen.models.zoo.emoji import data
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.derived import values

TRAIN_STEPS = 1000  # the schedule's time steps
# On a CPU the flash form's backward pass is several times slower than the plain one at 64 tokens; on a GPU it serves
# what has no mask.
ATTENTION = {"cpu": [SDPBackend.MATH], "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]}
SAVE = {"cpu": 250, "cuda": 2000}  # steps between checkpoints
NETWORKS = {  # by the pictures' side in pixels; both make a bundle of less than 15 MB
    32: UNetConfig(),
    64: UNetConfig(widths=(48, 64, 128, 128), attention=(False, False, True, True), head_dim=32, groups=16),
}


def alphas_cumprod() -> Tensor:
    """The cosine schedule's cumulative alphas, (1000,), float64, betas clipped at 0.999."""
    t = np.arange(TRAIN_STEPS + 1) / TRAIN_STEPS
    bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.from_numpy(np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999)))


class Denoiser(nn.Module):
    """The text encoder and the U-Net, trained together."""

    def __init__(self, vocabulary: int, config: UNetConfig):
        super().__init__()
        self.text_encoder = TextEncoder(TextEncoderConfig(vocabulary=vocabulary))
        self.unet = UNet(config)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, self.text_encoder(tokens))


def words_dropped(caption: str, rng: np.random.Generator) -> str:
    """Empty one time in ten (the unconditional case), with some words missing one time in five, else whole."""
    u, words = rng.random(), caption.split()
    if u < 0.1:
        return ""
    if u < 0.3 and len(words) > 1:
        return " ".join(w for w in words if rng.random() < 0.7)
    return caption


class Batches:
    """The training set on ``device``, and the batch of any step, from the step's number alone (and the device)."""

    def __init__(self, emoji: data.Emoji, tok: Tokenizer, device: str):
        self.captions, self.tok, self.device = emoji.captions, tok, device
        self.images = torch.from_numpy(emoji.images).to(device)
        self.alphas = alphas_cumprod().to(device)

    def __call__(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The noisy pictures, time steps, tokens and velocities."""
        rng, gen = np.random.default_rng(step), torch.Generator(self.device).manual_seed(step)
        index = rng.integers(0, len(self.captions), size)
        words = self.tok.encode_batch([words_dropped(self.captions[i], rng) for i in index])
        tokens = torch.tensor([e.ids for e in words]).to(self.device)
        x0 = self.images[torch.from_numpy(index).to(self.device)]
        t = torch.randint(0, TRAIN_STEPS, (size,), generator=gen, device=self.device)
        noise = torch.randn(x0.shape, generator=gen, device=self.device)
        a, s = (f.sqrt().float().view(-1, 1, 1, 1) for f in (self.alphas[t], 1 - self.alphas[t]))
        noisy = (a * x0 + s * noise).contiguous(memory_format=torch.channels_last)
        return noisy, t.float(), tokens, a * noise - s * x0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, constant, then a cosine down to zero over the last 40 %."""
    tail = max(0.0, (step - 0.6 * steps) / (0.4 * steps))
    return peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(tail, 1.0)))


class Run:
    """A training run: the model, its moving average, the optimizer, and the file that holds them between stops."""

    def __init__(self, vocabulary: int, folder: Path, config: UNetConfig, device: str = "cpu"):
        torch.manual_seed(0)
        model = Denoiser(vocabulary, config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, self.device = model.to(device), device
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.rate, self.keep = torch.zeros((), device=device), torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.rate, (0.9, 0.99), weight_decay=0.01, fused=True, capturable=device == "cuda"
        )
        self.step, self.seconds, self.file = 0, 0.0, folder / "checkpoint.safetensors"
        self.replay: Replay | None = Replay(self) if device == "cuda" else None
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

        state = load_file(self.file, self.device)
        with safe_open(self.file, "pt") as f:
            self.step, self.seconds = int(f.metadata()["step"]), float(f.metadata()["seconds"])
        self.model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        self.average = {k[8:]: v for k, v in state.items() if k.startswith("average.")}
        for name, p in self.model.named_parameters():
            # The fused optimizer goes through memory as it lies: the moments must lie as their parameter does.
            moments = {k: torch.empty_like(p).copy_(state[f"{k}.{name}"]) for k in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(float(self.step), device=self.device)
            self.optimizer.state[p] = {"step": step, **moments}

    def begin(self, bundle: Path) -> None:
        """Take the weights of a bundle that an earlier training was exported to."""
        opened = Bundle.open(bundle)
        parts = {"unet": opened.program("denoiser"), "text_encoder": opened.program("text_encoder")}
        weights = {f"{part}.{k}": v for part, program in parts.items() for k, v in values(program.weights).items()}
        self.model.load_state_dict({k: weights[k] for k in self.model.state_dict()})
        self.average = {k: weights[k].detach().clone() for k in self.average}

    def learn(self, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """Forward, backward, optimizer and moving average; the loss, still on its device."""
        x, t, tokens, velocity = inputs
        with torch.autocast(self.device, dtype=torch.bfloat16), sdpa_kernel(ATTENTION[self.device]):
            out = forward(x, t, tokens)
        loss = F.mse_loss(out.float(), velocity)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for key, value in self.model.state_dict().items():
            self.average[key].lerp_(value, self.keep)
        return loss.detach()

    def advance(self, inputs: tuple[Tensor, ...], rate: float) -> Tensor:
        """One optimizer step; returns the loss."""
        self.rate.fill_(rate)
        self.keep.fill_(1 - min(0.999, (1 + self.step) / (10 + self.step)))
        loss = self.learn(self.model, inputs) if self.replay is None else self.replay(inputs)
        self.step += 1
        return loss


class Replay:
    """A run's step on a GPU: compiled, run a few times, then one CUDA graph that is fed and replayed."""

    WARM = 3

    def __init__(self, run: Run):
        self.run, self.forward = run, torch.compile(run.model, dynamic=False)
        self.stream, self.calls = torch.cuda.Stream(), 0

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARM:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.run.learn(self.forward, inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.calls == self.WARM + 1:
            self.fed, self.graph = tuple(i.clone() for i in inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.run.learn(self.forward, self.fed)
        for mine, given in zip(self.fed, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.loss.clone()


@dataclass(frozen=True)
class Settings:
    """``steps`` of ``batch`` pictures of ``size`` pixels a side; ``peak``: the highest learning rate."""

    steps: int
    size: int = 32
    batch: int = 64
    peak: float = 8e-4
    device: str = "cpu"
    font: Path = data.FONT


def train(folder: Path, settings: Settings, until: int | None = None, start: Path | None = None) -> Run:
    """Train (from the folder's checkpoint, if there is one), logging one JSON line in fifty steps.

    ``until`` stops before the end; a later call goes on from there.  ``start`` is a bundle whose weights a new run
    begins with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    emoji = data.load(settings.size, settings.font)
    tok = data.tokenizer(emoji.captions)
    tok.save(str(folder / "tokenizer.json"))
    run = Run(tok.get_vocab_size(), folder, NETWORKS[settings.size], settings.device)
    if start is not None and run.step == 0:
        run.begin(start)
    configs = {"unet": asdict(run.model.unet.cfg), "text_encoder": asdict(run.model.text_encoder.cfg)}
    facts = {"size": settings.size, "batch": settings.batch, "device": name_of(settings.device)}
    facts["pictures"] = len(emoji.captions)
    (folder / "config.json").write_text(json.dumps(configs | facts, indent=1))
    batches, end = Batches(emoji, tok, settings.device), until or settings.steps
    smooth: Tensor | None = None
    began, before = time.monotonic(), run.seconds
    loss_text = TextColumn("loss {task.fields[loss]:.4f}")
    with Progress(TextColumn("emoji"), BarColumn(), MofNCompleteColumn(), loss_text, TimeRemainingColumn()) as progress:
        task = progress.add_task("train", total=settings.steps, completed=run.step, loss=math.nan)
        while run.step < (settings.steps if until is None else until):
            rate = learning_rate(run.step, settings.steps, settings.peak)
            loss = run.advance(batches(run.step, settings.batch), rate)
            smooth = loss if smooth is None else smooth.lerp(loss, 0.02)
            if run.step % 50 == 0 or settings.device == "cpu":  # reading the loss waits for a GPU
                progress.update(task, completed=run.step, loss=float(smooth))
            run.seconds = before + time.monotonic() - began
            if run.step % 50 == 0:
                with open(folder / "log.jsonl", "a") as log:
                    line = {"step": run.step, "loss": float(smooth), "seconds": round(run.seconds, 1)}
                    log.write(json.dumps(line) + "\n")
            if run.step % SAVE[settings.device] == 0 or run.step == end:
                run.save()
    return run


def name_of(device: str) -> str:
    """What the card says the training ran on."""
    count = torch.get_num_threads()
    return torch.cuda.get_device_name() if device == "cuda" else f"{count} CPU thread{'s' * (count != 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/emoji"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, choices=NETWORKS, help="pixels a side: 64 on a GPU, 32 on a CPU")
    parser.add_argument("--steps", type=int, help="4300 on a GPU, 8000 on a CPU")
    parser.add_argument("--batch", type=int, help="256 on a GPU, 64 on a CPU")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--start", type=Path, help="a bundle whose weights a new run begins with")
    parser.add_argument("--font", type=Path, default=data.FONT)
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS's sums may differ from run to run
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check for tests, which costs a pass over memory
    size, steps, batch = (64, 4300, 256) if args.device == "cuda" else (32, 8000, 64)
    settings = Settings(args.steps or steps, args.size or size, args.batch or batch, args.lr, args.device, args.font)
    train(args.out, settings, start=args.start)


if __name__ == "__main__":
    main()
