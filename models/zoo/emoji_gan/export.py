"""Make the emoji-gan bundle: ``python -m fusegen.models.zoo.emoji_gan.export build/emoji-gan``.

From a training folder: the moving average of the generator's weights in ``checkpoint.safetensors``, and
``config.json``.  The statistics of w are measured here: its mean, and the directions in which it varies most (Härkönen
et al. 2020, GANSpace).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fusegen.models.stylegan2 import Generator, StyleGAN2Config
from fusegen.models.zoo.emoji.export import averages
from fusegen.runtime import noise
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.program import Program

FAMILY, BATCH = "gan", 128
SAMPLER = {"psi": 0.7}
DRAWN, DIRECTIONS = 10_000, 16  # latents that the statistics are of; the most directions that are kept
CARD = Path(__file__).with_name("card.md")


def generator(folder: Path) -> tuple[Generator, dict[str, Any]]:
    """The averaged generator of a training folder, and its configuration with the training's own figures."""
    config = json.loads((folder / "config.json").read_text())
    weights, facts = averages(folder / "checkpoint.safetensors")
    sizes = config["network"]
    net = Generator(StyleGAN2Config(**sizes | {"channels": sizes["channels"] and tuple(sizes["channels"])}))
    net.load_state_dict(weights)
    return net.eval(), config | {k: float(facts[k]) for k in ("step", "seconds", "p")}


def latents(mapping: Program) -> dict[str, Tensor]:
    """``w_mean`` (W,), unit ``directions`` (K, W) and the ``deviations`` (K,) along them, float32: the mean and the
    principal components of w, of the seeds from 0 to ``DRAWN``."""
    session = compile_program(mapping, "cpu", torch.float32)
    (spec,) = mapping.inputs.values()
    z = noise.initial(noise.seed_tensor(range(DRAWN)), [int(n) for n in spec.shape[1:]])
    w = torch.cat([session(part) for part in z.split(BATCH)]).double()
    mean = w.mean(0)
    _, lengths, directions = torch.linalg.svd(w - mean, full_matrices=False)
    kept = min(DIRECTIONS, len(directions))
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # the largest element is positive
    found = {"w_mean": mean, "directions": (directions * signs)[:kept], "deviations": lengths[:kept] / DRAWN**0.5}
    return {k: v.float().contiguous() for k, v in found.items()}


def programs(net: Generator) -> dict[str, Program]:
    """Both networks as programs whose batch is free from 1 to ``BATCH``."""
    cfg, batch = net.synthesis.cfg, {0: ("batch", 1, BATCH)}
    z, ws = torch.randn(2, cfg.z_width), torch.randn(2, cfg.layers, cfg.w_width)
    drawn = [torch.randn(shape) for shape in cfg.noises(2)]
    free = {"ws": batch, "noise": tuple(batch for _ in drawn)}
    return {
        "mapping": capture(net.mapping, (z,), dynamic={"z": batch}, name="mapping"),
        "synthesis": capture(net.synthesis, (ws, *drawn), dynamic=free, name="synthesis"),
    }


def export(folder: Path, out: Path, storage_dtype: str = "float16") -> Manifest:
    """Write the bundle ``out`` from the training ``folder``; returns its manifest."""
    net, config = generator(folder)
    cfg, size = net.synthesis.cfg, net.synthesis.cfg.resolution
    count = sum(p.numel() for p in net.parameters())
    facts = {"steps": f"{config['step']:,.0f}", "minutes": f"{config['seconds'] / 60:.0f}", "size": size}
    facts |= {
        "kimg": f"{config['step'] * config['batch'] / 1000:,.0f}",
        "batch": config["batch"],
        "p": f"{config['p']:.2f}",
    }
    facts |= {"pictures": f"{config['pictures']:,}", "millions": f"{count / 1e6:.1f}", "device": config["device"]}
    facts |= {"widths": ", ".join(map(str, cfg.widths)), "z": cfg.z_width, "layers": cfg.mapping_layers}
    card = CARD.read_text().format(**facts)
    image = {"width": size, "height": size, "least": size, "most": size}
    loop = {"kind": "single", "image": image}
    manifest = Manifest(name="emoji-gan", family=FAMILY, loop=loop, sampler=SAMPLER, licence="OFL-1.1", card=card)
    made = programs(net)
    files = {"latents.safetensors": save(latents(made["mapping"])), "card.md": card.encode()}
    return Bundle.write(out, manifest, made, files, storage_dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the training folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("models/zoo/emoji-gan.fg"))
    args = parser.parse_args()
    export(args.folder, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
