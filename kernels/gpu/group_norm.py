"""Group normalization on NVIDIA GPUs: see group_norm_kernels.py.

What :mod:`.join_group_norm` needs as well: which launches serve a shape, and their values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.gpu import group_norm_kernels as kernels
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "weight": 2, "bias": 3, "add": 6, "scale": 7, "shift": 8}  # positions in the schema
SLAB = 81920  # bytes of the padded tiles that a one-launch program may hold in registers: 80 elements a thread, or 40
SOURCE = Path(kernels.__file__)
_FLAGS = {"WEIGHT": "weight", "BIAS": "bias", "PLUS": "add", "SCALE": "scale", "SHIFT": "shift"}


@dataclass(frozen=True)
class Config:
    """``slab``: one launch instead of three; ``block``: elements of a tile; ``channels``: of them in a row of it."""

    slab: bool
    block: int
    channels: int
    num_warps: int


@dataclass(frozen=True)
class Problem:
    """What is normalized: sizes, and whether channels are nearer in memory than pixels."""

    channels: int
    pixels: int
    groups: int
    last: bool
    dtype: torch.dtype

    @property
    def slab(self) -> tuple[int, int, int]:
        """(channels, pixels, tiles) that hold a whole slab.  Where channels are innermost one tile takes all of them:
        several would each read all lines of memory."""
        per, most = self.channels // self.groups, power(self.channels // self.groups)
        sizes = [most] if self.last else [most >> i for i in range(most.bit_length())]
        channels = next(c for c in sizes if self.last or 7 * (blocks(per, c) * c - per) <= per)
        return channels, power(self.pixels), blocks(per, channels)

    def key(self, what: str) -> str:
        """Everything but the batch; ``what`` else the best choice depends on."""
        layout, dtype = "last" if self.last else "first", str(self.dtype).removeprefix("torch.")
        return f"{self.channels}x{self.pixels} {self.groups} {layout} {dtype} {what}"

    def default(self) -> Config:
        """One launch where the padded slab fits, with 8 or 16 elements of each tile a thread; else tiles of 4096
        elements, 64 channels wide where those are innermost."""
        channels, pixels, tiles = self.slab
        if channels * pixels * tiles <= (16384 if self.last else SLAB // self.dtype.itemsize):
            return Config(True, channels * pixels, channels, max(1, min(16, channels * pixels // 256)))
        block, most = 4096, power(self.channels)
        return Config(False, block, min(64, most) if self.last else max(1, min(most, block // pixels)), 4)

    def space(self) -> Iterator[Config]:
        """The slab with more or fewer warps up to its limit; tiles of 1024 to 16384 elements."""
        channels, pixels, tiles = self.slab
        tile = channels * pixels
        for warps in (1, 2, 4, 8, 16, 32):
            held = tile * tiles * self.dtype.itemsize
            if held <= SLAB and tile // (32 * warps) >= 4 and tile * tiles // (32 * warps) <= 80:
                yield Config(True, tile, channels, warps)
        for block in (1024, 2048, 4096, 8192, 16384):
            for warps in (4, 8, 16):
                for wide in (32, 64, 128) if self.last else (1, 4):
                    if wide <= power(self.channels) and 8 <= block // (32 * warps) <= 64 and tile * tiles >= 4096:
                        yield Config(False, block, wide, warps)


def problem(x: Tensor, groups: int, channels: int | None = None) -> Problem:
    """The problem of x, or of something like it with other channels."""
    last = x.dim() > 2 and x.shape[1] > 1 and x.stride(1) < max(x.stride()[2:])
    return Problem(channels or x.shape[1], math.prod(x.shape[2:]), groups, last, x.dtype)


def spatial(x: Tensor) -> tuple[int, int] | None:
    """Pixels of ``x`` (B, C, *) and the stride between them, or None where one stride does not serve."""
    size, stride = 1, 0
    for n, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if n == 1:
            continue
        if size > 1 and step != size * stride:
            return None
        size, stride = size * n, stride if size > 1 else step
    return (size, stride) if x.numel() else (math.prod(x.shape[2:]), stride)


def _strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    found = spatial(tensor)
    assert found is not None
    return {f"{prefix}_b": tensor.stride(0), f"{prefix}_c": tensor.stride(1), f"{prefix}_s": found[1]}


def _values(
    outs: tuple[Tensor, ...], args: tuple[Any, ...], roles: Mapping[str, int], given: Problem, join: int
) -> dict[str, Any]:
    """The values of every parameter that does not depend on the configuration, by name."""
    x, y = args[roles["x"]], outs[0]
    there = {n: args[roles[n]] for n in roles if args[roles[n]] is not None}
    values: dict[str, Any] = {n: Use(roles[n] if n in there else roles["x"]) for n in ("other", *_FLAGS.values())}
    values |= {"x": Use(roles["x"]), "joined": outs[-1], "y": y}
    values |= _strides("x", x) | _strides("o", there.get("other", x)) | _strides("y", y)
    values |= {"j_b": values["y_b"], "j_c": values["y_c"], "j_s": values["y_s"]}
    for name in ("add", "scale", "shift"):
        step = there[name].stride(0) if name in there and there[name].shape[0] > 1 else 0
        values |= {f"{name}_b": step, f"{name}_c": there[name].stride(1) if name in there else 0}
    values |= {"channels": given.channels, "groups": given.groups, "per_group": given.channels // given.groups}
    values |= {"pixels": given.pixels, "split": x.shape[1], "JOIN": join}
    return values | {flag: name in there for flag, name in _FLAGS.items()}


def launches(
    outs: tuple[Tensor, ...],
    args: tuple[Any, ...],
    config: Config,
    roles: Mapping[str, int],
    given: Problem,
    eps: float,
    silu: bool,
    join: int = 0,
) -> tuple[Stage, ...]:
    """The launches for ``config``; the scratch of partial statistics is theirs.

    ``roles``: a parameter of the kernels -> the position of the argument it takes.  ``join`` says what outs[1] is.
    """
    x = args[roles["x"]]
    if not outs[0].numel():
        return ()
    every = _values(outs, args, roles, given, join) | {"eps": eps, "SILU": silu}
    batch, warps, all_groups = x.shape[0], {"num_warps": config.num_warps}, (x.shape[0] * given.groups,)
    if config.slab:
        block_c, block_s, tiles = given.slab
        even = (block_c * tiles, block_s) == (every["per_group"], given.pixels)
        every |= {"BLOCK_C": block_c, "BLOCK_S": block_s, "TILES": tiles, "EVEN": even}
        return (_stage(kernels.slab_kernel, all_groups, every, warps),)
    block_c, block_s = config.channels, config.block // config.channels
    chunks = blocks(given.pixels, block_s)
    grid = (chunks, blocks(given.channels, block_c), batch)
    partial = torch.empty((batch, chunks, 2, given.channels), dtype=torch.float32, device=x.device)
    stats = torch.empty((batch, given.groups, 2), dtype=torch.float32, device=x.device)
    every |= {"partial": partial, "stats": stats, "chunks": chunks, "BLOCK_C": block_c, "BLOCK_S": block_s}
    width = min(1024, power(chunks * every["per_group"]))
    read = {"x": outs[-1]} | {f"x_{d}": every[f"y_{d}"] for d in "bcs"} if join else {}  # what the first one joined
    return (
        _stage(kernels.partial_kernel, grid, every, warps),
        _stage(kernels.combine_kernel, all_groups, every, {"num_warps": 4}, BLOCK=width),
        _stage(kernels.apply_kernel, grid, every | read, warps),
    )


def _stage(kernel: Any, grid: tuple[int, ...], every: Mapping[str, Any], options: Any, **more: Any) -> Stage:
    values = {**every, **more}
    return Stage(kernel, grid, {name: values[name] for name in kernel.arg_names}, options)


def decline(x: Tensor, *rest: Any) -> str | None:
    """Batches beyond the grid's third dimension and layouts without one stride for all pixels."""
    if x.shape[0] > 65535:
        return f"a batch of {x.shape[0]} is beyond the grid's third dimension (65535)"
    if x.numel() and spatial(x) is None:
        return f"the pixels of strides {tuple(x.stride()[2:])} have no single stride"
    return None


