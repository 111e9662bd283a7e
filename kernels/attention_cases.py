"""The cases of attention: layouts, masks, lengths, and the sizes that break naive kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.op import FLOATS, Case


def _case(
    name: str, q: tuple[int, ...], keys: int | None = None, *, kv_heads: int | None = None, layout: str = "BLHD",
    mask: str = "", lengths: tuple[int, ...] = (), causal: bool = False, scale: float | None = None,
    size: float = 1.0, dtypes: tuple[torch.dtype, ...] = FLOATS, bench: bool = False, small: bool = False,
) -> Case:  # fmt: skip
    """``q`` (B, Hq, Lq, D) or (N, L, D); ``layout``: BLHD as a linear layer leaves it, BHLD, packed (q, k, v from one
    projection), unaligned.  ``mask``: "bool", "float", "row" (float, (B, 1, 1, Lk)), "head" (bool, (Hq, Lq, Lk)),
    "closed" (bool, some rows all False), "lowest" (float, some rows at the lowest finite number).  ``size``: the
    deviation of q."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        length = q[-2] if keys is None else keys
        kv = (q[0], kv_heads or q[1], length, q[3]) if len(q) == 4 else (q[0], length, q[2])
        tensors = [_lay(torch.randn(shape, generator=g), layout) for shape in (q, kv, kv)]
        tensors[0] = tensors[0] * size
        moved = [_lay(t.to(dtype), layout) for t in tensors]
        at = torch.tensor(lengths) if lengths else None
        return (*moved, _mask(mask, (*q[:-1], length), g, dtype), at, causal, scale)

    return Case(name, build, dtypes, bench, small)


def _lay(x: Tensor, layout: str) -> Tensor:
    """``x`` with the same values, in the memory order ``layout``."""
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if x.dim() == 3 or layout == "BHLD":
        return x.contiguous()
    y = x.transpose(1, 2).contiguous()
    if layout == "packed":
        other = torch.full_like(y, torch.nan)
        y = torch.cat([other, y, other], -2)[:, :, y.shape[2] : -y.shape[2]]
    return y.transpose(1, 2)


def _mask(kind: str, shape: tuple[int, ...], g: Generator, dtype: torch.dtype) -> Tensor | None:
    if not kind:
        return None
    full = torch.rand(shape, generator=g)
    if kind == "bool":
        return full > 0.3
    if kind == "head":
        return full[0] > 0.3
    if kind == "closed":
        return (full > 0.3) & (torch.rand((*shape[:-1], 1), generator=g) > 0.4)
    if kind == "lowest":
        lowest = torch.finfo(dtype).min
        return (
            torch.zeros(shape[0], 1, *shape[2:], dtype=dtype)
            .masked_fill(full[:, :1] > 0.7, lowest)
            .index_fill(2, torch.tensor([0]), lowest)
        )
    added = (2 * full[:, :1, :1] if kind == "row" else 2 * full).to(dtype)
    return added.masked_fill(added > 1.6, -torch.inf)


CASES = [
    *(_case(f"head dim {d}", (1, 2, 33, d), 65, small=d == 40) for d in (1, 7, 40, 64, 72, 80, 96, 128, 160, 256)),
    *(_case(f"no {n}", q, keys) for n, q, keys in (("queries", (1, 2, 0, 40), 5), ("batch", (0, 2, 3, 40), 5))),
    # Wider heads than a product's tiles were first made for: the mid block of Stable Diffusion's VAE has one of 512.
    *(_case(f"head dim {d}", (1, 2, 37, d), 143) for d in (257, 320, 512, 1021, 1024)),
    _case("head dim 512, few queries", (2, 2, 3, 512), 150, mask="closed"),
    _case("head dim 512, grouped and causal", (1, 4, 70, 512), kv_heads=2, causal=True, lengths=(61,)),
    _case("head dim 320, mask", (2, 2, 35, 320), 45, mask="closed"),
    _case("no keys", (1, 2, 3, 40), 0),
    _case("one query", (2, 3, 1, 64), 131, small=True),
    _case("one key", (2, 3, 5, 64), 1),
    _case("odd", (1, 3, 17, 40), 31, small=True),
    _case("prime", (1, 1, 509, 40), 521),
    _case("text keys", (2, 2, 64, 40), 77, small=True),
    _case("grouped", (2, 6, 19, 64), 37, kv_heads=2, small=True),
    _case("one kv head", (1, 8, 1, 128), 300, kv_heads=1),
    _case("causal", (1, 2, 70, 64), causal=True, small=True),
    _case("causal, more keys", (1, 2, 5, 40), 90, causal=True),
    _case("causal, more queries", (1, 2, 90, 40), 5, causal=True),
    _case("bool mask", (2, 2, 19, 40), 45, mask="bool", small=True),
    _case("float mask", (2, 2, 19, 40), 45, mask="float", small=True),
    _case("float mask, odd", (1, 2, 83, 40), 151, mask="float"),
    _case("mask of keys", (2, 4, 33, 64), 77, mask="row"),
    _case("mask of heads", (2, 4, 33, 64), 77, mask="head"),
    _case("closed rows", (2, 2, 35, 40), 45, mask="closed", small=True),
    # Not in float16: 65504 is too small to drown the scores, and large enough to cost them half their bits in float32.
    _case("lowest rows", (2, 2, 35, 40), 45, mask="lowest", dtypes=(torch.float32, torch.bfloat16)),
    _case("few queries, mask", (2, 4, 3, 72), 700, kv_heads=2, mask="closed"),
    _case("few queries, lengths", (3, 2, 2, 40), 600, lengths=(600, 0, 513), causal=True),
    _case("causal and mask", (1, 2, 40, 64), mask="bool", causal=True),
    _case("key lengths", (4, 2, 21, 40), 300, lengths=(300, 0, 1, 259), small=True),
    _case("lengths and causal", (2, 2, 60, 80), lengths=(60, 13), causal=True),
    _case("large logits", (1, 2, 40, 64), 300, size=60.0),
    *(_case(f"scale {scale}", (1, 2, 20, 40), 33, scale=scale) for scale in (0.5, -0.7, 0.0)),
    _case("rank 3", (6, 33, 40), 50),
    _case("rank 3, mask", (6, 33, 40), 50, mask="bool"),
    _case("contiguous heads", (2, 3, 33, 40), 65, layout="BHLD"),
    _case("packed projections", (2, 3, 33, 40), 65, layout="packed"),
    _case("unaligned", (2, 3, 33, 40), 65, layout="unaligned"),
    _case("2x8x4096x40", (2, 8, 4096, 40), bench=True),
    _case("2x8x4096x64", (2, 8, 4096, 64), bench=True),
    _case("2x8x4096x40 on 77", (2, 8, 4096, 40), 77, bench=True),
    _case("2x8x1024x80", (2, 8, 1024, 80), bench=True),
    _case("2x8x256x160", (2, 8, 256, 160), bench=True),
    _case("2x10x4096x64", (2, 10, 4096, 64), bench=True),
    _case("1x1x4096x512", (1, 1, 4096, 512), bench=True),
    _case("1x12x77x64 causal", (1, 12, 77, 64), causal=True, bench=True),
    _case("1x32x512x128 causal", (1, 32, 512, 128), kv_heads=8, causal=True, bench=True),
    _case("1x32x1x128 on 2048", (1, 32, 1, 128), 2048, kv_heads=8, bench=True),
    _case("16x4x64x40", (16, 4, 64, 40), bench=True),
    _case("16x4x64x40 on 16", (16, 4, 64, 40), 16, bench=True),
    _case("1x4x64x40", (1, 4, 64, 40), bench=True),
]
