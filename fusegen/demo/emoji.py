"""Pictures from prompts."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import fusegen
from fusegen import pictures
from fusegen.demo.beside import Beside, compare, file, say, show_plan

if TYPE_CHECKING:
    from fusegen.models.text_to_image import TextToImage

MODEL = "emoji"
PROMPTS = ("pig face", "red circle", "slice of pizza", "blue heart", "cat face", "green apple", "rocket", "guitar")
EACH, SCALE = 6, 2  # pictures a prompt, and pixels a pixel
COMPARED, SECONDS = 4, 4.0  # pictures a call, and about how long each side is timed


def show() -> list[Beside]:
    """Make a sheet, then as many pictures as are compared."""
    from rich.progress import track

    from fusegen.runtime.compile import default_dtype

    say(f"{MODEL}: pictures from words")
    start = time.perf_counter()
    model: TextToImage = fusegen.load(MODEL)
    print(f"   loaded in {time.perf_counter() - start:.1f} s; {default_dtype(model.device)} on the {model.device}")
    start, images = time.perf_counter(), []
    for prompt in track(PROMPTS, description="   generating", disable=not sys.stdout.isatty()):
        images += model.generate(prompt, seeds=range(EACH))
    seconds = time.perf_counter() - start
    facts = {"model": MODEL, "prompts": PROMPTS, "seeds": list(range(EACH))}
    pictures.save(pictures.enlarged(pictures.grid(images, columns=EACH), SCALE), file("emoji.png"), facts)
    each = ", ".join(f"{key} {value}" for key, value in model.settings().items())
    print(f"   {len(images)} pictures in {seconds:.1f} s ({each}); a row a prompt: {', '.join(PROMPTS)}")
    print(f"   {file('emoji.png')}")
    show_plan(model.denoiser.plan, "the denoiser (fusegen plan emoji shows all of it)")
    return [beside(model)]


def beside(model: TextToImage) -> Beside:
    """The same networks in eager PyTorch, in the same dtype."""
    from fusegen.bench import picture_models, verify
    from fusegen.bench.pipelines import EagerTextToImage
    from fusegen.runtime.compile import default_dtype

    dtype = default_dtype(model.device)
    say(f"{MODEL} beside eager PyTorch: {COMPARED} pictures a call")
    # A sampler that draws no noise of its own: eager PyTorch has no equal source of it.
    steps, guidance, sampler = picture_models.STEPS, picture_models.GUIDANCE, picture_models.SAMPLER
    seeds, eager = range(COMPARED), EagerTextToImage(model, dtype)
    calls = {
        "eager": lambda: eager.generate(PROMPTS[0], steps, guidance, seeds, sampler),
        "fusegen": lambda: model.generate(PROMPTS[0], "", steps, guidance, sampler, seeds),
    }
    made = {name: picture_models.pixels(call()) for name, call in calls.items()}
    bound = picture_models.BOUNDS[str(dtype).removeprefix("torch.")]
    verdict = verify.check([made["fusegen"]], [made["eager"]], bound)
    return compare(MODEL, dtype, COMPARED, "pictures", calls, verdict, bound, SECONDS)
