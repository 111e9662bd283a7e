"""The arguments of ``sample_token``, what they may be, and its cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case

MOST = 1 << 22  # the largest vocabulary: sums of so many weights fit 63 bits

ARGUMENTS = (
    "logits seeds positions requests temperature top_k top_p min_p typical_p history history_lengths prompt_lengths "
    "repetition frequency presence bias bias_ids bias_values mask"
).split()
SHARED = ("bias", "bias_ids", "bias_values", "mask")  # one row of these may serve all
SCHEMA = f"(Tensor {', Tensor '.join(ARGUMENTS[:3])}, Tensor? {'=None, Tensor? '.join(ARGUMENTS[3:])}=None, "
SCHEMA += "int top=0, bool model=False) -> (Tensor, Tensor, Tensor, Tensor)"


class Arguments(NamedTuple):
    """The op's arguments by name; (B, V) logits and, where not None, tensors of the shapes in :func:`shapes`."""

    logits: Tensor
    seeds: Tensor
    positions: Tensor
    requests: Tensor | None = None
    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    typical_p: Tensor | None = None
    history: Tensor | None = None
    history_lengths: Tensor | None = None
    prompt_lengths: Tensor | None = None
    repetition: Tensor | None = None
    frequency: Tensor | None = None
    presence: Tensor | None = None
    bias: Tensor | None = None
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    mask: Tensor | None = None
    top: int = 0
    model: bool = False


_WHOLE = ("seeds", "positions", "requests", "top_k", "history", "history_lengths", "prompt_lengths", "bias_ids")


def shapes(a: Arguments) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The shapes each argument may have.  A mask is bool (true allows) or packed in int32, bit i % 32 of word i / 32
    for token i (1 allows); it and the biases may be shared by all rows."""
    batch, vocabulary = a.logits.shape
    words = vocabulary if a.mask is None or a.mask.dtype == torch.bool else -(-vocabulary // 32)
    length = a.history.shape[-1] if a.history is not None and a.history.dim() else 0
    pairs = a.bias_ids.shape[-1] if a.bias_ids is not None and a.bias_ids.dim() else 0
    table: dict[str, tuple[tuple[int, ...], ...]] = dict.fromkeys(ARGUMENTS[1:], ((batch,),))
    table["history"] = ((batch, length),)
    for name, width in (("bias", vocabulary), ("bias_ids", pairs), ("bias_values", pairs), ("mask", words)):
        table[name] = ((batch, width), (width,))
    return table


def check(a: Arguments) -> None:
    """Raise ValueError naming the argument that does not fit logits (B, V)."""
    if a.logits.dim() != 2 or not 1 <= a.logits.shape[1] <= MOST:
        raise ValueError(f"sample_token: logits {tuple(a.logits.shape)} is not (B, V) with V from 1 to {MOST}")
    for name, allowed in shapes(a).items():
        given = getattr(a, name)
        if given is None:
            continue
        kind = given.dtype == torch.int64 if name in _WHOLE else given.is_floating_point()
        if name == "mask":
            kind = given.dtype in (torch.bool, torch.int32)
        if tuple(given.shape) not in allowed or not kind:
            shape = " or ".join(map(str, allowed))
            raise ValueError(f"sample_token: {name} is {given.dtype} of shape {tuple(given.shape)}, not {shape}")
    if a.history is None and any(getattr(a, name) is not None for name in ARGUMENTS[10:15]):
        raise ValueError("sample_token: history is None, but lengths or penalties of it are given")
    if (a.bias_ids is None) != (a.bias_values is None) or (
        a.bias_ids is not None and a.bias_values is not None and a.bias_ids.shape != a.bias_values.shape
    ):
        raise ValueError("sample_token: bias_ids and bias_values are not of one shape")
    if a.top < 0:
        raise ValueError(f"sample_token: top is {a.top}; it must be 0 or more")


Build = Callable[[Generator, int, int], dict[str, Any]]


def _logits(g: Generator, batch: int, vocabulary: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Like a language model's: a normal bulk of deviation 2 and a few tokens far above it."""
    wide = vocabulary + 3 if layout == "rows" else vocabulary
    y = 2 * torch.randn(batch, wide, generator=g)
    for _ in range(min(6, vocabulary)):
        at = torch.randint(0, vocabulary, (batch, 1), generator=g)
        y.scatter_(1, at, 6 + 6 * torch.rand(batch, 1, generator=g))
    if layout == "last":  # the last position of (B, L, V)
        return torch.stack([y + 1, y], 1).to(dtype)[:, -1]
    if layout == "unaligned":
        return torch.cat([y.new_zeros(1), y.flatten()]).to(dtype)[1:].view(batch, wide)
    return y.to(dtype)[:, :vocabulary]


