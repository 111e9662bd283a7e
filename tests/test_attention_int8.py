"""attention_int8 against attention, and what a quantized session makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.attention_int8 import BLOCK, FINE, _table, shift_of
from fusegen.kernels.cpu import library
from fusegen.runtime import api
from fusegen.runtime.attention_int8 import RULE
from fusegen.runtime.quantize import RULE as QUANTIZED
from fusegen.runtime.quantize import quantize, quantized

registry.ops()
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
LEVELS = library.levels() if library.available() else ()
needs_vnni = pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="this CPU has no AVX512-BF16")
needs_tiles = pytest.mark.skipif("amx" not in LEVELS, reason="this CPU has no AMX")
INT8 = torch.ops.fusegen.attention_int8


def drawn(*shape: int, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    other = (*shape[:-2], shape[-2] if keys is None else keys, shape[-1])
    q, k, v = (torch.randn(s, generator=g) for s in (shape, other, other))
    return q, k, v


def error(q: Tensor, k: Tensor, v: Tensor) -> float:
    return relative(INT8(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize(("dim", "keys"), [(40, 1024), (80, 512), (160, 256), (64, 130)])
def test_it_is_attention_up_to_codes(dim: int, keys: int) -> None:
    assert error(*drawn(2, 2, 96, dim, keys=keys)) < 0.02


def test_what_all_keys_have_in_common_costs_nothing() -> None:
    q, k, v = drawn(1, 2, 64, 40, keys=512)
    assert error(q, k + 100 * torch.arange(40), v) < 1.1 * error(q, k, v)


def test_sharp_attention_stays_sharp() -> None:
    """Scores of some 60 octaves: nearly all of a query's weight is one key's."""
    _, k, v = drawn(1, 2, 64, 40, keys=512)
    assert error(20 * k[:, :, :64], k, v) < 0.02


def test_many_keys_far_below_the_highest_keep_their_share() -> None:
    """One key of weight 1, 4096 of 2^-12: together as much; codes relative to the row's highest would all be zero."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, BLOCK + 4096, 8), torch.zeros(1, 1, BLOCK + 4096, 8)
    q[..., 0] = 1.0
    k[:, :, BLOCK:, 0] = -12 * 8**0.5 * 0.6931471805599453
    k[:, :, 1:BLOCK, 0] = -40.0
    v[:, :, BLOCK:] = 1.0
    torch.testing.assert_close(INT8(q, k, v), torch.full((1, 1, 1, 8), 0.5), rtol=0, atol=0.02)


def test_scores_fit_sixteen_bits_and_weights_eight() -> None:
    assert all(127 * 127 * d + (1 << shift_of(d) >> 1) >> shift_of(d) <= 32767 for d in range(1, 257))
    table = _table()
    assert len(table) == FINE and int(table.max()) < 2**15 and (int(table[0]) * 512 + 2**14) >> 15 == 255


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="scale is 0"):
        INT8(x, x, x, 0.0)
    wide = torch.zeros(1, 1, 2, 320)
    with pytest.raises(ValueError, match="320 is over 256"):
        INT8(wide, wide, wide)


class Attends(nn.Module):
    """Attention of every kind: over itself, over a text, masked, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(64, 3 * 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        own = text.unflatten(-1, (2, 32)).transpose(1, 2)
        y = y + F.scaled_dot_product_attention(y, own, own)
        y = y + F.scaled_dot_product_attention(y, k, v, attn_mask=(x[:, None, :, 0] > 0)[:, :, None])
        y = y + F.scaled_dot_product_attention(y, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


def attends() -> tuple[Attends, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Attends().eval(), (torch.randn(2, 256, 64), torch.randn(2, 77, 64))


def test_attention_over_many_keys_alone_becomes_int8() -> None:
    module, inputs = attends()
    program = api.capture(module, inputs)
    made = quantize(program)
    assert quantized(made) == {"linear layers": 2, "attentions": 1}
    (done,) = [a for a in made.applied if a.rule == QUANTIZED]
    assert [why.partition(": ")[2] for why in done.left] == ["its keys are few: 77", "it has a mask", "it has a mask"]
    kept = [n.name for n in program.nodes if n.op.startswith("aten.scaled_dot_product")][:1]
    assert quantized(quantize(program, keep=kept)) == {"linear layers": 2}


@needs_vnni
def test_a_session_takes_the_kernel_and_says_so() -> None:
    module, inputs = attends()
    with library.forced("avx512_bf16"):
        session = api.compile(api.capture(module, inputs), dtype="bfloat16", quantize="int8")
        with torch.no_grad():
            assert relative(session(*inputs), module(*inputs)) < 0.02
    assert session.plan.counts()["kernel attention_int8 C++"] == 1 and session.plan.counts()["kernel attention"] == 3
    assert session.plan.notes == ("2 linear layers and 1 attentions multiply in int8, 3 stay",)
    assert [(a.count, a.left) for a in session.plan.applied if a.rule == RULE] == [(1, ())]


@needs_tiles
@pytest.mark.parametrize(
    ("rows", "dtype", "served"), [(1024, "bfloat16", 1), (256, "bfloat16", 0), (256, "float32", 1)]
)
def test_on_tiles_it_is_served_where_it_pays(rows: int, dtype: str, served: int) -> None:
    module, (_, text) = attends()
    inputs = torch.randn(2, rows, 64), text
    with library.forced("amx"):
        session = api.compile(api.capture(module, inputs), dtype=dtype, quantize="int8")
        with torch.no_grad():
            assert relative(session(*inputs), module(*inputs)) < 0.02
    assert session.plan.counts().get("kernel attention_int8 C++", 0) == served
    (done,) = [a for a in session.plan.applied if a.rule == RULE]
    assert done.count == served
    assert served or "256 queries over 256 keys are faster in bfloat16" in done.left[0]


@needs_library
def test_without_such_products_it_is_attention_in_the_compute_dtype() -> None:
    module, inputs = attends()
    with library.forced("scalar"):
        session = api.compile(api.capture(module, inputs), quantize="int8")
        session(*inputs)
    (done,) = [a for a in session.plan.applied if a.rule == RULE]
    assert done.count == 0 and "at level scalar" in done.left[0]
    assert session.plan.counts()["kernel attention"] == 4


@needs_vnni
def test_a_sample_is_its_own() -> None:
    module, (x, text) = attends()
    dynamic = {"x": {0: ("batch", 1, 8)}, "text": {0: "batch"}}
    program = api.capture(module, (x, text), dynamic=dynamic)
    with library.forced("avx512_bf16"):
        session = api.compile(program, dtype="bfloat16", quantize="int8", deterministic=True)
        assert torch.equal(session(x, text)[1:], session(x[1:], text[1:]))


@needs_tiles
def test_on_tiles_a_row_is_its_own() -> None:
    """Whatever stands beside it in its tile: rows that move what sums are relative to among them."""
    q, k, v = drawn(1, 1, 50, 40, keys=700)
    q[:, :, ::3] *= 300  # scores of hundreds of octaves
    k[:, :, :128] *= 0.01
    with library.forced("amx"):
        made = INT8(q, k, v)
        for i in (0, 1, 16, 49):
            assert torch.equal(made[:, :, i : i + 1], INT8(q[:, :, i : i + 1], k, v))
        assert torch.equal(made[:, :, 7:], INT8(q[:, :, 7:], k, v))
