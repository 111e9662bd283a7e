"""Quantizing a program: codes and scales by definition, which layers stay, the plan's epilogues, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import relative, unet, unet_inputs, unet_program
from torch import Tensor, nn

from fusegen.runtime import api, conv_int8
from fusegen.runtime.backends import onednn, onednn_int8
from fusegen.runtime.backends.cpu import Cpu
from fusegen.runtime.conv_int8 import RULE as RULE_PLAIN
from fusegen.runtime.derived import sources, value
from fusegen.runtime.errors import RequestError
from fusegen.runtime.program import Program, TensorSpec
from fusegen.runtime.quantize import RULE, codes_of_weight, layers, quantize, quantized, scale_of_weight
from fusegen.runtime.specialize import specialize

LINEAR = "fusegen.linear_int8.default"


class Feed(nn.Module):
    """Rows through layers of every kind: q, k and v, an activation, a residual, a gate, one of few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=b) for b in (True, False, False))
        self.up, self.down = nn.Linear(64, 2 * 96), nn.Linear(96, 64)
        self.act, self.time = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.time(t)[:, None]
        x = x + F.silu(self.q(x)) * torch.sigmoid(self.k(x) - self.v(x).flip(1))
        value, gate = self.up(x).chunk(2, dim=-1)
        x = x + self.down(value * F.gelu(gate))
        return F.gelu(self.act(x))


def feed(seed: int = 0) -> tuple[Feed, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return Feed().eval(), (torch.randn(2, 10, 64), torch.randn(2, 64))


def program(module: nn.Module, *inputs: Tensor) -> Program:
    return api.capture(module.eval(), inputs)


def coded(weight: Tensor) -> tuple[Tensor, Tensor]:
    return codes_of_weight(weight), scale_of_weight("w", weight)


def test_codes_and_scales_are_the_definition() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2] = 0.0, weight[2] * 1e-20
    weight[3] = 0.0
    weight[3, 7] = -3.0
    codes, scale = coded(weight)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    want = weight.abs().amax(1).double() / 127
    assert torch.allclose(scale.double(), want, rtol=1e-6, atol=0)
    assert (scale[1], codes[1].abs().max()) == (0, 0)
    assert codes[3, 7] == -127 and codes[3].abs().sum() == 127
    error = (codes.double() * scale.double()[:, None] - weight.double()).abs().amax(1)
    assert bool((error <= 0.5001 * want).all())


def test_a_convolutions_weight_has_a_scale_for_each_output_channel() -> None:
    weight = torch.randn(4, 3, 3, 3)
    codes, scale = coded(weight)
    assert codes.shape == weight.shape and scale.shape == (4,)
    back = codes.double() * scale.double()[:, None, None, None]
    assert relative(back, weight) < 0.01


def test_one_element_and_none() -> None:
    codes, scale = coded(torch.full((1, 1), -2.0))
    assert (codes.item(), scale.item()) == (-127, pytest.approx(2 / 127))
    assert coded(torch.zeros(0, 8))[1].shape == (0,)


def test_a_quantized_program_holds_no_codes() -> None:
    """A session makes them of the weights as it packs them, so that they are not in memory twice."""
    module, inputs = feed()
    made = quantize(program(module, *inputs))
    codes = {name: w for name, w in made.weights.items() if w.dtype == torch.int8}
    assert codes and not any(isinstance(w, Tensor) for w in codes.values())
    weight = module.down.weight.detach()
    (own,) = (w for name, w in codes.items() if name.startswith("down."))
    assert torch.equal(value(own), codes_of_weight(weight)) and sources(own)[0].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    module, inputs = feed()
    with torch.no_grad():
        module.down.weight[3, 5] = bad
    with pytest.raises(RequestError, match=r"'down.weight' holds an infinity or NaN"):
        quantize(program(module, *inputs))


def test_layers_of_few_rows_stay_and_say_so() -> None:
    module, inputs = feed()
    made = quantize(program(module, *inputs))
    assert quantized(made) == {"linear layers": 6}
    (done,) = [a for a in made.applied if a.rule == RULE]
    assert done.count == 6 and [why.partition(": ")[2] for why in done.left] == ["its rows are few: one a sample"]
    assert not any(name.endswith("down.weight") for name in made.weights)  # the floats are gone


def test_named_layers_stay() -> None:
    module, inputs = feed()
    made = quantize(program(module, *inputs), keep=("down.weight", "up"))
    assert quantized(made) == {"linear layers": 4} and "down.weight" in made.weights
    with pytest.raises(RequestError, match="no layer or weight is called 'other'"):
        quantize(program(module, *inputs), keep=("other",))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-2), ("bfloat16", 2.5e-2)])
def test_a_session_is_close_to_the_unquantized_module(dtype: str, bound: float) -> None:
    module, inputs = feed()
    session = api.compile(program(module, *inputs), dtype=dtype, quantize="int8")
    with torch.no_grad():
        want = module(*inputs)
    for _ in range(2):
        assert relative(session(*inputs), want) <= bound
    rules = {a.rule: a.count for a in session.plan.applied}
    assert rules["linears of one input"] == 2  # k and v; q has a bias, and an activation
    assert session.plan.notes == ("6 linear layers multiply in int8, 1 stay",)


def test_bits_do_not_depend_on_the_batch() -> None:
    module, (x, t) = feed()
    dynamic = {"x": {0: ("batch", 1, 8)}, "t": {0: "batch"}}
    session = api.compile(api.capture(module, (x, t), dynamic=dynamic), quantize="int8", deterministic=True)
    assert torch.equal(session(x, t)[1:], session(x[1:], t[1:]))