def _case(
    name: str,
    batch: int,
    vocabulary: int,
    build: Build,
    *,
    layout: str = "",
    top: int = 0,
    model: bool = False,
    bench: bool = False,
    small: bool = True,
) -> Case:
    """``build(generator, batch, vocabulary)`` gives arguments by name; ``logits`` there is a function of the logits."""

    def make(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        whole = lambda: torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g, dtype=torch.int64)  # noqa: E731
        a = Arguments(
            _logits(g, batch, vocabulary, dtype, layout), whole(), torch.arange(batch) * 7, top=top, model=model
        )
        given = build(g, batch, vocabulary)
        if (change := given.pop("logits", None)) is not None:
            a = a._replace(logits=change(a.logits))
        return tuple(a._replace(**given))

    return Case(name, make, bench=bench, small=small)


def _draw(**ranges: Any) -> Build:
    """Each row its own value: a range of floats, or the one value of a whole number or float."""

    def build(g: Generator, batch: int, vocabulary: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in ranges.items():
            if isinstance(value, tuple):
                made[name] = value[0] + (value[1] - value[0]) * torch.rand(batch, generator=g)
            else:
                made[name] = torch.full((batch,), value)
        return made

    return build


def _histories(g: Generator, batch: int, vocabulary: int) -> dict[str, Any]:
    """Histories with repeats, ids outside the vocabulary, and lengths from none to all."""
    history = torch.randint(-2, vocabulary + 2, (batch, 60), generator=g)
    history[:, 5:30:2] = history[:, :1]
    lengths = torch.randint(0, 61, (batch,), generator=g)
    return {
        "history": history,
        "history_lengths": lengths,
        "prompt_lengths": torch.randint(0, 20, (batch,), generator=g),
        **_draw(repetition=(0.8, 1.6), frequency=(-0.5, 0.9), presence=(-0.3, 0.8))(g, batch, vocabulary),
    }


def _bitmask(g: Generator, batch: int, vocabulary: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (batch, -(-vocabulary // 32)), generator=g, dtype=torch.int32)


def _biases(g: Generator, batch: int, vocabulary: int) -> dict[str, Any]:
    """A dense bias, a packed mask, and pairs with a repeated id, one outside, and a ban."""
    ids = torch.randint(0, vocabulary, (batch, 9), generator=g)
    ids[:, 1], ids[:, 2] = ids[:, 0], vocabulary + 1
    values = 3 * torch.randn(batch, 9, generator=g)
    values[:, 3] = -torch.inf
    bias = torch.randn(batch, vocabulary, generator=g)
    return {"bias": bias, "mask": _bitmask(g, batch, vocabulary), "bias_ids": ids, "bias_values": values}


def _shared(g: Generator, batch: int, vocabulary: int) -> dict[str, Any]:
    """What one row may give for all: bias, pairs and a bool mask."""
    made = {name: value[0].clone() for name, value in _biases(g, max(batch, 1), vocabulary).items()}
    return made | {"mask": torch.rand(vocabulary, generator=g) < 0.7}


def _all(g: Generator, batch: int, vocabulary: int) -> dict[str, Any]:
    ranges = _draw(temperature=(0.4, 1.6), top_k=40, top_p=(0.5, 1.0), min_p=(0.0, 0.1), typical_p=(0.3, 1.0))
    made = _histories(g, batch, vocabulary) | _biases(g, batch, vocabulary) | ranges(g, batch, vocabulary)
    return made | {"requests": torch.randint(0, 2**60, (batch,), generator=g)}


def _different(g: Generator, batch: int, vocabulary: int) -> dict[str, Any]:
    """Rows that switch every step on and off, with values at and past their ends."""
    cycle = lambda *values: torch.tensor([values[i % len(values)] for i in range(batch)])  # noqa: E731
    return {
        "temperature": cycle(1.0, 0.0, 0.5, -1.0, 2.0, 1e-42, torch.inf, 1.0),
        "top_k": cycle(0, 5, 1, 3, 2**40, 7, -3),
        "top_p": cycle(0.0, 1.0, 0.9, 2.0, 0.5, -1.0, 0.3, torch.nan),
        "min_p": cycle(0.0, 0.1, 1.0, 5.0, -1.0, 0.0, torch.nan, 1e-14),
        "typical_p": cycle(1.0, 0.2, 0.0, 0.95, 2.0),
    }


def _odd(logits: Tensor) -> Tensor:
    """Rows of NaN, -inf, all three, +inf, one finite token, ties, and huge numbers."""
    y = logits.clone()
    big = torch.finfo(y.dtype).max
    y[0], y[1], y[2, ::2], y[2, 1::3] = torch.nan, -torch.inf, torch.nan, -torch.inf
    y[3, 5:8], y[4], y[4, 11], y[5] = torch.inf, -torch.inf, -3.0, 1.5
    y[6], y[6, 3], y[6, 9], y[7, ::2] = -big, big, big, y[7].max()
    return y


CASES = [
    _case("greedy", 3, 61, lambda g, b, v: {"temperature": torch.zeros(b)}, top=3, model=True),
    _case("plain", 3, 61, lambda g, b, v: {}, top=4, small=False),
    _case("temperature", 4, 1031, _draw(temperature=(0.3, 1.8))),
    _case("top-k", 3, 1031, _draw(temperature=0.8, top_k=20), top=30, small=False),
    _case("top-p", 3, 1031, _draw(temperature=1.1, top_p=(0.3, 0.95)), small=False),
    _case("min-p", 3, 1031, _draw(temperature=1.1, min_p=(0.01, 0.2)), small=False),
    _case("typical-p", 3, 1031, _draw(temperature=1.3, typical_p=(0.2, 0.95)), top=3),
    _case("penalties", 4, 67, _histories, top=2),
    _case("biases and mask", 3, 77, _biases, top=2),
    _case("shared biases and mask", 3, 77, _shared),
    _case("everything", 5, 2053, _all, top=7),
    _case("everything, model's probabilities", 5, 131, _all, top=7, model=True, small=False),
    _case("each row its own", 9, 211, _different, top=2),
    _case("odd logits", 8, 43, lambda g, b, v: {"logits": _odd, "top_p": torch.full((b,), 0.8)}, top=2),
    _case(
        "odd logits, model's", 8, 43, lambda g, b, v: {"logits": _odd, "temperature": torch.zeros(b)}, top=2, model=True
    ),
    _case("all masked", 2, 40, lambda g, b, v: {"mask": torch.zeros(b, v, dtype=torch.bool)}, top=2),
    _case("no rows", 0, 40, _draw(top_p=0.5), top=2),
    _case("one token", 2, 1, _draw(temperature=0.7, top_p=0.5, typical_p=0.5), top=2),
    _case("one row", 1, 5, lambda g, b, v: {}, small=False),
    _case(
        "short history",
        2,
        40,
        lambda g, b, v: {"history": torch.zeros(b, 0, dtype=torch.int64), "repetition": torch.ones(b)},
        small=False,
    ),
    _case("padded rows", 3, 515, _draw(top_p=0.9), layout="rows"),
    _case("last position", 3, 515, _draw(top_p=0.9), layout="last", small=False),
    _case("unaligned", 3, 515, _draw(top_p=0.9), layout="unaligned", small=False),
    _case("flat", 2, 4099, lambda g, b, v: {"logits": torch.zeros_like, "top_k": torch.full((b,), 9)}, small=False),
    _case("131072, everything", 1, 131072, _all, top=5, small=False),
    _case(
        "1x131072 greedy",
        1,
        131072,
        lambda g, b, v: {"temperature": torch.zeros(b)},
        model=True,
        bench=True,
        small=False,
    ),
    _case("1x131072 top-p", 1, 131072, _draw(temperature=0.8, top_p=0.95), bench=True, small=False),
    _case("8x131072 top-k top-p", 8, 131072, _draw(temperature=0.8, top_k=40, top_p=0.95), bench=True, small=False),
    _case("4x131072 min-p", 4, 131072, _draw(temperature=1.0, min_p=0.05), bench=True, small=False),
    _case("32x32000 top-p", 32, 32000, _draw(temperature=0.7, top_p=0.9), bench=True, small=False),
]


def draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments that nobody chose; the tokens' own dtype stands for float32 logits."""
    batch, vocabulary, length = draw.integer(0, 3), draw.integer(1, 2100), draw.integer(0, 30)
    real = lambda *shape: draw.dense(shape, torch.float32)  # noqa: E731
    logits = draw.tensor((batch, vocabulary), dtype if dtype.is_floating_point else torch.float32, scale=3.0,
                         layouts=("contiguous", "unaligned", "padded"))  # fmt: skip
    seeds = torch.tensor([draw.integer(-(2**63), 2**63 - 1) for _ in range(batch)], dtype=torch.int64)
    made = Arguments(logits, seeds, torch.arange(batch) * draw.integer(0, 2**40), draw.choice((None, seeds)))
    ranges = {"temperature": (-0.5, 2.0), "top_p": (-0.1, 1.1), "min_p": (-0.1, 0.4), "typical_p": (0.0, 1.1)}
    penalties = {"repetition": (0.5, 2.0), "frequency": (-1.0, 1.0), "presence": (-1.0, 1.0)}
    if draw.flag():
        made = made._replace(history=(vocabulary * real(batch, length)).long())
        ranges |= penalties
    drawn: dict[str, Any] = {}
    for name, (low, high) in ranges.items():
        if draw.flag():
            drawn[name] = low + (high - low) * real(batch).sigmoid()
    top_k = (20 * real(batch)).long() if draw.flag() else None
    mask = real(batch, vocabulary) > draw.choice((-1.0, 0.5, 9.0)) if draw.flag() else None
    return tuple(made._replace(**drawn, top_k=top_k, mask=mask, top=draw.integer(0, 5), model=draw.flag()))
