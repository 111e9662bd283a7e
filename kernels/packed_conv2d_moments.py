"""packed_conv2d, and the mean and variance of each channel of what it gives (:mod:`.channel_moments`)."""

from __future__ import annotations

from fusegen.kernels import packed_conv2d
from fusegen.kernels.channel_moments import leaving
from fusegen.kernels.op import register

OP = register(leaving(packed_conv2d.OP))
