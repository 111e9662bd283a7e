"""Runs a program in another floating-point dtype.

One rule decides: where an operator's floating-point operands differ in dtype, they all take the compute dtype.  What is
large starts in it (inputs of two or more dimensions; weights, with whatever they meet), and what is small or made from
integers starts in float32 (time steps, positions), so that sinusoids of time and rotary angles are computed in float32
and join the compute dtype where they meet the first weight.  Kernels accumulate in float32 whatever the dtype, so that
norms and attention need no casts around them; parameters of norms stay in float32.

A cast that the exporter wrote down as ``to(float32)`` may mean "for precision" or "the model's dtype".  It is taken
for the first where a sensitive operator (softmax written out, powers, exponentials, sums) follows, otherwise for the
second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusegen.runtime import state
from fusegen.runtime.derived import Weight, converted
from fusegen.runtime.program import Node, Program, Ref, TensorSpec, substitute
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite.graph import FLOATS, Names, overload, spec_of, tensors

CAST = "aten.to.dtype"
# Operators that make the compute dtype whatever they are given, since they hold the model's work.
_GEMM_WORDS = (
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution addmm embedding"
)
_INT8 = ("fusegen.linear_int8.default", "fusegen.conv2d_int8.default")
_GEMM = (*(f"aten.{name}." for name in _GEMM_WORDS.split()), *_INT8)
# Arguments left as they are: additive masks reach below the range of float16, cosines and sines lose their low bits in
# bfloat16, as the scales of int8 weights do, and kernels take any dtype.
_LEFT = {("fusegen.attention.default", "mask"), ("aten.scaled_dot_product_attention.default", "attn_mask")}
_LEFT |= {(f"fusegen.{op}.default", table) for op in ("rope", "qk_norm_rope") for table in ("cos", "sin")}
_LEFT |= {(op, key) for op in _INT8 for key in ("scale", "bias")}
# What a request asks of a sampler, a number a row.
_ASKED = "temperature top_p min_p typical_p repetition frequency presence bias bias_values"
_LEFT |= {("fusegen.sample_token.default", name) for name in _ASKED.split()}
# Parameters of norms, which kernels take in float32.
_NORM_WORDS = "group_norm layer_norm rms_norm add_norm join_group_norm qk_norm_rope"
_NORMS = {f"fusegen.{name}.default" for name in _NORM_WORDS.split()}
_PARAMETERS = {"weight", "bias"}
_SENSITIVE_WORDS = """
    softmax _softmax log_softmax _log_softmax exp exp2 expm1 log log2 log10 log1p logsumexp pow square rsqrt sqrt sin
    cos tan mean var var_mean std std_mean sum cumsum cumprod prod norm linalg_vector_norm softplus
"""
_SENSITIVE = frozenset(_SENSITIVE_WORDS.split())
_THROUGH_WORDS = """
    add sub mul div neg rsub masked_fill where reshape view unsqueeze squeeze expand transpose permute select slice
    chunk split split_with_sizes flatten unflatten t unbind cat stack
"""
_THROUGH = frozenset(_THROUGH_WORDS.split())


def tables(program: Program) -> set[str]:
    """The weights that are read as cosines, sines or scales, and lose their low bits in a shorter dtype."""
    keys = {(op, key) for op, key in _LEFT if key in ("cos", "sin", "scale")}
    values = (v for n in program.nodes for k, v in n.args.items() if (n.op, k) in keys)
    return {v.name for v in values if isinstance(v, Ref) and v.name in program.weights}


def float_casts(program: Program) -> dict[str, str]:
    """Casts of a floating-point value to the dtype it has, by output name: they do nothing in the graph as exported."""
    hidden = {}
    for node in program.nodes:
        if node.op == CAST:
            source, spec = node.args["self"].name, spec_of(program, node.outputs[0])
            if spec is not None and spec.dtype in FLOATS and spec == spec_of(program, source):
                hidden[node.outputs[0]] = source
    return hidden


def model_dtype(program: Program) -> torch.dtype:
    """The floating-point dtype that most of the weights' elements have; float32 where there are none."""
    sizes = dict.fromkeys(FLOATS, 0)
    for weight in program.weights.values():
        if weight.dtype in sizes:
            sizes[weight.dtype] += weight.numel()
    return max(sizes, key=lambda d: sizes[d])


def cast(program: Program, dtype: torch.dtype) -> tuple[Program, int]:
    """``program`` computing in ``dtype``; inputs and outputs keep their dtypes.  Also how many casts it took.

    Inputs that it writes in place are the session's own memory, and take ``dtype``.  Weights are converted when
    they are needed; those already in their dtype are shared with ``program``.
    """
    caster = _Caster(program, dtype, model_dtype(program))
    caster.inputs()
    for node in program.nodes:
        caster.node(node)
    return caster.finish(), caster.count


