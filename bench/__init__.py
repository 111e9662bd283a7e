"""Benchmarks: contenders interleaved, gated on correctness, set against the roofline measured in the same run."""

if __name__ != "fusegen.bench":
    raise ImportError(f"import {__name__!r} as 'fusegen.bench'")
