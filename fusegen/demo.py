"""``make demo``: pictures from the zoo's model, the plan behind them, and the time beside eager PyTorch."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import fusegen
from fusegen import pictures

if TYPE_CHECKING:
    from fusegen.models.text_to_image import TextToImage

MODEL = "emoji"
PROMPTS = ("pig face", "red circle", "slice of pizza", "blue heart", "cat face", "green apple", "rocket", "guitar")
EACH, SCALE = 6, 2  # pictures a prompt, and pixels a pixel
SHEET = Path("build/demo/emoji.png")
COMPARED, SECONDS = 8, 6.0  # pictures a call, and about how long each side is timed


def main() -> int:
    """Run the three parts; 1 where fusegen's pictures are not eager PyTorch's."""
    from PIL import Image
    from rich.progress import track

    from fusegen.runtime.compile import default_dtype

    print(f"== load {MODEL}", flush=True)
    start = time.perf_counter()
    model: TextToImage = fusegen.load(MODEL)
    print(f"   {time.perf_counter() - start:.1f} s; {default_dtype(model.device)} on the {model.device}")

    print(f"== generate: {', '.join(PROMPTS)}", flush=True)
    start, images = time.perf_counter(), []
    for prompt in track(PROMPTS, description="   generating"):
        images += model.generate(prompt, seeds=range(EACH))
    seconds = time.perf_counter() - start
    sheet = pictures.grid(images, columns=EACH)
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    large = sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.NEAREST)
    pictures.save(large, SHEET, {"model": MODEL, "prompts": PROMPTS, "seeds": list(range(EACH))})
    each = ", ".join(f"{key} {value}" for key, value in model.settings().items())
    print(f"   {len(images)} pictures in {seconds:.1f} s ({each})\n   a row a prompt: {SHEET.resolve()}")

    print("== plan of the denoiser (fusegen plan emoji shows all of it)")
    for line in str(model.denoiser.plan).split("\n\n")[0].splitlines():
        print(textwrap.fill(line, 118, initial_indent="   ", subsequent_indent="     "))
    return compare(model)


def compare(model: TextToImage) -> int:
    """Time ``COMPARED`` pictures beside eager PyTorch, in turn, once their pictures were found to agree."""
    import numpy as np
    import torch

    from fusegen.bench import picture_models, timing, verify
    from fusegen.bench.pipelines import EagerTextToImage
    from fusegen.runtime.compile import default_dtype

    dtype = default_dtype(model.device)
    print(f"== beside eager PyTorch, the same networks in the same dtype, {COMPARED} pictures a call", flush=True)
    # A sampler that draws no noise of its own: eager PyTorch has no equal source of it.
    steps, guidance, sampler = picture_models.STEPS, picture_models.GUIDANCE, picture_models.SAMPLER
    seeds, eager = range(COMPARED), EagerTextToImage(model, dtype)
    calls = {
        "eager": lambda: eager.generate(PROMPTS[0], steps, guidance, seeds, sampler),
        "fusegen": lambda: model.generate(PROMPTS[0], "", steps, guidance, sampler, seeds),
    }
    made = {name: torch.from_numpy(np.stack(call())).float() / 255 for name, call in calls.items()}
    bound = picture_models.BOUNDS[str(dtype).removeprefix("torch.")]
    verdict = verify.check([made["fusegen"]], [made["eager"]], bound)
    print(f"   pictures differ by {verdict.rms:.1e} of their root mean square (bound {bound.rms:g})")
    if not verdict.ok:
        print("   that is over the bound, so no time is given", file=sys.stderr)
        return 1
    timed = timing.interleave(calls, "eager", seconds=SECONDS, min_rounds=3, sample=0.0)
    for name, t in timed.items():
        spread = f"p20 {t.p20:.3f}, p80 {t.p80:.3f}"
        print(f"   {name:<8} {t.median:>7.3f} s a call ({spread}), {t.ratio:.2f} times eager's speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
