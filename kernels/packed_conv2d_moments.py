"""packed_conv2d, and the mean and variance of each channel of what it gives, for a group norm of that.

As :mod:`.winograd_conv2d_moments`: those of the output as it is stored; of an image without pixels both are NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import packed_conv2d
from fusegen.kernels.group_norm_cases import moments_of
from fusegen.kernels.op import Cost, Op, Tolerance, register

SCHEMA = packed_conv2d.SCHEMA.removesuffix("Tensor") + "(Tensor, Tensor)"


def allocate(*args: Any) -> tuple[Tensor, ...]:
    """The uninitialised output of :mod:`.packed_conv2d`, whose arguments these are, and its moments, float64 (B, 2, O).
    Raises ValueError where the arguments do not fit.
    """
    (out,) = packed_conv2d.allocate(*args)
    return out, torch.empty((out.shape[0], 2, out.shape[1]), dtype=torch.float64, device=out.device)


def reference(*args: Any) -> tuple[Tensor, Tensor]:
    """The convolution's reference and its moments by two passes in float64; arguments as :func:`allocate`'s."""
    out = packed_conv2d.reference(*args)
    return out, moments_of(out)


def cost(*args: Any) -> Cost:
    """The convolution's: the moments cost four operations an output, and nothing is read for them."""
    return packed_conv2d.cost(*args)


def _eager(*args: Any) -> tuple[Tensor, Tensor]:
    assert packed_conv2d.OP.eager is not None
    out = packed_conv2d.OP.eager(*args)
    return out, moments_of(out)


OP = register(
    Op(
        name="packed_conv2d_moments",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # A variance has twice the relative error of what it is taken of, and that is of bfloat16.
        tolerance={**packed_conv2d.OP.tolerance, torch.float64: Tolerance(rms=1.2e-2, peak=2.4e-2)},
        cases=packed_conv2d.OP.cases,
        eager=_eager,
        alone=packed_conv2d.OP.alone,
        draw=packed_conv2d.OP.draw,
        formula="y = packed_conv2d(...); mean and variance over its pixels, each sample and channel",
        source="torch.nn.functional.conv2d; Chan, Golub & LeVeque 1979",
    )
)
