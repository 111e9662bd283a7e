"""The tables of rotary position embedding: frequencies, the ways to stretch them, and cosines and sines of positions.

All is worked out on the host in float64 and rounded once.  The tables have an entry for each pair of features, as the
op ``rope`` takes them: (L, dim / 2), whatever the layout of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.errors import RequestError


@dataclass(frozen=True)
class Scaling:
    """How frequencies are changed so that a model reaches past the length it was trained on.

    Field names are those of ``rope_parameters`` in a transformers configuration; ``rope_type`` is a key of
    :data:`KINDS`.  ``original_max_position_embeddings``: the length (positions) that the model was trained on.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @staticmethod
    def of(parameters: Mapping[str, Any]) -> Scaling:
        """That of a configuration's mapping; None, ``rope_theta`` and what other rules use are left out.

        Raises RequestError for a ``rope_type`` that is not known.
        """
        known = {f.name for f in fields(Scaling)}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items() if k in known}
        scaling = Scaling(**{k: v for k, v in given.items() if v is not None})
        if scaling.rope_type not in KINDS:
            mend = f"there are {', '.join(KINDS)}"
            raise RequestError(f"no scaling of rotary positions is called {scaling.rope_type!r}", mend=mend)
        return scaling


def plain(dim: int, base: float) -> Tensor:
    """base ** (-2 i / dim) for i < dim / 2: radians a position (Su et al. 2021, section 3.2.2)."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _default(dim: int, base: float, length: int, s: Scaling) -> tuple[Tensor, float]:
    return plain(dim, base), 1.0


def _linear(dim: int, base: float, length: int, s: Scaling) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return plain(dim, base) / s.factor, 1.0


def _dynamic(dim: int, base: float, length: int, s: Scaling) -> tuple[Tensor, float]:
    """NTK-aware: a base that grows with the length past the trained one (Peng et al. 2023, arXiv:2309.00071, 3.1)."""
    trained = s.original_max_position_embeddings
    stretch = s.factor * max(length, trained) / trained - (s.factor - 1)
    return plain(dim, base * stretch ** (dim / (dim - 2))), 1.0


def _yarn(dim: int, base: float, length: int, s: Scaling) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, section 3.4): between ``beta_slow`` and ``beta_fast`` turns over the trained length, a
    ramp from interpolated to untouched frequencies; and a temperature of the scores, as a factor of both tables."""

    def feature(turns: float) -> float:
        return dim * math.log(s.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = feature(s.beta_fast), feature(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    untouched = plain(dim, base)
    return untouched / s.factor * ramp + untouched * (1 - ramp), _temperature(s)


def _temperature(s: Scaling) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(s.factor) + 1 if s.factor > 1 else 1.0

    if s.attention_factor is not None:
        return s.attention_factor
    return scale(s.mscale) / scale(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else scale(1.0)


def _longrope(dim: int, base: float, length: int, s: Scaling) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor for each frequency, of two sets by the length."""
    trained = s.original_max_position_embeddings
    divisors = torch.tensor(s.long_factor if length > trained else s.short_factor, dtype=torch.float64)
    grown = math.sqrt(1 + math.log(s.factor) / math.log(trained)) if s.factor > 1 else 1.0
    return plain(dim, base) / divisors, grown if s.attention_factor is None else s.attention_factor


def _llama3(dim: int, base: float, length: int, s: Scaling) -> tuple[Tensor, float]:
    """Llama 3.1's: waves longer than trained / low are interpolated, those shorter than trained / high are not."""
    untouched = plain(dim, base)
    waves = s.original_max_position_embeddings * untouched / (2 * math.pi)  # over the trained length
    kept = ((waves - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return untouched * (kept + (1 - kept) / s.factor), 1.0


KINDS: Mapping[str, Callable[[int, float, int, Scaling], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def frequencies(dim: int, base: float = 10000.0, scaling: Scaling = Scaling(), length: int = 0) -> tuple[Tensor, float]:
    """Radians a position for each of dim / 2 pairs, float64, and the factor that both tables are multiplied by.

    ``length``: positions in use, which "dynamic" and "longrope" depend on.  Raises RequestError where the scaling lacks
    what its kind needs.
    """
    kind = scaling.rope_type
    if kind not in ("default", "linear") and scaling.original_max_position_embeddings < 1:
        raise RequestError(f"rotary scaling {kind!r} needs original_max_position_embeddings")
    if kind == "longrope" and {len(scaling.short_factor), len(scaling.long_factor)} != {dim // 2}:
        raise RequestError(f"rotary scaling 'longrope' needs {dim // 2} short and long factors")
    return KINDS[kind](dim, base, length, scaling)


def tables(positions: Tensor, radians: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (*, dim / 2), of positions (*) times ``radians`` (dim / 2), times ``factor``."""
    angles = positions.to(torch.float64)[..., None] * radians
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def axis_tables(positions: Tensor, dims: Sequence[int], base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Tables (L, sum(dims) / 2) of positions (L, axes): axis a turns ``dims[a]`` features (Flux, Wan; images, video).

    Raises RequestError where the axes differ in number.
    """
    if positions.shape[-1] != len(dims):
        raise RequestError(f"{positions.shape[-1]} axes of positions, and dimensions for {len(dims)}")
    parts = [tables(positions[..., a], plain(dim, base)) for a, dim in enumerate(dims)]
    return torch.cat([cos for cos, _ in parts], -1), torch.cat([sin for _, sin in parts], -1)


def grid(*sizes: int) -> Tensor:
    """Positions (L, axes) of a grid's points, the last axis fastest: frames, rows and columns of a video."""
    return torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, len(sizes))