def small(x: Tensor, *rest: Any) -> Iterator[Config]:
    """For tests: tiles that cut small cases into chunks."""
    yield Config(False, 256, 16, 4) if x.dtype == torch.float16 else Config(False, 128, 4, 4)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch or three."""
    return launches(outs, args, config, ROLES, problem(args[0], args[1]), args[4], args[5] == "silu")


def key(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, activation: str, *rest: Any) -> str:
    return problem(x, groups).key(activation)


def default(x: Tensor, groups: int, *rest: Any, limit: int = 0) -> Config:
    return problem(x, groups).default()


def space(x: Tensor, groups: int, *rest: Any) -> Iterator[Config]:
    return problem(x, groups).space()


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            for shape, add in (((2, 320, 64, 64), False), ((2, 320, 64, 64), True), ((2, 1280, 8, 8), False)):
                x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
                parameter, time = meta(shape[1], dtype=dtype), meta(*shape[:2], dtype=dtype) if add else None
                args = (x, 32, parameter, parameter, 1e-5, "silu", time, None, None)
                where = "contiguous" if layout == torch.contiguous_format else "channels-last"
                name = f"{kind} {shape[1]}x{shape[2]}x{shape[3]} {where}{' add' if add else ''}"
                yield name, lambda args=args: args  # type: ignore[misc]


TUNABLE = Tunable("group_norm", Config, key, default, space, stages, SOURCE, small)
KERNELS = [Kernel("group_norm.triton", "cuda", decline, TUNABLE.bind)]