@dataclass
class _Caster:
    program: Program
    low: torch.dtype
    model: torch.dtype
    count: int = 0
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    now: dict[str, TensorSpec] = field(default_factory=dict)
    made: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)
    table: dict[str, Ref] = field(default_factory=dict)
    given: dict[str, TensorSpec] = field(default_factory=dict)  # the inputs, where they change
    raised: set[str] = field(default_factory=set)  # float32 values that come from one in the compute dtype

    def __post_init__(self) -> None:
        self.names = Names.of(self.program)
        self.users = self.program.users()
        self.specs = dict(self.program.specs)
        self.now = {k: TensorSpec(tuple(w.shape), w.dtype) for k, w in self.program.weights.items()}

    def inputs(self) -> None:
        """Inputs of two or more dimensions start in the compute dtype; those written in place are in it."""
        written = state.versions(self.program)
        for name, spec in self.program.inputs.items():
            self.now[name] = spec
            if name in written:
                self.now[name] = spec = replace(spec, dtype=self.low) if spec.dtype in FLOATS else spec
                self.given[name] = spec
            elif spec.dtype in FLOATS and len(spec.shape) >= 2 and not self._cast_already(name):
                self.table[name] = Ref(self.as_dtype(name, self.low))

    def _cast_already(self, name: str) -> bool:
        """Whether all that is done with an input is to cast it to the compute dtype."""
        return all(u.op == CAST and u.args["dtype"] is self.low for u in self.users.get(name, ()))

    def as_dtype(self, name: str, dtype: torch.dtype) -> str:
        """The name of ``name``'s value in ``dtype``: itself, a converted weight, or the output of a cast added here."""
        spec = self.now[name]
        if spec.dtype == dtype:
            return name
        key = (name, dtype)
        if key not in self.made:
            self.count += 1
            short = str(dtype).removeprefix("torch.")
            self.made[key] = new = self.names.fresh(f"{name}.{short}")
            self.now[new] = TensorSpec(spec.shape, dtype)
            if name in self.program.weights:
                self.weights[new] = converted(self.program.weights[name], dtype)
            else:
                args = complete(overload(CAST), {"self": Ref(name), "dtype": dtype}, new)
                self.nodes.append(Node(new, CAST, args, (new,)))
                self.specs[new] = self.now[new]
        return self.made[key]

    def node(self, node: Node) -> None:
        """Append ``node`` with its operands cast as the rule says."""
        args = {k: substitute(v, self.table) for k, v in node.args.items()}
        common = None
        if node.op == CAST:
            args["dtype"] = self._target(node, args["self"].name)
        else:
            args = {k: self._dtype(v) for k, v in args.items()}
            common = self._common(node.op, args)
            if common is not None:
                args = {k: self._operand(node.op, k, v, common) for k, v in args.items()}
        self.nodes.append(replace(node, args=args))
        self._results(node, args, common)

    def _dtype(self, value: Any) -> Any:
        """A half-precision dtype that stands in the graph because the model had it becomes the compute dtype."""
        return self.low if value is self.model and value is not torch.float32 else value

    def _float(self, name: str) -> bool:
        spec = self.now.get(name)
        return spec is not None and spec.dtype in FLOATS and len(spec.shape) > 0

    def _common(self, op: str, args: Mapping[str, Any]) -> torch.dtype | None:
        """The dtype the operands of ``op`` take; None where it has no floating-point operands."""
        counted = {k: v for k, v in args.items() if (op, k) not in _LEFT and not (op in _NORMS and k in _PARAMETERS)}
        names = [n for n in tensors(counted.values()) if self._float(n)]
        if op.startswith(_GEMM) and names:
            return self.low
        values = {self.now[n].dtype for n in names if n not in self.program.weights}
        if not values:
            values = {self.now[n].dtype for n in names}
        return None if not values else values.pop() if len(values) == 1 else self.low

    def _operand(self, op: str, key: str, value: Any, common: torch.dtype) -> Any:
        if (op, key) in _LEFT:
            return value
        dtype = torch.float32 if op in _NORMS and key in _PARAMETERS else common
        table = {n: Ref(self.as_dtype(n, dtype)) for n in tensors([value]) if self._float(n)}
        return substitute(value, table)

    def _target(self, node: Node, source: str) -> torch.dtype:
        """What a cast written in the graph casts to."""
        wanted: torch.dtype = node.args["dtype"]
        spec = self.now.get(source)
        if wanted not in FLOATS:
            return wanted
        if wanted is not torch.float32:
            return self.low if wanted is self.model else wanted
        if self.model is not torch.float32 or spec is None or spec.dtype not in FLOATS:
            return wanted  # a float16 model's own float32, or numbers made from integers: meant as written
        if spec.dtype is torch.float32 and source not in self.raised:
            return wanted  # never was in the compute dtype: joins it where the two meet
        return wanted if self._is_for_precision(node) else self.low

    def _is_for_precision(self, node: Node) -> bool:
        """Whether a sensitive operator follows, through arithmetic and views alone."""
        seen: set[str] = set()
        waiting = [node]
        while waiting:
            for user in (u for o in waiting.pop().outputs for u in self.users.get(o, ())):
                word = user.op.split(".")[1]
                if word in _SENSITIVE:
                    return True
                if word in _THROUGH and user.name not in seen and len(seen) < 64:
                    seen.add(user.name)
                    waiting.append(user)
        return False

    def _results(self, node: Node, args: Mapping[str, Any], common: torch.dtype | None) -> None:
        explicit = args.get("dtype")
        for name in node.outputs:
            spec = spec_of(self.program, name)
            if spec is None:
                continue
            if spec.dtype in FLOATS:
                spec = replace(spec, dtype=explicit if explicit in FLOATS else common or spec.dtype)
            self.now[name] = self.specs[name] = spec
            if spec.dtype is torch.float32 and any(self._is_raised(n) for n in tensors(args.values())):
                self.raised.add(name)

    def _is_raised(self, name: str) -> bool:
        return name in self.raised or (self._float(name) and self.now[name].dtype is not torch.float32)

    def finish(self) -> Program:
        """The program with its outputs cast back to the dtypes they were exported with."""
        outputs = []
        for name in self.program.outputs:
            spec = spec_of(self.program, name)
            known = spec is not None and name in self.now and spec.dtype in FLOATS
            outputs.append(self.as_dtype(name, spec.dtype) if known and spec is not None else name)
        weights = {**self.program.weights, **self.weights}
        inputs = {**self.program.inputs, **self.given}
        program = replace(self.program, inputs=inputs, outputs=tuple(outputs), weights=weights, specs=self.specs)
        return program.with_nodes(tuple(self.nodes))
