"""Sessions: results, shapes, trajectories, threads, memory, and inputs that do not fit."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from networks import plainly, relative, text_encoder, text_program, tokens, unet, unet_inputs, unet_program

from fusegen.runtime import api, collector, engine
from fusegen.runtime.errors import Error, OutOfMemoryError, RequestError
from fusegen.runtime.program import TensorSpec

EXACT, FP32 = 0.0, 1e-5


@pytest.mark.parametrize("backend, bound", [("eager", EXACT), ("cpu", FP32)])
def test_a_session_equals_the_module_at_every_batch_size(backend, bound):
    session = api.compile(unet_program(), backend=backend)
    for batch in (1, 3, 2, 3):
        inputs = unet_inputs(batch, seed=batch)
        assert relative(session(*inputs), plainly(unet(), *inputs)) <= bound


@pytest.mark.parametrize("backend, bound", [("eager", EXACT), ("cpu", FP32)])
def test_a_text_encoder_equals_the_module(backend, bound):
    session = api.compile(text_program(), backend=backend)
    for batch in (1, 4):
        assert relative(session(tokens(batch)), plainly(text_encoder(), tokens(batch))) <= bound


def test_new_inputs_of_the_same_shape_give_new_results():
    session = api.compile(unet_program())
    for seed in (1, 2, 3):
        inputs = unet_inputs(2, seed=seed)
        assert relative(session(*inputs), plainly(unet(), *inputs)) <= FP32


def test_bfloat16_errs_no_more_than_eager_bfloat16():
    inputs = unet_inputs(2)
    want = plainly(unet(), *inputs)
    ours = relative(api.compile(unet_program(), dtype="bfloat16")(*inputs), want)
    eager = relative(api.compile(unet_program(), dtype="bfloat16", backend="eager")(*inputs), want)
    assert ours <= 2e-2
    assert ours <= 1.25 * eager


def test_outputs_are_the_callers_own():
    session = api.compile(unet_program())
    inputs = unet_inputs(2)
    first = session(*inputs)
    kept = first.clone()
    second = session(*unet_inputs(2, seed=9))
    assert torch.equal(first, kept), "a later call wrote into an earlier output"
    assert first.data_ptr() != second.data_ptr() and first.is_contiguous()
    first.requires_grad_(True).sum().backward()  # no inference tensor
    second.zero_()
    assert relative(session(*inputs), kept) == 0


def test_inputs_may_be_given_by_name_and_in_any_layout():
    session = api.compile(unet_program())
    x, t, context = unet_inputs(2)
    want = session(x, t, context)
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(session(context=context, t=t, x=strided), want)
    assert torch.equal(session(strided, context=context, t=t), want)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s, x, t, c: s(x, t), "'context' is missing"),
        (lambda s, x, t, c: s(x, t, c, c), "4 inputs"),
        (lambda s, x, t, c: s(x, t, c, x=x), "twice"),
        (lambda s, x, t, c: s(x, t, c, y=x), "no input"),
        (lambda s, x, t, c: s(x, 3.0, c), "'t' is a float"),
        (lambda s, x, t, c: s(x.double(), t, c), "float32 is expected"),
        (lambda s, x, t, c: s(x, t, c[:1]), "batch=2"),
        (lambda s, x, t, c: s.trajectory({"contxt": c}, {"t": t}), "'contxt'"),
        (lambda s, x, t, c: s.trajectory({"context": c}, {"t": t[:0]}), "at least one"),
        (lambda s, x, t, c: s.trajectory({"context": c}, {"t": t})(2, x), "step 2"),
    ],
)
def test_what_does_not_fit_is_one_typed_line(call, words):
    session = api.compile(unet_program())
    with pytest.raises(RequestError, match=words) as error:
        call(session, *unet_inputs(2))
    assert "\n" not in str(error.value)
    assert session(*unet_inputs(2)).shape == (2, 3, 16, 16)


def test_captured_shapes_are_evicted_within_the_memory_bound():
    session = api.compile(unet_program())
    for batch in (1, 2, 3):
        session(*unet_inputs(batch))
    assert len(session._captures) == 3
    session.memory = next(reversed(session._captures.values())).nbytes
    session(*unet_inputs(1))
    assert len(session._captures) == 1
    assert session.plan.program.inputs["x"].shape[0] == 1
    inputs = unet_inputs(3)
    assert relative(session(*inputs), plainly(unet(), *inputs)) <= FP32


def test_prepacked_weights_are_shared_by_captures():
    session = api.compile(unet_program())
    session(*unet_inputs(2))
    packed = (len(session.weights._packed), len(session.weights.made))  # the library's, and ours
    assert sum(packed) > 10
    session.trajectory({}, {"t": torch.rand(2, 2)})(0, *unet_inputs(2)[::2])
    assert (len(session.weights._packed), len(session.weights.made)) == packed


@pytest.mark.parametrize("backend, bound", [("eager", EXACT), ("cpu", FP32)])
def test_a_trajectory_equals_plain_calls(backend, bound):
    session = api.compile(unet_program(), backend=backend)
    x, _, context = unet_inputs(2)
    times = torch.tensor([[900.0, 900.0], [500.0, 400.0], [3.0, 7.0]])
    trajectory = session.trajectory(fixed={"context": context}, per_step={"t": times})
    other = session.trajectory(fixed={"context": -context}, per_step={"t": times + 1})
    for step in (0, 1, 2, 1):
        noise = x * (step + 1)
        assert relative(trajectory(step, noise), plainly(unet(), noise, times[step], context)) <= bound
        assert relative(other(step, noise), plainly(unet(), noise, times[step] + 1, -context)) <= bound


def test_a_trajectory_takes_one_number_a_step_and_a_new_batch():
    session = api.compile(unet_program())
    times = torch.tensor([900.0, 10.0])
    trajectory = session.trajectory(fixed={}, per_step={"t": times})
    for batch in (2, 3):
        x, _, context = unet_inputs(batch)
        want = plainly(unet(), x, times[1].expand(batch), context)
        assert relative(trajectory(1, x=x, context=context), want) <= FP32


def test_the_loop_of_a_trajectory_leaves_the_text_and_the_time_out():
    session = api.compile(unet_program())
    x, t, context = unet_inputs(2)
    trajectory = session.trajectory(fixed={"context": context}, per_step={"t": t[None]})
    trajectory(0, x)
    plan = trajectory._capture.plan
    names = [s.node.name for s in plan.steps if s.phase in ("fixed", "per_step") and "linear" in s.node.op]
    looped = [s for s in plan.steps if s.phase == "step" and "linear" in s.node.op]
    assert len(names) >= 3
    assert all("x" in s.depends for s in looped)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_bits_do_not_depend_on_the_batch(dtype):
    session = api.compile(unet_program(), dtype=dtype, deterministic=True)
    whole = unet_inputs(5)
    want = session(*whole)
    assert relative(want, plainly(unet(), *whole)) <= 2e-2
    for at in (slice(0, 1), slice(3, 4), slice(1, 4)):
        assert torch.equal(session(*(i[at] for i in whole)), want[at])
    turned = session(*(i.flip(0) for i in whole))
    assert torch.equal(turned.flip(0), want)


def test_threads_are_served_one_after_another():
    session = api.compile(unet_program())
    wants = {seed: session(*unet_inputs(1 + seed % 2, seed=seed)) for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not torch.equal(session(*unet_inputs(1 + seed % 2, seed=seed)), wants[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_out_of_memory_is_one_error_and_the_next_call_works(monkeypatch, raised):
    session = api.compile(unet_program())
    inputs = unet_inputs(2)
    want = session(*inputs)

    def fail(*args):
        raise raised

    for phase in ("build", "run"):
        with monkeypatch.context() as patch:
            patch.setattr(engine.Capture, phase, fail)
            with pytest.raises(OutOfMemoryError):
                session(*(unet_inputs(3) if phase == "build" else inputs))
        assert torch.equal(session(*inputs), want)
        assert relative(session(*unet_inputs(3)), plainly(unet(), *unet_inputs(3))) <= FP32


def test_profile_gives_shares_that_add_up():
    session = api.compile(unet_program())
    rows = session.profile(*unet_inputs(2))
    assert sum(r.part for r in rows) == pytest.approx(1)
    assert [r.seconds for r in rows] == sorted((r.seconds for r in rows), reverse=True)


def test_compile_refuses_what_it_does_not_know():
    program = text_program()
    for more, words in (
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "int3"}, "int3"),
        ({"backend": "fast"}, "'fast'.*cpu, cuda, eager"),
        ({"quantize": "q4"}, "q4"),
    ):
        with pytest.raises(Error, match=words):
            api.compile(program, **more)
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="no CUDA device"):
            api.compile(program, device="cuda")


def test_a_profile_says_what_each_kernel_must_do():
    session = api.compile(unet_program())
    specs = [TensorSpec(tuple(x.shape), x.dtype) for x in unet_inputs(2)]
    plan = session.planned(dict(zip(session.program.inputs, specs, strict=True)))
    rows = session.profile(*unet_inputs(2))
    steps = [s for s in plan.steps if s.phase == "step" and s.binding.how != "view"]
    assert sum(r.flops for r in rows) == sum(s.flops for s in steps) > 0
    assert sum(r.bytes for r in rows) == sum(s.bytes for s in steps) > 0
    assert sum(len(r.calls) for r in rows) == len(steps)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with collector.resting():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()
