"""A linear layer with 4-bit weights in groups along K, y = act(x W^T + bias) + residual, W = (code - zero) * scale.

**The layout** serves CPUs and GPUs alike.  Rows of W lie in panels of 16, columns in words of 8:

    weight (ceil(N/16), K'/8, 16) int32     K' = K rounded up to whole groups
    scales (ceil(N/16), K'/group, 16)       float16 or float32
    zeros  (ceil(N/16), K'/group, 16) uint8 codes in 0..15; None: 8 everywhere (symmetric)

Word (p, i, r) holds row 16 p + r, columns 8 i to 8 i + 7: column 8 i + j in bits 8 j to 8 j + 3 and column 8 i + 4 + j
in bits 8 j + 4 to 8 j + 7, for j in 0..3.  So 64 consecutive bytes, masked with 0x0f, are four columns of sixteen rows
as the CPU's 4-byte dot products read them, and shifted right by 4 the next four; and a panel is one stream of memory.
What is beyond N or K has code 0 and scale 0.  :func:`pack` and :func:`unpack` convert.

**The arithmetic**, by ``inputs``:

- "int8": each group of each row of x is quantized as linear_int8.py does a row (llama.cpp's q4_0 by q8_0 is like it, at
  groups of 32); ``sum(codes_x * (code - zero))`` over a group is an exact integer, and the groups, each times its two
  scales, are summed in float32 in order.
- "float": x by W as they are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int4_cases import cases
from fusegen.kernels.linear_int8 import alone, check, codes_of, draw_tail, finish
from fusegen.kernels.op import Cost, Op, Tolerance, register

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scales, int out_features, Tensor? zeros=None, Tensor? bias=None, "
    "Tensor? residual=None, str activation='none', str inputs='int8') -> Tensor"
)
ROWS, WORD = 16, 8  # rows of a panel, columns of a word
GROUPS = (32, 64, 128)
INPUTS = ("int8", "float")
SYMMETRIC = 8  # the zero point where none is given


@dataclass(frozen=True)
class Packed:
    """A weight in this file's layout, and its shape."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    out_features: int
    in_features: int


