"""A convolution's op, made one that also gives the mean and variance of each channel of its output, for a group norm.

The norm then reads its input once (:mod:`.group_norm`, ``moments``).  They are those of the output as it is stored,
rounded to x's dtype; of an image without pixels both are NaN, as PyTorch's are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.group_norm_cases import moments_of
from fusegen.kernels.op import Op, Tolerance


def leaving(base: Op) -> Op:
    """The op ``<base>_moments``, not registered yet: ``base``'s arguments, its output and the moments of that, float64
    (B, 2, O); its cases and its cost, the moments costing four operations an output and no reading.
    """

    def allocate(*args: Any) -> tuple[Tensor, ...]:
        """The uninitialised output and moments.  Raises ValueError where the arguments do not fit."""
        (out,) = base.allocate(*args)
        return out, torch.empty((out.shape[0], 2, out.shape[1]), dtype=torch.float64, device=out.device)

    def reference(*args: Any) -> tuple[Tensor, Tensor]:
        """The convolution's reference and its moments by two passes in float64."""
        out = base.reference(*args)
        return out, moments_of(out)

    def eager(*args: Any) -> tuple[Tensor, Tensor]:
        assert base.eager is not None
        out = base.eager(*args)
        return out, moments_of(out)

    return Op(
        name=f"{base.name}_moments",
        schema=base.schema.removesuffix("Tensor") + "(Tensor, Tensor)",
        reference=reference,
        allocate=allocate,
        cost=base.cost,
        # A variance has twice the relative error of what it is taken of, and that may be of bfloat16.
        tolerance={**base.tolerance, torch.float64: Tolerance(rms=1.2e-2, peak=2.4e-2)},
        cases=base.cases,
        eager=eager,
        alone=base.alone,
        draw=base.draw,
        formula=f"y = {base.name}(...); mean and variance over its pixels, each sample and channel",
        source=f"{base.source}; Chan, Golub & LeVeque 1979",
    )
