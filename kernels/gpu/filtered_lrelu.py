"""StyleGAN3's resampled leaky ReLU on NVIDIA GPUs: by filters along one axis, or by matrices where one has two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.filtered_lrelu import axes
from fusegen.kernels.gpu import lrelu_matrices, lrelu_phases
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, TritonLaunch, Use, meta
from fusegen.kernels.op import Kernel

X, UP_FILTER, DOWN_FILTER, BIAS = range(4)  # positions of the tensors in the schema


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """Two launches for filters along one axis, three for others."""
    x, up_filter, down_filter, bias = args[:4]
    if not outs[0].numel():
        return ()
    along = axes(*args)
    given = tuple(Use(X if t is None else i) for i, t in enumerate((x, up_filter, down_filter, bias)))
    form = lrelu_phases if lrelu_phases.suits(x, up_filter, down_filter, along) else lrelu_matrices
    return form.stages(outs, args, along, given)


def decline(x: Tensor, *rest: Any) -> str | None:
    """What the matrices cannot do of what is left to them."""
    along = axes(x, *rest)
    return None if lrelu_phases.suits(x, rest[0], rest[1], along) else lrelu_matrices.decline(x, along)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    return TritonLaunch(args, stages(outs, args))


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for name, taps, up, down, layout in (
            ("up2", (12,), 2, (12,), torch.contiguous_format),
            ("up2 channels-last", (12,), 2, (12,), torch.channels_last),
            ("up4", (24,), 4, (12,), torch.contiguous_format),
            ("radial", (12,), 2, (12, 12), torch.contiguous_format),
        ):
            x = torch.empty(1, 256, 148, 148, dtype=dtype, device="meta", memory_format=layout)
            pad = [9, 8, 9, 8]
            args = (x, meta(*taps), meta(*down), meta(256, dtype=dtype), up, 2, pad, math.sqrt(2), 0.2, 256.0, False)
            yield f"{kind} {name}", lambda args=args: args  # type: ignore[misc]


KERNELS = [Kernel("filtered_lrelu.triton", "cuda", decline, bind)]
