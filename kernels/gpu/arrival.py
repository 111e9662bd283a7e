"""Programs that work on one thing together: the last of them to come finishes it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter, programs):
    """Whether every other program has come here before; what they wrote can be read then.  The counter was zero, and
    the last program is to leave it so."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