def test_what_cannot_be_quantized_is_one_line() -> None:
    module, inputs = feed()
    made = program(module, *inputs)
    with pytest.raises(RequestError, match="'int3' is no kind of quantization"):
        api.compile(made, quantize="int3")
    with pytest.raises(RequestError, match="quantized already"):
        quantize(quantize(made))


def test_a_unet_in_int8_is_close_to_float32() -> None:
    made = quantize(unet_program())
    assert quantized(made).keys() == {"linear layers", "convolutions"}  # its attention is over few keys
    session = api.compile(made, dtype="float32")
    inputs = unet_inputs(3)
    with torch.no_grad():
        want = unet()(*inputs)
    assert relative(session(*inputs), want) <= 3e-2


class Block(nn.Module):
    """Convolutions of every kind: padded, strided, 1x1, an activation behind one, a residual behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(48, 3, 3, padding=1)
        self.same, self.down = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.one, self.groups = nn.Conv2d(48, 48, 1), nn.Conv2d(64, 64, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        x = F.silu(self.same(x) + x)
        x = F.relu(self.down(x))
        return self.last(self.one(x) + x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolutions_run_as_the_op_means(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that a plan would make plain, where the library has no int8 products."""
    monkeypatch.setattr(Cpu, "no_int8_convolutions", lambda self: None)
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(3, 3, 9, 7)
    made = quantize(program(module, x))
    assert quantized(made) == {"convolutions": 3}
    session, reference = (api.compile(made, dtype=dtype, backend=b) for b in ("cpu", "eager"))
    counts = [k for k in session.planned({"x": made.inputs["x"]}).counts() if "conv2d_int8" in k]
    want = reference(x)
    for _ in range(2):
        assert relative(session(x), want) <= {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    if onednn_int8.served():
        names = {"library onednn conv2d_int8", "library onednn conv2d_int8 + residual"}
        assert names <= {*counts, "library onednn conv2d_int8"}
    else:
        assert counts == ["aten runtime.conv2d_int8"]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_where_the_library_has_no_int8_products_convolutions_are_plain(
    monkeypatch: pytest.MonkeyPatch, dtype: str, bound: float
) -> None:
    """Of the weights that the codes stand for, and with what follows them in the product, as ever."""
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(2, 3, 9, 7)
    made = quantize(program(module, x))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    session = api.compile(made, dtype=dtype)
    with torch.no_grad():
        for layer in (module.same, module.down, module.one):
            codes, scale = coded(layer.weight)
            layer.weight.copy_(codes * scale[:, None, None, None])
        want = module(x)
    for _ in range(2):
        assert relative(session(x), want) <= bound
    counts = session.plan.counts()
    wide = " in float32" if not onednn.serves(getattr(torch, dtype)) else ""
    assert counts[f"library onednn conv2d + residual{wide}"] == 1 and not any("int8" in name for name in counts)
    (applied,) = [a for a in session.plan.applied if a.rule == RULE_PLAIN]
    assert len(applied.left) == 3 and all("VNNI" in line for line in applied.left)


def test_convolutions_with_something_behind_them_stay_what_they_are() -> None:
    """As no quantizing makes them: the op itself, in a module."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes, scale = coded(torch.randn(8, 8, 3, 3))
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale)

        def forward(self, x: Tensor) -> Tensor:
            where = ("relu", (1, 1), (1, 1), (1, 1))
            return torch.ops.fusegen.conv2d_int8(x, self.codes, self.scale, None, None, *where)

    torch.manual_seed(0)
    made = specialize(program(Own(), torch.randn(1, 8, 5, 5)), {"x": TensorSpec((1, 8, 5, 5), torch.float32)})
    assert conv_int8.settled(made, "for some reason") is made


def test_a_sample_of_a_convolution_is_its_own() -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(3, 3, 8, 8)
    x[0] *= 100  # would coarsen the others, were a scale shared
    made = quantize(api.capture(module, (x,), dynamic={"x": {0: ("batch", 1, 8)}}), keep=("first", "last"))
    session = api.compile(made, deterministic=True)
    assert torch.equal(session(x)[1:], session(x[1:]))


@pytest.mark.parametrize(("channels", "count"), [(64, 0), (96, 1)])
def test_a_convolution_behind_an_upsampling_stays_where_it_has_few_channels(channels: int, count: int) -> None:
    """Below 96 int8 gains nothing over the form of both that bfloat16 has."""
    up = nn.Upsample(scale_factor=2, mode="nearest")
    made = quantize(program(nn.Sequential(up, nn.Conv2d(channels, 32, 3, padding=1)), torch.randn(1, channels, 4, 4)))
    (done,) = [a for a in made.applied if a.rule == RULE]
    assert done.count == count and ["upsampling" in line for line in done.left] == [True] * (1 - count)


def test_each_layer_has_an_error_of_its_own() -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        module.one.weight[:, 0] = 500.0 * module.one.weight[:, 0].abs().max()  # coarsens every row's scale
    found = layers.errors(program(module, x), {"x": x})
    assert len(found) == 3 and list(found.values()) == sorted(found.values(), reverse=True)
    seen: dict[str, Tensor] = {}
    hook = module.same.register_forward_hook(lambda _, given, out: seen.update(x=given[0], y=out))
    with torch.no_grad():
        module(x)
        hook.remove()
        codes, scale = coded(module.same.weight)
        if onednn_int8.served():
            where = ("none", (1, 1), (1, 1), (1, 1))
            got = torch.ops.fusegen.conv2d_int8(seen["x"], codes, scale, module.same.bias, None, *where)
        else:  # this machine runs it as a plain one, by what the codes stand for
            got = F.conv2d(seen["x"], codes * scale[:, None, None, None], module.same.bias, padding=1)
    assert relative(got, seen["y"]) in [pytest.approx(e, rel=1e-3) for e in found.values()]
