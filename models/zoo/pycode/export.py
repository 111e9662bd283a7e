"""Make the pycode bundle: ``python -m fusegen.models.zoo.pycode.export build/pycode -o models/zoo/pycode.fg``.

From a training folder: the weights in ``checkpoint.safetensors``, ``config.json`` and ``tokenizer.json``.  What the
card says is measured here, on the files held out, with the weights as the bundle stores them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from fusegen.models.gpt import GPT, Decoder, GPTConfig
from fusegen.models.text_generation import TextGeneration
from fusegen.models.text_request import TextConfig, TextDefaults
from fusegen.models.zoo.pycode import data, measure
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.loop.decode import with_sampler
from fusegen.runtime.program import Program

BATCH, CHUNK = 64, 64  # the most sequences, and the most of a prompt's tokens, in one run of the decoder
CARD = Path(__file__).with_name("card.md")
TOKENS = dict(zip(("end", "prefix", "suffix", "middle"), data.SPECIAL, strict=True)) | {"begin": data.END}
SAMPLER: dict[str, Any] = {
    "max_tokens": 128,
    "temperature": 0.6,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.1,
}


def network(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """The trained network of a training folder, and its configuration with the training's own figures."""
    config = json.loads((folder / "config.json").read_text())
    context = -(-config["length"] // CHUNK) * CHUNK  # what it was trained on: it knows no position beyond
    gpt = GPT(GPTConfig(**config["gpt"] | {"context": context}))
    with safe_open(folder / "checkpoint.safetensors", "pt") as f:
        names = [k for k in f.keys() if k.startswith("model.")]  # noqa: SIM118 (it has no iterator)
        gpt.load_state_dict({k.removeprefix("model."): f.get_tensor(k) for k in names})
        facts = dict(f.metadata())
    return gpt.eval(), config | {"steps": int(facts["step"]), "seconds": float(facts["seconds"])}


def decoder(gpt: GPT) -> Program:
    """The network as a program whose batch is free from 1 to ``BATCH``, and its tokens from 1 to ``CHUNK``."""
    module, batch = Decoder(gpt), ("batch", 1, BATCH)
    caches = module.caches(2)
    tokens, positions, last = (torch.ones(shape, dtype=torch.int64) for shape in ((2, 3), 2, 2))  # no two are one
    dynamic = {"tokens": {0: batch, 1: ("n", 1, CHUNK)}, "positions": {0: batch}, "last": {0: batch}}
    dynamic["caches"] = [{0: batch}] * len(caches)  # type: ignore[assignment]
    return capture(module, (tokens, positions, last, caches), None, dynamic, "decoder")


@dataclass(frozen=True)
class Quality:
    """``loss``: nats a token; ``bits``: bits a byte of text; ``accuracy``: the part of tokens that were likeliest."""

    loss: float
    bits: float
    accuracy: float
    tokens: int


@torch.no_grad()
def quality(gpt: GPT, tok: Tokenizer, texts: Sequence[str], length: int) -> Quality:
    """Of every token of ``texts``, each text in windows of ``length`` that begin with ``<|end|>``."""
    end = data.special(tok)[0]
    loss, right, count = 0.0, 0, 0
    for encoded in tok.encode_batch(list(texts)):
        ids = np.array(encoded.ids, dtype=np.int64)
        windows = np.full((-(-len(ids) // length), length + 1), -100, dtype=np.int64)
        windows[:, 0] = end
        for row, at in zip(windows, range(0, len(ids), length), strict=True):
            row[1 : 1 + len(ids[at : at + length])] = ids[at : at + length]
        for part in torch.from_numpy(windows).split(16):
            logits, target = gpt(part[:, :-1].clamp(min=0)).flatten(0, 1), part[:, 1:].flatten()
            loss += float(F.cross_entropy(logits, target, reduction="sum"))
            right += int((logits.argmax(-1) == target).sum())
            count += int((target >= 0).sum())
    size = sum(len(t.encode()) for t in texts)
    return Quality(loss / count, loss / math.log(2) / size, right / count, count)


def rounded(gpt: GPT) -> GPT:
    """The network with its weights as they are stored."""
    state: dict[str, Tensor] = {k: v.bfloat16().float() for k, v in gpt.state_dict().items()}
    gpt.load_state_dict(state)
    return gpt


def written(model: TextGeneration, texts: Sequence[str], lines: int, functions: int) -> dict[str, Any]:
    """What the model writes of ``texts``, for the card."""
    facts: dict[str, Any] = {"lines": lines, "before": measure.BEFORE, "after": measure.AFTER, "functions": functions}
    for name, within in (("line", False), ("rest", True)):
        found = measure.holes(texts, lines, within)
        for kind, suffix in (("", True), ("_alone", False)):
            filled = measure.fill(model, found, suffix)
            facts |= {f"{name}_exact{kind}": f"{filled.exact:.1%}", f"{name}_similar{kind}": f"{filled.similar:.2f}"}
    return facts | {"parsing": f"{measure.parsing(model, texts, functions):.0%}"}


def export(
    folder: Path, out: Path, sources: data.Sources, lines: int = measure.LINES, functions: int = measure.FUNCTIONS
) -> Manifest:
    """Write the bundle ``out`` from the training ``folder``; returns its manifest."""
    gpt, config = network(folder)
    tok, texts = Tokenizer.from_file(str(folder / "tokenizer.json")), list(sources.held_out.values())
    measured, program = quality(rounded(gpt), tok, texts, config["length"]), decoder(gpt)
    loop: dict[str, Any] = {"context": gpt.cfg.context, "fill": "spm", **TOKENS}
    session = compile_program(with_sampler(program, gpt.cfg.context), "cpu", torch.float32, deterministic=True)
    model = TextGeneration(tok, session, TextConfig(**loop), TextDefaults(**SAMPLER))
    facts = vars(gpt.cfg) | {k: config[k] for k in ("batch", "length", "threads")}
    facts |= written(model, texts, lines, functions) | {"tail": f"{config['tail']:.0%}"}
    facts |= {"head_dim": gpt.cfg.head_dim, "millions": f"{sum(p.numel() for p in gpt.parameters()) / 1e6:.1f}"}
    facts |= {"python": platform.python_version(), "files": config["files"], "characters": f"{config['characters']:,}"}
    facts |= {"steps": f"{config['steps']:,}", "minutes": f"{config['seconds'] / 60:.0f}"}
    facts |= {"tokens": f"{config['steps'] * config['batch'] * config['length'] / 1e6:.1f} million"}
    facts |= {"perplexity": f"{math.exp(measured.loss):.2f}", "bits": f"{measured.bits:.3f}"}
    facts |= {"accuracy": f"{measured.accuracy:.1%}", "held_tokens": f"{measured.tokens:,}", "held_files": len(texts)}
    manifest = Manifest(
        name="pycode",
        family="text-generation",
        loop=loop,
        sampler=SAMPLER,
        quality={"held_out": vars(measured)},
        licence="PSF-2.0",
        card=CARD.read_text().format(**facts),
    )
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes(), "card.md": manifest.card.encode()}
    return Bundle.write(out, manifest, {"decoder": program}, files, "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the training folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("models/zoo/pycode.fg"))
    parser.add_argument("--source", type=Path, help="the standard library's folder that it was trained on")
    args = parser.parse_args()
    export(args.folder, args.output, data.load(args.source))
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
