"""Writing the key-value cache: exact, in place, and nothing beside it; the operator under PyTorch's own rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library

registry.ops()
append = torch.ops.fusegen.kv_append


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_arrives_and_no_other_changes(dtype: torch.dtype) -> None:
    k = torch.tensor([torch.nan, -0.0, torch.inf, 1e-40] * 4, dtype=dtype).view(2, 2, 2, 2)
    caches = [torch.full((2, 2, 5, 2), 7.0, dtype=dtype) for _ in range(2)]
    assert append(k, -k, *caches, torch.tensor([3, 0])) is None
    for cache, new in zip(caches, (k, -k), strict=True):
        assert torch.equal(cache[0, :, 3:].view(torch.uint8), new[0].contiguous().view(torch.uint8))
        assert torch.equal(cache[1, :, :2].view(torch.uint8), new[1].contiguous().view(torch.uint8))
        assert (cache[0, :, :3] == 7).all() and (cache[1, :, 2:] == 7).all()


def test_it_stays_one_node_in_an_exported_graph() -> None:
    class Step(torch.nn.Module):
        def forward(self, k: Any, cache: Any, at: Any) -> Any:
            append(k, k, cache, cache.clone(), at)
            return cache.sum()

    program = torch.export.export(Step(), (torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 3, 4), torch.tensor([1])))
    assert sum(n.target is append.default for n in program.graph.nodes) == 1


@pytest.mark.skipif(not library.available(), reason=str(library.missing()))
@pytest.mark.parametrize("threads", [1, 3])
def test_a_prompt_is_written_by_any_number_of_threads(threads: int) -> None:
    before, k = torch.get_num_threads(), torch.randn(2, 3, 500, 64)
    caches = [torch.zeros(2, 3, 600, 64) for _ in range(2)]
    try:
        torch.set_num_threads(threads)
        append(k, k + 1, *caches, torch.tensor([0, 100]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(caches[0][0, :, :500], k[0]) and torch.equal(caches[1][1, :, 100:], k[1] + 1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"v": torch.zeros(1, 2, 2, 4)}, "not both"),
        ({"k_cache": torch.zeros(1, 3, 5, 4)}, "not both"),
        ({"positions": torch.zeros(1)}, "positions"),
        ({"k": torch.zeros(1, 2, 1, 4, dtype=torch.half), "v": torch.zeros(1, 2, 1, 4, dtype=torch.half)}, "dtypes"),
        ({"k": torch.zeros(1, 3, 1, 4), "v": torch.zeros(1, 3, 1, 4)}, "differ"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], word: str) -> None:
    good = {name: torch.zeros(1, 2, n, 4) for name, n in (("k", 1), ("v", 1), ("k_cache", 5), ("v_cache", 5))}
    with pytest.raises(ValueError, match=word):
        append(**(good | {"positions": torch.tensor([0])} | change))