def _panels(x: Tensor) -> Tensor:
    """(N, C) to (ceil(N/16), C, 16), zero beyond N."""
    rows = F.pad(x, (0, 0, 0, -x.shape[0] % ROWS))
    return rows.view(rows.shape[0] // ROWS, ROWS, x.shape[1]).transpose(1, 2).contiguous()


def _plain(x: Tensor, out_features: int) -> Tensor:
    """:func:`_panels` undone."""
    return x.transpose(1, 2).reshape(x.shape[0] * ROWS, x.shape[1])[:out_features]


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Packed:
    """Codes (N, K) in 0..15, scales (N, ceil(K/group)) float16 or float32 and zeros like scales, to the layout.

    Raises ValueError where they do not fit.
    """
    if codes.dim() != 2 or group not in GROUPS:
        raise ValueError(
            f"pack: codes have shape {tuple(codes.shape)}, not (N, K), or group {group} is not in {GROUPS}"
        )
    n, k = codes.shape
    for name, t in (("scales", scales), ("zeros", zeros)):
        if t is not None and tuple(t.shape) != (n, -(-k // group)):
            raise ValueError(f"pack: {name} has shape {tuple(t.shape)}, not {(n, -(-k // group))}")
    for name, t in (("codes", codes), ("zeros", zeros)):
        if t is not None and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < 16:
            raise ValueError(f"pack: {name} hold values outside 0..15")
    if scales.dtype not in (torch.float16, torch.float32):
        raise ValueError(f"pack: scales are {scales.dtype}, neither float16 nor float32")
    wide = _panels(F.pad(codes.to(torch.uint8), (0, -k % group)))  # (panels, K', 16)
    eight = wide.view(wide.shape[0], wide.shape[1] // WORD, 2, 4, ROWS)
    packed = (eight[:, :, 0] | eight[:, :, 1] << 4).transpose(2, 3).clone(memory_format=torch.contiguous_format)
    weight = packed.view(torch.int32).squeeze(-1)
    return Packed(weight, _panels(scales), None if zeros is None else _panels(zeros.to(torch.uint8)), n, k)


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (N, K) uint8, scales (N, groups) and zeros (N, groups) uint8 or None: what :func:`pack` was given."""
    n, k = packed.out_features, packed.in_features
    bytes_ = packed.weight.contiguous().unsqueeze(-1).view(torch.uint8)  # (panels, K'/8, 16, 4)
    eight = torch.stack([bytes_ & 15, bytes_ >> 4], 2).transpose(3, 4)  # (panels, K'/8, 2, 4, 16)
    codes = _plain(eight.reshape(*eight.shape[:1], eight.shape[1] * WORD, ROWS), n)[:, :k].contiguous()
    zeros = None if packed.zeros is None else _plain(packed.zeros, n).contiguous()
    return codes, _plain(packed.scales, n).contiguous(), zeros


def group_of(weight: Tensor, scales: Tensor) -> int:
    """The number of columns that share a scale, of a packed weight."""
    return weight.shape[1] * WORD // scales.shape[1] if scales.shape[1] else GROUPS[0]


def dense(
    weight: Tensor, scales: Tensor, out_features: int, zeros: Tensor | None, k: int, dtype: torch.dtype
) -> Tensor:
    """The matrix W (N, K) that a packed weight stands for."""
    codes, scale, zero = unpack(Packed(weight, scales, zeros, out_features, weight.shape[1] * WORD))
    group = group_of(weight, scales)
    offset = SYMMETRIC if zero is None else zero.to(dtype).repeat_interleave(group, 1)
    return ((codes.to(dtype) - offset) * scale.to(dtype).repeat_interleave(group, 1))[:, :k]


def allocate(
    x: Tensor, weight: Tensor, scales: Tensor, out_features: int, zeros: Tensor | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none", inputs: str = "int8",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (*, N) for x (*, K) and a packed weight: x's dtype, contiguous.

    Raises ValueError where arguments do not fit.
    """
    panels = -(-out_features // ROWS)
    if weight.dtype != torch.int32 or weight.dim() != 3 or weight.shape[0] != panels or weight.shape[2] != ROWS:
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"linear_int4: weight is {found}, not int32 ({panels}, K/8, {ROWS}) for {out_features} rows")
    if scales.dim() != 3 or scales.shape[0] != panels or scales.shape[2] != ROWS:
        raise ValueError(f"linear_int4: scales has shape {tuple(scales.shape)}, not ({panels}, groups, {ROWS})")
    group, padded = group_of(weight, scales), weight.shape[1] * WORD
    if group not in GROUPS or scales.shape[1] * group != padded:
        raise ValueError(f"linear_int4: {padded} columns and {scales.shape[1]} groups: a group is one of {GROUPS}")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype != torch.uint8):
        raise ValueError(f"linear_int4: zeros is {zeros.dtype} {tuple(zeros.shape)}, not uint8 {tuple(scales.shape)}")
    if inputs not in INPUTS:
        raise ValueError(f"linear_int4: inputs is {inputs!r}; it is one of {', '.join(INPUTS)}")
    check("linear_int4", x, out_features, bias, residual, activation)
    if not padded - group < x.shape[-1] <= padded and padded != x.shape[-1]:
        raise ValueError(f"linear_int4: weight has {padded} columns, x has rows of {x.shape[-1]}")
    return (torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor, weight: Tensor, scales: Tensor, out_features: int, zeros: Tensor | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none", inputs: str = "int8",
) -> Tensor:  # fmt: skip
    """By this file's arithmetic; integers are exact, the rest float32, or float64 where x is."""
    (out,) = allocate(x, weight, scales, out_features, zeros, bias, residual, activation, inputs)
    wide = torch.promote_types(x.dtype, torch.float32)
    if inputs == "float":
        y = x.to(wide) @ dense(weight, scales, out_features, zeros, x.shape[-1], wide).t()
        return out.copy_(finish(y, bias, residual, activation))
    group = group_of(weight, scales)
    codes, scale_x = quantize_inputs(x, group)
    centred = dense(weight, torch.ones_like(scales), out_features, zeros, codes.shape[-2] * group, torch.float64)
    scale_w = _plain(scales, out_features).to(wide)
    y = torch.zeros(out.shape, dtype=wide, device=x.device)
    for g in range(codes.shape[-2]):
        sums = codes[..., g, :].double() @ centred[:, g * group : (g + 1) * group].t()
        y += sums.to(wide) * (scale_w[:, g] * scale_x[..., g].unsqueeze(-1).to(wide))
    return out.copy_(finish(y, bias, residual, activation))


def quantize_inputs(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x (*, K) as int8 codes (*, groups, group), zero beyond K, and float32 scales (*, groups)."""
    padded = F.pad(x, (0, -x.shape[-1] % group))
    codes, scale = codes_of(padded.unflatten(-1, (padded.shape[-1] // group, group)))
    return codes, scale.squeeze(-1)


def cost(
    x: Tensor, weight: Tensor, scales: Tensor, out_features: int, zeros: Any = None, bias: Any = None,
    residual: Any = None, activation: str = "none", inputs: str = "int8",
) -> Cost:  # fmt: skip
    """The products and sums; every argument read and the output written once."""
    rows = x.numel() // max(1, x.shape[-1])
    tensors = [t for t in (x, weight, scales, zeros, bias, residual) if t is not None]
    out = rows * out_features * x.element_size()
    moved = sum(t.numel() * t.element_size() for t in tensors) + out
    products = "int8" if inputs == "int8" else ""
    return Cost(flops=2 * rows * out_features * x.shape[-1], bytes=moved, written=out, products=products)


def quantize_int4(
    weight: Tensor, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight (N, K) as codes (N, K) uint8 in 0..15, scales (N, ceil(K/group)) of ``dtype``, and zeros or None.

    Symmetric: the element of largest magnitude gets code 0, so that all 16 codes serve (as in llama.cpp's q4_0); zero
    is 8.  Else the group's range, stretched to hold 0, is cut into 15 steps.  Raises ValueError where it is not finite.
    """
    if weight.dim() != 2 or group not in GROUPS:
        raise ValueError(f"quantize_int4: weight has shape {tuple(weight.shape)}, or group {group} is not in {GROUPS}")
    if not bool(weight.isfinite().all()):
        raise ValueError("quantize_int4: the weight holds an infinity or NaN")
    k = weight.shape[1]
    w = (
        F.pad(weight.float(), (0, -k % group)).unflatten(1, (-1, group))
        if k
        else weight.float().view(weight.shape[0], 0, group)
    )
    top, bottom = w.amax(-1).clamp(min=0), w.amin(-1).clamp(max=0)
    step = torch.where(top > -bottom, top, bottom) / -SYMMETRIC if symmetric else (top - bottom) / 15
    scales = step.to(dtype)
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    zero = torch.full_like(inverse, SYMMETRIC) if symmetric else (-bottom * inverse).round().clamp(0, 15)
    codes = ((w * inverse.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, 15).to(torch.uint8)
    return codes.flatten(1)[:, :k].contiguous(), scales, None if symmetric else zero.to(torch.uint8)


CASES = cases(pack)
_dense: Any = WeakTensorKeyDictionary()  # packed weight -> the matrix in floating point, made once as a user would


def _eager(
    x: Tensor, weight: Tensor, scales: Tensor, out_features: int, zeros: Any, bias: Any, residual: Any, activation: str,
    inputs: str,
) -> Tensor:  # fmt: skip
    """PyTorch's product in x's dtype with the weight in full, and x rounded to its codes where ``inputs`` says so."""
    if weight not in _dense:
        _dense[weight] = dense(weight, scales, out_features, zeros, x.shape[-1], torch.float32).to(x.dtype)
    if inputs == "int8":
        codes, scale = quantize_inputs(x, group_of(weight, scales))
        x = (codes * scale.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return finish(F.linear(x, _dense[weight], None if bias is None else bias.to(x.dtype)), None, residual, activation)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    lead, (n, k), group = draw.shape(3, *[40] * draw.integer(0, 1)), draw.shape(50, 300), draw.choice(GROUPS)
    weight = draw.dense((n, k), torch.float32, scale=max(k, 1) ** -0.5)
    p = pack(*quantize_int4(weight, group, draw.flag(), draw.choice((torch.float16, torch.float32))), group)
    x, behind = draw.tensor((*lead, k), dtype), draw_tail(draw, (*lead, n), dtype)
    return (x, p.weight, p.scales, n, p.zeros, *behind, draw.choice(INPUTS))


OP = register(
    Op(
        name="linear_int4",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={  # of the short types that of rounding the output once, as linear_int8's; GPUs, which round the
            # unpacked weight of "float" inputs too, were measured at 2.6e-3 and 3.3e-3 of bfloat16 at the most
            torch.float32: Tolerance(rms=2e-6, peak=4e-6),
            torch.bfloat16: Tolerance(rms=3.91e-3, peak=3.91e-3),
            torch.float16: Tolerance(rms=4.9e-4, peak=4.9e-4),
        },
        cases=CASES,
        eager=_eager,
        alone=functools.partial(alone, residual=6),
        draw=_draw,
        formula="act(x ((code - zero) scale)^T + bias) + residual, x quantized to int8 by groups or as it is",
        source="Frantar et al. 2022 (GPTQ), arXiv:2210.17323; the int8 form as llama.cpp's q4_0 by q8_0",
    )
)
