"""Our graph format: written and read again, a Program is equal; unknown keys and values raise."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_capture import SMALL, Odd, unet_inputs
from torch import nn

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import UNet
from fusegen.runtime.api import capture
from fusegen.runtime.errors import Error, GraphError
from fusegen.runtime.program import Applied, Node, Program, Ref, TensorSpec
from fusegen.runtime.read import graph_json


def every_value() -> Program:
    """A program whose arguments are of every kind."""
    x, f32 = Ref("x"), torch.float32
    pad = {"pad": (1, 1), "mode": "constant", "value": -math.inf}
    copy = {"dtype": torch.bfloat16, "layout": torch.strided, "device": torch.device("cuda", 1), "pin_memory": None}
    copy |= {"non_blocking": False, "memory_format": torch.channels_last}
    nodes = (
        Node("size", "aten.sym_size.int", {"self": x, "dim": 0}, ("n",)),
        Node("twice", "sym.mul", {"a": Ref("n"), "b": 2}, ("m",)),
        Node("pad", "aten.pad.default", {"self": x, **pad}, ("p",), "a.b"),
        Node("copy", "aten._to_copy.default", {"self": Ref("p"), **copy}, ("c",)),
        Node("index", "aten.index.Tensor", {"self": x, "indices": (None, Ref("w"))}, ("i",)),
        Node("add", "aten.add.Scalar", {"self": x, "other": complex(math.nan, 1e-300), "alpha": True}, ("a",)),
        Node("view", "aten.view.default", {"self": x, "size": (Ref("m"), -1)}, ("v",)),
        Node("parts", "aten.split.Tensor", {"self": x, "split_size": 2, "dim": -1}, ("s0", "s1")),
    )
    return Program(
        "every\u2028é",
        nodes,
        {"x": TensorSpec(("batch", 4), f32)},
        ("v", "x", "w", "v"),
        {"w": torch.arange(2)},
        {"batch": (1, 2**63 - 1)},
        {"v": TensorSpec(("2*batch", 2), f32)},
        (Applied("drop_noops", 3, ("because",)),),
        ("batch % 2 == 0 or batch > 3",),
    )


def captured(kind: str) -> Program:
    if kind == "unet":
        return capture(UNet(SMALL), unet_inputs(2), dynamic={k: {0: ("batch", 1, 64)} for k in ("x", "t", "context")})
    if kind == "text":
        return capture(TextEncoder(TextEncoderConfig(50, width=32, layers=1)), (torch.ones(2, 16, dtype=torch.long),))
    if kind == "odd":
        return capture(Odd(), (torch.randn(2, 5, 8), {"k": torch.randn(2, 8)}))
    return every_value()


@pytest.mark.parametrize("kind", ["unet", "text", "odd", "every value"])
def test_round_trip(kind: str) -> None:
    program = captured(kind)
    text = graph_json.dumps(program)
    again = graph_json.loads(text, {**program.weights, "more": torch.ones(1)}, "file")
    assert again.weights.keys() == program.weights.keys()
    assert all(again.weights[k] is v for k, v in program.weights.items())
    for field in dataclasses.fields(Program):
        if field.name != "weights":
            assert repr(getattr(again, field.name)) == repr(getattr(program, field.name))  # repr: NaN is not NaN
    assert graph_json.dumps(again) == text


def set_at(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("colour", value=1), "key 'colour' is unknown"),
        (lambda d: d.pop("specs"), "key 'specs' is missing"),
        (set_at("nodes", 0, "colour", value=1), "key 'colour' is unknown"),
        (set_at("version", value=2), "version 2, and 1 is read"),
        (set_at("format", value="x"), "not a graph of the format"),
        (set_at("nodes", 0, "args", "dim", value={"pickle": "x"}), "kind 'pickle'"),
        (set_at("nodes", 0, "args", "dim", value={"a": 1, "b": 2}), "not of the format"),
        (set_at("nodes", 0, "args", "end", value=1), "has no argument 'end'"),
        (lambda d: d["nodes"][2]["args"].pop("pad"), r"lacks its argument 'pad' \(file, pad\)"),
        (set_at("nodes", 0, "outputs", value=["x"]), "'x' is defined twice"),
        (set_at("nodes", 1, "name", value="size"), "two nodes have one name"),
        (set_at("nodes", 3, "args", "device", value={"device": "vulkan"}), "device 'vulkan'"),
        (set_at("nodes", 3, "args", "dtype", value={"dtype": "quint8"}), "not of the format"),
        (set_at("outputs", value=["gone"]), "output 'gone' is made by nothing"),
        (set_at("outputs", value="v"), "not a list"),
        (set_at("inputs", "x", value=["float32", ["other", 4]]), "size 'other'"),
        (set_at("inputs", "x", value=["float32", [-1, 4]]), "size -1"),
        (set_at("inputs", "x", value=["float32", [True, 4]]), "size True"),
        (set_at("guards", value=["other == 1"]), "guard 'other == 1'"),
        (set_at("symbols", "batch", value=[3, 1]), "range of 'batch'"),
        (set_at("weights", "w", value=["float32", [2]]), "the weight is torch.int64"),
        (set_at("weights", "z", value=["float32", [2]]), "a weight is missing"),
    ],
)
def test_faults(change: Callable[[Any], None], message: str) -> None:
    program = every_value()
    document = json.loads(graph_json.dumps(program))
    change(document)
    with pytest.raises(Error, match=message) as error:
        graph_json.loads(json.dumps(document).encode(), program.weights, "file")
    assert "file" in str(error.value)


def test_value_that_cannot_be_written() -> None:
    node = Node("n", "aten.relu.default", {"self": nn.Identity()}, ("y",))
    with pytest.raises(GraphError, match="of type Identity cannot be written"):
        graph_json.dumps(Program("p", (node,), {}, (), {}))
