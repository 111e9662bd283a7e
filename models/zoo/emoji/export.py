"""Make the emoji bundle: ``python -m fusegen.models.zoo.emoji.export build/emoji -o models/zoo/emoji.fg``.

From a training folder: the moving average of the weights in ``checkpoint.safetensors``, ``config.json`` and
``tokenizer.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import UNet, UNetConfig
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.program import Program

BATCH = 128
CARD = Path(__file__).with_name("card.md")
SCHEDULE = {"betas": "cosine", "prediction": "v_prediction", "spacing": "trailing", "clip": 1.0}
SAMPLER = {"sampler": "euler_a", "steps": 25, "guidance": 3.0}


def averages(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The averaged weights by their module's name, and the checkpoint's metadata (step, seconds)."""
    with safe_open(file, "pt") as f:
        names = [k for k in f.keys() if k.startswith("average.")]  # noqa: SIM118 (it has no iterator)
        return {k.removeprefix("average."): f.get_tensor(k) for k in names}, dict(f.metadata())


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one module."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def modules(folder: Path) -> tuple[TextEncoder, UNet, dict[str, Any]]:
    """The trained networks of a training folder, and its configuration with the training's own figures."""
    config = json.loads((folder / "config.json").read_text())
    weights, facts = averages(folder / "checkpoint.safetensors")
    text = TextEncoder(TextEncoderConfig(**config["text_encoder"]))
    sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["unet"].items()}
    unet = UNet(UNetConfig(**sizes))
    text.load_state_dict(part(weights, "text_encoder."))
    unet.load_state_dict(part(weights, "unet."))
    return text.eval(), unet.eval(), config | {"steps": int(facts["step"]), "seconds": float(facts["seconds"])}


def programs(text: TextEncoder, unet: UNet, size: int) -> dict[str, Program]:
    """Both networks as programs whose batch is free from 1 to ``BATCH``."""
    batch = {0: ("batch", 1, BATCH)}
    tokens = torch.ones(2, text.cfg.length, dtype=torch.int64)
    x, t = torch.randn(2, unet.cfg.in_channels, size, size), torch.full((2,), 500.0)
    context = torch.randn(2, text.cfg.length, text.cfg.width)
    return {
        "text_encoder": capture(text, (tokens,), dynamic={"tokens": batch}, name="text_encoder"),
        "denoiser": capture(unet, (x, t, context), dynamic={"x": batch, "t": batch, "context": batch}, name="denoiser"),
    }


def export(folder: Path, out: Path, storage_dtype: str = "float16") -> Manifest:
    """Write the bundle ``out`` from the training ``folder``; returns its manifest."""
    text, unet, config = modules(folder)
    size = config["size"]
    facts = {"steps": f"{config['steps']:,}", "minutes": f"{config['seconds'] / 60:.0f}", "size": size}
    facts |= {"batch": config["batch"], "device": config["device"], "widths": ", ".join(map(str, unet.cfg.widths))}
    count = sum(p.numel() for net in (text, unet) for p in net.parameters())
    facts |= {"pictures": f"{config['pictures']:,}", "millions": f"{count / 1e6:.1f}"}
    card = CARD.read_text().format(**facts)
    image = {"width": size, "height": size, "least": size, "most": size}
    manifest = Manifest(
        name="emoji",
        family="text-to-image",
        loop={"schedule": SCHEDULE, "image": image},
        sampler=SAMPLER,
        licence="OFL-1.1",
        card=card,
    )
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes(), "card.md": card.encode()}
    return Bundle.write(out, manifest, programs(text, unet, size), files, storage_dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the training folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("models/zoo/emoji.fg"))
    args = parser.parse_args()
    export(args.folder, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
