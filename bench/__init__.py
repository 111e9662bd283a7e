"""Benchmarks: contenders interleaved, gated on correctness, set against the roofline measured in the same run.

Unlike the other layers this one may be imported as ``bench`` too: pytest does so when it collects ``bench/suite``.
"""
