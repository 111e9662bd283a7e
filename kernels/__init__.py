"""Generation kernels: tensors in, tensors out, nothing known of models.

Every file here that is not ``op.py`` holds one op: what it means, its reference, its cases, its cost.  The fast
versions stand under ``cpu/`` (C++) and ``gpu/`` (Triton) in files of the same stem.
"""

if __name__ != "fusegen.kernels":
    raise ImportError(f"import {__name__!r} as 'fusegen.kernels': this would make a second copy of the registry")
