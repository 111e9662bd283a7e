"""Pictures from seeds: a grid, a matrix of mixed styles, a walk as a video."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import fusegen
from fusegen import pictures, video
from fusegen.demo.beside import Beside, compare, file, say, show_plan
from fusegen.generators.gan import matrix

if TYPE_CHECKING:
    from fusegen.models.gan import Gan

MODEL = "emoji-gan"
GRID, SCALE = 48, 4  # pictures, and pixels a pixel
DOWN, ACROSS, COARSE = (0, 1, 2, 3), (10, 11, 12, 13, 14), (0, 1, 2)
FRAMES, STOPS = 60, range(5)
COMPARED, SECONDS = (1, 16), 2.0  # pictures a call, and about how long each side is timed


def show() -> list[Beside]:
    """Make a grid, a matrix and a walk, then the numbers of pictures that are compared."""
    say(f"{MODEL}: a picture a seed")
    start = time.perf_counter()
    model: Gan = fusegen.load(MODEL)
    print(f"   loaded in {time.perf_counter() - start:.1f} s; psi {model.settings()['psi']:g}")
    facts = {"model": MODEL, **model.settings()}
    start = time.perf_counter()
    grid = pictures.grid(model.generate(range(GRID)), columns=12)
    print(f"   {GRID} pictures in {time.perf_counter() - start:.2f} s, the first call's planning among it")
    pictures.save(pictures.enlarged(grid, SCALE), file("emoji-gan.png"), facts | {"seeds": list(range(GRID))})
    mixed = pictures.enlarged(matrix(model, DOWN, ACROSS, COARSE), SCALE)
    pictures.save(mixed, file("emoji-gan-mix.png"), facts | {"seeds": DOWN, "mix_seeds": ACROSS, "mix": COARSE})
    start = time.perf_counter()
    count = video.save(model.walk(STOPS, FRAMES), file("emoji-gan-walk.mp4"), facts=facts)
    print(f"   a walk of {count} frames in {time.perf_counter() - start:.2f} s, H.264 among it")
    print(f"   {file('emoji-gan.png')}, ...-mix.png (the coarse styles of the first row), ...-walk.mp4")
    show_plan(model.synthesis.plan, "the synthesis network")
    return [beside(model, count) for count in COMPARED]


def beside(model: Gan, count: int) -> Beside:
    """The same networks in eager PyTorch, in the same dtype."""
    from fusegen.bench import gan_models, picture_models, verify
    from fusegen.runtime.compile import default_dtype

    dtype = str(default_dtype(model.device)).removeprefix("torch.")
    say(f"{MODEL} beside eager PyTorch: {count} picture{'s' * (count > 1)} a call")
    eager = gan_models.contender("eager", dtype).make(count)
    calls = {"eager": eager, "fusegen": lambda: model.generate(range(count), psi=gan_models.PSI)}
    made = {name: picture_models.pixels(call()) for name, call in calls.items()}
    bound = gan_models.PIXELS[dtype]
    verdict = verify.check([made["fusegen"]], [made["eager"]], bound)
    return compare(MODEL, dtype, count, "pictures", calls, verdict, bound, SECONDS)
