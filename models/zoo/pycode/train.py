"""Train the Python model: ``python -m fusegen.models.zoo.pycode.train --out build/pycode``.

Next-token prediction over windows of the standard library's source, much of them for filling in the middle.  The
matrices of the blocks learn by Muon (Jordan et al. 2024; its step scaled to AdamW's, Liu et al. 2025,
arXiv:2502.16982), the rest by AdamW; a short warm-up, a constant rate, and a cosine down to zero at the end.  So how
long a run takes can be decided while it runs: with other ``--steps`` when it goes on, or by ``--minutes``, after which
the number of steps is what was written to ``config.json`` when the cosine began.  Every step draws from a generator
seeded with the step's own number, so a run that was stopped goes on with the bits it would have had.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from fusegen.models.gpt import GPT, GPTConfig
from fusegen.models.zoo.pycode import data

WARM = 100  # steps of the warm-up
MATRICES, REST = "muon", "adamw"
STATE = {MATRICES: ("momentum_buffer",), REST: ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Settings:
    """``steps`` of ``batch`` windows of ``length`` tokens; ``peak``: the highest learning rate; ``tail``: the part of
    the steps that the cosine takes; ``save``: seconds between checkpoints.  ``steps`` None: as many as ``minutes`` on
    the clock allow."""

    steps: int | None
    tail: float = 0.3
    batch: int = 16
    length: int = 256
    peak: float = 4e-3
    save: float = 300.0
    minutes: float = 60.0

    def at(self, step: int, seconds: float) -> Settings:
        """These settings with the number of steps decided, once the cosine has to begin."""
        if self.steps is None and seconds >= (1 - self.tail) * 60 * self.minutes:
            return replace(self, steps=max(1, round(step / (1 - self.tail))))
        return self


def network(vocabulary: int) -> GPTConfig:
    """The sizes of pycode's network: 4.5 million parameters at 4096 tokens."""
    return GPTConfig(vocabulary, context=256, width=256, layers=5, heads=4, kv_heads=2, hidden=640)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, constant, then a cosine down to zero."""
    tail = 0.0
    if settings.steps is not None:
        length = settings.tail * settings.steps
        tail = max(0.0, (step - settings.steps + length) / length)
    return settings.peak * min(1.0, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * tail))


class Run:
    """A network, its two optimizers and how far they are; ``folder`` holds the checkpoint."""

    def __init__(self, config: GPTConfig, folder: Path):
        torch.manual_seed(0)
        self.model, self.file = GPT(config), folder / "checkpoint.safetensors"
        inner = {k for k, p in self.model.named_parameters() if p.dim() == 2 and k.startswith("layers.")}
        self.groups = {name: dict[str, nn.Parameter]() for name in STATE}
        for key, p in self.model.named_parameters():
            self.groups[MATRICES if key in inner else REST][key] = p
        muon = torch.optim.Muon(self.groups[MATRICES].values(), 1.0, 0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(self.groups[REST].values(), 1.0, (0.9, 0.97), weight_decay=0.0)
        self.optimizers: dict[str, torch.optim.Optimizer] = {MATRICES: muon, REST: adam}
        self.step, self.seconds = 0, 0.0
        if self.file.exists():
            self.load()

    def save(self) -> None:
        """Write the checkpoint beside the last one, then take its place."""
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for key, p in self.groups[name].items():
                state |= {f"{s}.{key}": optimizer.state[p][s] for s in STATE[name] if p in optimizer.state}
        part = self.file.with_suffix(".part")
        save_file(state, part, metadata={"step": str(self.step), "seconds": str(self.seconds)})
        part.replace(self.file)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = load_file(self.file)
        with safe_open(self.file, "pt") as f:
            self.step, self.seconds = int(f.metadata()["step"]), float(f.metadata()["seconds"])
        self.model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        for name, optimizer in self.optimizers.items():
            for key, p in self.groups[name].items():
                optimizer.state[p] = {s: state[f"{s}.{key}"] for s in STATE[name]}
                if name == REST:
                    optimizer.state[p]["step"] = torch.tensor(float(self.step))

    def advance(self, tokens: Tensor, rate: float) -> float:
        """One step on windows (B, n + 1); returns the loss in nats a token."""
        loss = loss_of(self.model, tokens)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step += 1
        return float(loss.detach())


def loss_of(model: GPT, tokens: Tensor) -> Tensor:
    """The mean loss of windows (B, n + 1), -100 behind their ends, in bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[:, :-1].clamp(min=0))
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def prepare(folder: Path, sources: data.Sources) -> Tokenizer:
    """The tokenizer of a training folder, made the first time."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    if not file.exists():
        data.tokenizer(list(sources.train.values())).save(str(file))
    return Tokenizer.from_file(str(file))


def decided(folder: Path) -> int | None:
    """The number of steps that an earlier part of a run by the clock has decided."""
    file = folder / "config.json"
    return json.loads(file.read_text()).get("steps") if file.exists() else None


def describe(folder: Path, run: Run, settings: Settings, sources: data.Sources) -> None:
    """Write ``config.json``: the network, and what it was trained on and how."""
    facts: dict[str, float | None] = {"files": len(sources.train), "characters": sum(map(len, sources.train.values()))}
    facts |= {k: getattr(settings, k) for k in ("steps", "batch", "length", "tail")}
    facts |= {"threads": torch.get_num_threads()}
    (folder / "config.json").write_text(json.dumps({"gpt": asdict(run.model.cfg)} | facts, indent=1))


def train(folder: Path, settings: Settings, sources: data.Sources, until: int | None = None) -> Run:
    """Train (from the folder's checkpoint, if there is one), logging one JSON line in ten steps.

    ``until`` stops before the end; a later call goes on from there.
    """
    tok = prepare(folder, sources)
    run = Run(network(tok.get_vocab_size()), folder)
    settings = settings if settings.steps is not None else replace(settings, steps=decided(folder))
    describe(folder, run, settings, sources)
    windows = data.Windows(list(sources.train.values()), tok, settings.length)
    smooth, began, before, saved = math.nan, time.monotonic(), run.seconds, time.monotonic()
    columns = (TextColumn("pycode"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("train", total=settings.steps, completed=run.step, loss=math.nan)
        while run.step != (settings.steps if until is None else until):
            rate = learning_rate(run.step, settings)
            loss = run.advance(torch.from_numpy(windows.batch(run.step, settings.batch)), rate)
            smooth = loss if math.isnan(smooth) else smooth + 0.02 * (loss - smooth)
            run.seconds = before + time.monotonic() - began
            if settings.steps is None and (settings := settings.at(run.step, run.seconds)).steps:
                describe(folder, run, settings, sources)
            progress.update(task, completed=run.step, total=settings.steps, loss=smooth)
            if run.step % 10 == 0:
                with open(folder / "log.jsonl", "a") as log:
                    line = {"step": run.step, "loss": smooth, "seconds": round(run.seconds, 1)}
                    log.write(json.dumps(line) + "\n")
            if run.step in (settings.steps, until) or time.monotonic() - saved > settings.save:
                run.save()
                saved = time.monotonic()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pycode"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=4000)
    length.add_argument("--minutes", type=float, help="as many steps as these minutes on the clock allow")
    parser.add_argument("--tail", type=float, default=0.3, help="the part of the steps over which the rate falls to 0")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--source", type=Path, help="a standard library's folder; the running interpreter's by default")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check for tests
    settings = Settings(args.steps, args.tail, args.batch, peak=args.lr)
    if args.minutes is not None:
        settings = replace(settings, steps=None, minutes=args.minutes)
    train(args.out, settings, data.load(args.source))


if __name__ == "__main__":
    main()
