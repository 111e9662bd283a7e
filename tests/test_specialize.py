"""Static shapes: symbols bound, integers folded, strides as PyTorch has them, errors that name the input."""

from __future__ import annotations

import pytest
import torch
from networks import unet_inputs, unet_program
from torch import nn

from fusegen.runtime.api import capture
from fusegen.runtime.errors import RequestError
from fusegen.runtime.program import TensorSpec
from fusegen.runtime.specialize import Strided, bind_symbols, specialize


def given(batch: int = 3, **changed: TensorSpec) -> dict[str, TensorSpec]:
    names = ("x", "t", "context")
    specs = {k: TensorSpec(tuple(v.shape), v.dtype) for k, v in zip(names, unet_inputs(batch), strict=True)}
    return {**specs, **changed}


def test_every_spec_is_static_and_sizes_are_folded():
    static = specialize(unet_program(), given(3))
    assert not any(n.op.startswith(("sym.", "aten.sym_")) for n in static.nodes)
    assert all(isinstance(d, int) for s in static.specs.values() for d in s.shape)
    assert static.specs[static.outputs[0]].shape == (3, 3, 16, 16)


class Views(nn.Module):
    def forward(self, x):
        a = x.transpose(1, 2)
        return a.reshape(x.shape[0], -1) + 1, a.flatten(1).sum(), x.permute(2, 0, 1)


def test_strides_and_aliases_are_those_of_the_real_run():
    x = torch.randn(2, 3, 4)
    program = capture(Views(), (x,), dynamic={"x": {0: ("n", 1, 9), 2: ("m", 2, 9)}})
    static = specialize(program, {"x": TensorSpec((5, 3, 7), torch.float32)})
    real = Views()(torch.randn(5, 3, 7))
    for name, want in zip(static.outputs, real, strict=True):
        spec = static.specs[name]
        assert isinstance(spec, Strided)
        assert (spec.shape, spec.strides) == (tuple(want.shape), want.stride())
    transposed = next(n.outputs[0] for n in static.nodes if n.op == "aten.transpose.int")
    assert static.specs[transposed].alias == "x"
    reshaped = next(n.outputs[0] for n in static.nodes if n.op == "aten.reshape.default")
    assert static.specs[reshaped].alias is None, "a reshape that must copy is no view"


@pytest.mark.parametrize(
    "name, spec, words",
    [
        ("x", TensorSpec((3, 3, 16, 15), torch.float32), ["'x'", "15]", "dimension 3 must be 16"]),
        ("x", TensorSpec((3, 16, 16), torch.float32), ["'x'", "4 dimensions"]),
        ("context", TensorSpec((3, 5, 48), torch.float64), ["'context'", "float64", "float32 is expected"]),
        ("context", TensorSpec((2, 5, 48), torch.float32), ["'context'", "batch=3"]),
        ("x", TensorSpec((65, 3, 16, 16), torch.float32), ["'x'", "batch from 1 to 64", "out of range"]),
        ("x", TensorSpec((0, 3, 16, 16), torch.float32), ["'x'", "out of range"]),
    ],
)
def test_wrong_inputs_name_the_input_and_what_is_expected(name, spec, words):
    with pytest.raises(RequestError) as error:
        specialize(unet_program(), given(3, **{name: spec}))
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


class Halved(nn.Module):
    def forward(self, x):
        return x.reshape(2, x.shape[0] // 2, 4).sum(0)


def test_a_size_that_is_an_expression_is_solved():
    half = torch.export.Dim("half", min=1, max=8)
    program = capture(Halved(), (torch.randn(6, 4),), dynamic={"x": {0: 2 * half}})
    assert 5 in bind_symbols(program, {"x": TensorSpec((10, 4), torch.float32)}).values()
    with pytest.raises(RequestError, match="dimension 0 must be"):
        specialize(program, {"x": TensorSpec((9, 4), torch.float32)})
