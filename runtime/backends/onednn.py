"""Linear layers and convolutions through oneDNN as PyTorch ships it: weights prepacked, epilogues in the kernel.

``runtime.linear`` and ``runtime.conv2d`` mean ``activation(product + bias + residual) * multiplier``; oneDNN takes one
of the three with the product, and what is left, or what it does not know, is done in place on its output.
Convolutions give channels-last.  Where oneDNN has no products of the node's dtype on this CPU the same call is made in
float32, its epilogues included, and what it returns is rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu import bias_act, library
from fusegen.kernels.linear_int8 import ACTIVATIONS
from fusegen.kernels.onednn import serves
from fusegen.kernels.op import Declined
from fusegen.runtime import specialize
from fusegen.runtime.backends.binding import Binding, Call
from fusegen.runtime.derived import Weight, converted, stored
from fusegen.runtime.program import Node, Program, Ref
from fusegen.runtime.weights import Weights

LINEAR = ("aten.linear.default", "runtime.linear")
CONV = ("runtime.conv2d",)
# oneDNN spends about ten microseconds before a product starts, and MKL fewer: up to this many multiply-adds in float32
# the plain call is faster (measured on a Zen 5; on an AVX-512 Xeon, whose MKL is faster, up to twice as many).
SMALL = 1 << 20
# Up to so many bytes a product is copied to its planned place: that takes less time than to make its views again and
# to tell the kernels that read it where it lies now.
COPIED = 1 << 14
# From so many bytes on glibc asks the system for memory at every allocation, and each page of it faults when it is
# first written.  Such an output has its planned place: oneDNN adds to what lies there.
MAPPED = 32 << 20
_UNARY = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
_IN_PLACE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "silu": lambda x: torch.ops.aten.silu_(x),
    "gelu": lambda x: torch.ops.aten.gelu_(x),
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "quick_gelu": lambda x: x.copy_(ACTIVATIONS["quick_gelu"](x)),  # where our kernel is missing
}
_linear = torch.ops.mkldnn._linear_pointwise.default._op
_linear_binary = torch.ops.mkldnn._linear_pointwise.binary._op
_conv = torch.ops.mkldnn._convolution_pointwise.default._op
_conv_binary = torch.ops.mkldnn._convolution_pointwise.binary._op
_conv_onto = torch.ops.mkldnn._convolution_pointwise_.binary._op


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bind(node: Node, program: Program, metas: Mapping[str, Any]) -> Binding | None:
    """oneDNN's binding of the node, or None where it does not serve."""
    constant = isinstance(node.args["weight"], Ref) and node.args["weight"].name in program.weights
    out = specialize.spec_of(program, node.outputs[0])
    x, weight = metas["input"], metas["weight"]
    extra = [k for k in ("residual", "activation", "multiplier") if metas.get(k) not in (None, "none")]
    if not constant or 0 in out.shape or 0 in x.shape or x.dtype != weight.dtype or weight.dtype not in _DTYPES:
        return None
    if node.op in LINEAR and not extra and weight.dtype == torch.float32 and x.numel() * weight.shape[0] <= SMALL:
        return None
    name = "onednn " + " + ".join([node.op.split(".")[1], *extra])
    if not serves(weight.dtype):  # what rounds the result writes it where it shall lie
        short = str(weight.dtype).removeprefix("torch.")
        declined = Declined(f"onednn in {short}", "as PyTorch ships it, it has no such products on this CPU")
        return Binding("library", f"{name} in float32", (declined,), planned=True)
    if node.op in LINEAR:
        return Binding("library", name, planned=out.nbytes <= COPIED)
    return Binding("library", name, planned=out.nbytes >= MAPPED and extra in ([], ["residual"]))


def call(node: Node, binding: Binding, program: Program, weights: Weights) -> Call:
    """The call of a node that :func:`bind` bound, its weight prepacked."""
    args = node.args
    spec = specialize.spec_of(program, args["input"].name)
    shape = (1, *spec.sizes[1:]) if binding.by_sample else spec.sizes  # packed for the product that will be made
    others = args.get("residual"), args.get("multiplier")
    activation = args.get("activation", "none")
    wide = not serves(spec.dtype)
    if node.op in LINEAR:
        packed = _pack_linear(args["weight"].name, program, weights, math.prod(shape[:-1]))
        function: Callable[..., Any] = _linear_call(activation, others)
    else:
        packed = _pack_conv(node, program, weights, shape)
        where: list[Any] = [*(list(args[k]) for k in ("padding", "stride", "dilation")), args["groups"]]
        onto = binding.planned and not wide
        function = functools.partial(_conv_into, where) if onto else _conv_call(activation, others, where)
    if wide:
        function = functools.partial(_in_float32, function, None if binding.planned else spec.dtype)
    if binding.planned and (wide or node.op in LINEAR):
        function = functools.partial(_into, function)
    return Call(function, (args["input"], packed, args["bias"], *others), _NAMES)


