"""Seeds and the noise they stand for.

Noise is a function of (seed, sample, step, element), never a stream.  A loop's first state is drawn at step 0 of the
counter and its evaluation number n (from 1) draws at step n, so no two draws of one seed ever meet.  A generator of one
pass draws its latent at step 0 and the noise of its layer k (from 0) at step k + 1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fusegen.runtime.errors import RequestError


def check_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """``seeds`` as integers in [0, 2**64); RequestError names the first that is not."""
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable):
        raise RequestError("seeds is not a list of integers", "seeds", f"it is {seeds!r:.80}")
    out = []
    for seed in seeds:
        try:
            value = -1 if isinstance(seed, bool) else operator.index(seed)
        except TypeError:
            value = -1
        if not 0 <= value < 2**64:
            raise RequestError("a seed is not an integer from 0 to 2^64 - 1", "seeds", f"it is {seed!r:.80}")
        out.append(value)
    return tuple(out)


def seed_tensor(seeds: Iterable[int], device: str | torch.device = "cpu") -> Tensor:
    """``seeds`` as the kernels take them: (B,) int64 that hold the same 64 bits."""
    values = [s - 2**64 if s >= 2**63 else s for s in check_seeds(seeds)]
    return torch.tensor(values, dtype=torch.int64, device=device)


def initial(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Unit noise (B, *shape), float32, of each seed's step 0."""
    return at(seeds, shape, 0)


def at(seeds: Tensor, shape: Sequence[int], step: int) -> Tensor:
    """Unit noise (B, *shape), float32, of each seed's ``step``."""
    noise: Tensor = torch.ops.fusegen.noise_normal(seeds, list(shape), step)
    return noise
