"""Weights that are made when they are needed, and memory that is given back when they were."""

from __future__ import annotations

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.runtime import weights
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.derived import Derived, Moved, converted, meta, sources, stored, value, viewed
from fusegen.runtime.read import archive

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def test_what_is_known_of_a_weight_is_what_its_value_is() -> None:
    a, b = torch.randn(3, 5), torch.randn(2, 5)
    joined = Derived(lambda *parts: torch.cat(parts), a, converted(b, F32))
    for weight in (converted(a.t(), BF16), joined, viewed(lambda w: w[1:], converted(a, F16))):
        made = value(weight)
        assert (weight.shape, weight.dtype, weight.stride()) == (made.shape, made.dtype, made.stride())
        assert (weight.numel(), weight.dim(), weight.nbytes) == (made.numel(), made.dim(), made.nbytes)
        assert weight.device == made.device and meta(weight).device.type == "meta"
    assert torch.equal(value(joined), torch.cat([a, b]))
    assert [t.data_ptr() for t in sources(joined)] == [a.data_ptr(), b.data_ptr()]


def test_a_view_of_a_tensor_is_made_at_once() -> None:
    a = torch.randn(4, 3)
    got = viewed(torch.t, a)
    assert isinstance(got, Tensor) and got.data_ptr() == a.data_ptr()


@pytest.mark.parametrize("short", [BF16, F16])
def test_a_conversion_back_to_what_a_file_holds_is_none(short: torch.dtype) -> None:
    stored = torch.randn(4).to(short)
    assert converted(converted(stored, F32), short) is stored
    assert converted(stored, short) is stored


def test_a_lossy_conversion_is_not_skipped() -> None:
    stored = torch.randn(64)
    assert torch.equal(value(converted(converted(stored, BF16), F32)), stored.bfloat16().float())
    other = torch.randn(64).half()
    assert torch.equal(value(converted(converted(other, BF16), F16)), other.bfloat16().half())


def test_what_was_stored_is_found_through_moves_alone() -> None:
    a, b = torch.randn(3, 5), torch.randn(2, 5)
    assert stored(converted(a, BF16)) is a and stored(a) is None
    joined = Moved(lambda *parts: torch.cat(parts), converted(a, BF16), converted(b, BF16))
    found = stored(viewed(lambda w: w[1:], joined))
    assert found is not None and torch.equal(value(found), torch.cat([a, b])[1:])
    assert stored(Derived(torch.neg, converted(a, BF16))) is None
    for other in (b, b.bfloat16(), converted(b.half(), BF16)):  # of another dtype before, or not converted
        assert stored(Moved(lambda *parts: torch.cat(parts), converted(a, BF16), other)) is None


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    count = 5 * mmap.PAGESIZE // 4
    (tmp_path / "x").write_bytes(bytes(4 * 8) + torch.arange(count, dtype=torch.int32).numpy().tobytes())
    whole = archive.pages(archive.map_file(tmp_path / "x"), 32, 4 * count, 4).view(torch.int32)
    for part in (whole, whole[10:20], whole[-5:]):
        archive.release(part)
        assert torch.equal(whole, torch.arange(count, dtype=torch.int32))


def test_memory_that_is_no_file_keeps_its_values() -> None:
    own = torch.arange(3 * mmap.PAGESIZE, dtype=torch.uint8)
    archive.release(own)
    assert torch.equal(own, torch.arange(3 * mmap.PAGESIZE, dtype=torch.uint8))


def test_a_session_holds_no_second_copy_of_a_packed_weight(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 512)).eval()
    x = torch.randn(96, 512)
    Bundle.write(tmp_path / "x.fg", Manifest(name="x"), {"net": capture(net, (x,))})
    session = compile_program(Bundle.open(tmp_path / "x.fg").program("net"), "cpu", "bfloat16")
    want = net(x)
    for _ in range(2):
        torch.testing.assert_close(session(x), want, atol=5e-2, rtol=5e-2)
    (bound,) = session._captures.values()
    held = [*bound.registers, *session.weights._placed.values()]
    plain = [t for t in held if isinstance(t, Tensor) and not t.is_mkldnn and t.shape == (512, 512)]
    assert not plain, "only packed forms may be there"


def test_what_is_made_of_weights_alone_is_all_that_stays() -> None:
    """Launches of the constant phase kept 550 MiB of weights alive until all of it was done."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)).eval()
    x = torch.randn(2, 3, 16, 16)
    session = compile_program(capture(net, (x,)), "cpu", "float32")
    session(x)
    (bound,) = session._captures.values()
    if not any(s.phase == "constant" for s in bound.plan.steps):
        pytest.skip("no kernel takes Winograd's filters here")
    assert not bound.runs["constant"] and ("1.weight", net[1].weight.shape) not in session.weights._placed
    assert bound.nbytes == bound.plan.layout.peak  # the filters are the session's
    assert sum("winograd_filters" in request for request in session.weights.made) == 1


def test_a_bound_kernel_does_not_keep_what_it_was_moved_from() -> None:
    """Launches that kept their arguments kept 400 MiB of activations of Stable Diffusion's U-Net alive."""
    op = registry.get("layer_norm")
    args = op.cases[0].build(torch.Generator().manual_seed(0), F32)
    kernel = registry.pick(op, "cpu", args).kernel
    if kernel is None:
        pytest.skip("no kernel")
    launch, x = kernel.bind(op.allocate(*args), args), args[0].clone()
    first, second = weakref.ref(args[0]), weakref.ref(x)
    launch.move(0, x)
    launch.run()
    del args, x
    gc.collect()
    assert first() is None and second() is None


@pytest.mark.parametrize(("limit", "trims"), [(0, 1), (1 << 20, 0)])
def test_the_allocator_s_holes_go_back_once_after_weights_were_packed(
    monkeypatch: pytest.MonkeyPatch, limit: int, trims: int
) -> None:
    gave: list[int] = []

    def trim(pad: int) -> int:
        gave.append(pad)
        return 1

    monkeypatch.setattr(weights, "HOLES", limit)
    monkeypatch.setattr(weights, "_trim", lambda: trim)
    session = compile_program(capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (torch.randn(4, 64),)))
    for _ in range(2):
        session(torch.randn(4, 64))
    assert len(gave) == trims