_NAMES = ("input", "weight", "bias", "residual", "multiplier")


def _pack_linear(name: str, program: Program, weights: Weights, rows: int) -> Tensor:
    weight = _packable(program.weights[name])

    def pack(weight: Tensor) -> tuple[Tensor, bytes]:
        made = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return made, _layout(made)

    return weights.packed(("linear", name, weight.shape, rows), ("linear", name, weight.shape), weight, pack)


def _pack_conv(node: Node, program: Program, weights: Weights, shape: tuple[int, ...]) -> Tensor:
    name = node.args["weight"].name
    weight = _packable(program.weights[name])
    where = [list(node.args[k]) for k in ("padding", "stride", "dilation")]

    def pack(weight: Tensor) -> tuple[Tensor, bytes]:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        made = reorder(weight.to_mkldnn(), *where, node.args["groups"], list(shape))
        return made, _layout(made)

    return weights.packed(("conv2d", name, str(where), shape), ("conv2d", name, str(where)), weight, pack)


def _packable(weight: Weight) -> Weight:
    """What oneDNN packs of a weight: in float32, of what is stored, where it has no products of the weight's dtype."""
    if serves(weight.dtype):
        return weight
    source = stored(weight)
    return converted(weight if source is None else source, torch.float32)


def _layout(packed: Tensor) -> bytes:
    """oneDNN's description of a packed weight's layout."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


def _linear_call(activation: str, others: tuple[Any, Any]) -> Callable[..., Tensor]:
    residual, multiplier = (o is not None for o in others)
    unary, algorithm = _UNARY.get(activation, _UNARY["none"])
    after = _after(activation)
    if residual and not multiplier and after is None:
        return lambda x, w, b, r, m: _linear_binary(x, r, w, b, "add")
    if multiplier and not residual and after is None:
        return lambda x, w, b, r, m: _linear_binary(x, m, w, b, "mul")
    if residual:
        return lambda x, w, b, r, m: _finish(_linear_binary(x, r, w, b, "add"), after, m)
    if activation in _UNARY and not multiplier:
        return lambda x, w, b, r, m: _linear(x, w, b, unary, [], algorithm)
    rest = None if activation in _UNARY else after
    return lambda x, w, b, r, m: _finish(_linear(x, w, b, unary, [], algorithm), rest, m)


def _after(activation: str) -> Callable[[Tensor], Tensor] | None:
    """The activation in place on a product's output; its kernel is bound anew for every product."""
    if activation == "quick_gelu" and library.available():
        return bias_act.InPlace(activation)
    return _IN_PLACE.get(activation)


def _in_float32(
    function: Callable[..., Tensor], dtype: torch.dtype | None, x: Tensor, w: Tensor, *others: Tensor | None
) -> Tensor:
    """The call with all it reads in float32, ``w`` packed so; what it returns in ``dtype``, or as it is for None."""
    out = function(x.float(), w, *(None if other is None else other.float() for other in others))
    return out if dtype is None else out.to(dtype)


def _into(function: Callable[..., Tensor], *args: Any, out: Tensor) -> None:
    """Call, and copy what it returns to ``out``."""
    out.copy_(function(*args))


def _conv_call(activation: str, others: tuple[Any, Any], where: list[Any]) -> Callable[..., Tensor]:
    residual, multiplier = (o is not None for o in others)
    unary, algorithm = _UNARY.get(activation, _UNARY["none"])
    after = _after(activation)
    if residual and not multiplier and after is None:
        return lambda x, w, b, r, m: _conv_binary(x, r, w, b, *where, "add", None, None, [], None)
    if residual:
        return lambda x, w, b, r, m: _finish(_conv_binary(x, r, w, b, *where, "add", None, None, [], None), after, m)
    if activation in _UNARY and not multiplier:
        return lambda x, w, b, r, m: _conv(x, w, b, *where, unary, [], algorithm)
    rest = None if activation in _UNARY else after
    return lambda x, w, b, r, m: _finish(_conv(x, w, b, *where, unary, [], algorithm), rest, m)


def _conv_into(where: list[Any], x: Tensor, w: Tensor, b: Any, r: Tensor | None, m: None, out: Tensor) -> None:
    """The convolution, and its residual, written to ``out``."""
    out.zero_() if r is None else out.copy_(r)
    _conv_onto(out, x, w, b, *where, "add", None, None, [], None)


def _finish(out: Tensor, after: Callable[[Tensor], Tensor] | None, multiplier: Tensor | None) -> Tensor:
    """The epilogues that did not fit into the product, in place."""
    out = out if after is None else after(out)
    return out if multiplier is None else out.mul_(multiplier)
