"""int8 convolutions through oneDNN: what is read is quantized by a kernel of our own, the products are the library's.

``runtime.conv2d_int8``: ``codes, scale_x, zero_x`` (the three that the op ``quantize_uint8`` makes of the input),
``weight, scale, bias, residual, activation, stride, padding, dilation`` as of the op ``conv2d_int8``, and ``dtype``,
that of the output.  The library takes one scale and zero point a call, so that each sample is a call, and its bits do
not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.conv2d_int8 import finish, output_shape
from fusegen.kernels.linear_int8 import ACTIVATIONS
from fusegen.runtime import specialize
from fusegen.runtime.backends.binding import Binding, Call
from fusegen.runtime.derived import value
from fusegen.runtime.program import Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names
from fusegen.runtime.weights import Weights

CONV = "runtime.conv2d_int8"
_OP, _QUANTIZE = "fusegen.conv2d_int8.default", "fusegen.quantize_uint8.default"
_conv = torch.ops.onednn.qconv2d_pointwise.default._op
_conv_sum = torch.ops.onednn.qconv2d_pointwise.binary._op
_NAMES = ("codes", "scale_x", "zero_x", "weight", "scale", "bias", "residual")


def plain(
    codes: Tensor, scale_x: Tensor, zero_x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What the node means, in float32 (the integers are exact below 2^24) and sample by sample; channels-last."""
    shape = output_shape(codes, weight, stride, padding, dilation)
    out = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=torch.channels_last)
    if codes.is_meta:
        return out
    for b in range(out.shape[0]):
        sums = F.conv2d(codes[b : b + 1].float() - zero_x[b], weight.float(), None, stride, padding, dilation)
        more = None if residual is None else residual[b : b + 1]
        out[b : b + 1] = finish(sums * scale_x[b] * scale[:, None, None], bias, more, activation)
    return out


specialize.SHAPES[CONV] = plain


def opened(program: Program) -> Program:
    """Each ``conv2d_int8`` of the static ``program`` as the quantizing of its input and ``runtime.conv2d_int8``.

    Convolutions of one input share what it becomes.
    """
    names, made = Names.of(program), dict[str, tuple[Ref, Ref, Ref]]()
    nodes: list[Node] = []
    for node in program.nodes:
        if node.op != _OP:
            nodes.append(node)
            continue
        x = node.args["x"].name
        if x not in made:
            codes, scale, zero = (names.fresh(f"{x}.{part}") for part in ("codes", "scale", "zero"))
            made[x] = Ref(codes), Ref(scale), Ref(zero)
            nodes.append(Node(codes, _QUANTIZE, {"x": Ref(x)}, (codes, scale, zero)))
        args = dict(zip(_NAMES, made[x], strict=False)) | {k: v for k, v in node.args.items() if k != "x"}
        spec = specialize.spec_of(program, node.outputs[0])
        nodes.append(replace(node, op=CONV, args=args | {"dtype": spec.dtype}))
    return replace(program, nodes=tuple(nodes)) if made else program


def served() -> bool:
    """Whether the library is there and this CPU has int8 products that do not saturate."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def bind(node: Node, program: Program) -> Binding:
    """oneDNN's binding where it serves, else the plain call."""
    out = specialize.spec_of(program, node.outputs[0])
    constant = all(node.args[k].name in program.weights for k in ("weight", "scale"))
    if not constant or not served() or out.dtype not in _DTYPES or not out.nbytes:
        return Binding("aten", CONV)
    extra = [k for k in ("residual", "activation") if node.args[k] not in (None, "none")]
    return Binding("library", " + ".join(["onednn conv2d_int8", *extra]), planned=True)


_DTYPES = (torch.float32, torch.bfloat16)


def call(node: Node, binding: Binding, program: Program, weights: Weights) -> Call:
    """The call of a node that :func:`bind` bound, its weight prepacked for one sample."""
    args = node.args
    where = [list(args[k]) for k in ("stride", "padding", "dilation")]
    tail = (args["activation"], *where, args["dtype"])
    inputs = tuple(args[k] for k in _NAMES)
    if binding.how != "library":
        return Call(lambda *given: plain(*given, *tail), inputs, _NAMES)
    spec = specialize.spec_of(program, node.outputs[0])
    packed = _pack(node, program, weights, where)
    scale = value(program.weights[args["scale"].name])
    zeros = torch.zeros(scale.shape[0], dtype=torch.int64)
    function = partial(_samples, packed, scale, zeros, where, args["activation"], spec)
    given = tuple(args[k] for k in _INPUTS)
    return Call(function, given, _INPUTS)


_INPUTS = ("codes", "scale_x", "zero_x", "bias", "residual")


def _pack(node: Node, program: Program, weights: Weights, where: list[list[int]]) -> Tensor:
    name = node.args["weight"].name
    weight, scale = program.weights[name], value(program.weights[node.args["scale"].name])
    shape = (1, *specialize.spec_of(program, node.args["codes"].name).sizes[1:])

    def pack(weight: Tensor) -> tuple[Tensor, bytes]:
        made = torch.ops.onednn.qconv_prepack(weight.contiguous(), scale, 1.0, 128, *where, 1, list(shape))
        return made, bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(made).tolist())

    return weights.packed(("conv2d_int8", name, str(where), shape), ("conv2d_int8", name, str(where)), weight, pack)


def _samples(
    weight: Tensor, scale: Tensor, zeros: Tensor, where: list[list[int]], activation: str, spec: specialize.Strided,
    codes: Tensor, scale_x: Tensor, zero_x: Tensor, bias: Tensor | None, residual: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The convolution, a call a sample, to ``out``; a residual is what the library adds its sums to."""
    out = spec.empty("cpu") if out is None else out
    summed = False
    if residual is not None and activation == "none":
        summed, out = True, out.copy_(residual)
    for b, (by, zero) in enumerate(zip(scale_x.tolist(), zero_x.tolist(), strict=True)):
        x, part = codes[b : b + 1], out[b : b + 1]
        if summed:
            _conv_sum(x, by, zero, weight, scale, zeros, part, bias, *where, 1, 1.0, 0, spec.dtype, 1.0, 0, "sum", 1.0,
                      "none", [], "")  # fmt: skip
        else:
            part.copy_(_conv(x, by, zero, weight, scale, zeros, bias, *where, 1, 1.0, 0, spec.dtype, "none", [], ""))
    if not summed and activation != "none":
        out.copy_(ACTIVATIONS[activation](out))
        out = out if residual is None else out.add_(residual)
    return out
