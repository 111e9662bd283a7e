"""torch.export's serialized graph: arguments in normal form, and what is not understood is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._export.serde import schema, serialize

from fusegen.runtime.errors import Error, GraphError, UnsafeFileError
from fusegen.runtime.program import Ref
from fusegen.runtime.read import capture, exported, operators, values


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv(x))
        y = torch.nn.functional.max_pool2d(y, 2)
        return y.view(x.shape[0], -1).to(torch.float64)


@pytest.fixture(scope="module")
def toy() -> tuple[dict[str, Any], dict[str, Tensor]]:
    module = Toy().eval()
    n = torch.export.Dim("n", min=1, max=9)
    program = torch.export.export(module, (torch.randn(2, 3, 4, 4),), dynamic_shapes={"x": {0: n}})
    return capture.serialize(program), dict(program.state_dict)


def test_arguments_stand_by_name_with_their_defaults(toy: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    program = exported.program(*toy, "toy")
    args = {n.op: n.args for n in program.nodes}
    conv = args["aten.conv2d.default"]
    assert list(conv) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert conv["weight"] == Ref("conv.weight") and conv["stride"] == conv["padding"] == (1, 1) and conv["groups"] == 1
    assert args["aten.gelu.default"]["approximate"] == "none"
    assert args["aten.max_pool2d.default"]["kernel_size"] == (2, 2)
    assert args["aten.max_pool2d.default"]["stride"] in ((), (2, 2))
    assert args["aten.to.dtype"]["dtype"] is torch.float64 and args["aten.to.dtype"]["memory_format"] is None
    assert not any("assert" in n.op for n in program.nodes)
    assert {n.source for n in program.nodes if n.op == "aten.conv2d.default"} == {"conv"}


def test_enumerations_are_pytorch_s_own() -> None:
    """Every dtype, memory format and layout that this PyTorch's serializer numbers, but those that are not read."""
    known = {int(s) for s in schema.ScalarType}  # an older PyTorch numbers fewer
    ours = {schema.ScalarType(k): v for k, v in values.DTYPES.items() if k in known}
    for number, dtype in serialize._SERIALIZE_TO_TORCH_DTYPE.items():
        assert ours.get(number) is dtype or dtype is torch.float8_e8m0fnu
    for form, number in serialize._TORCH_TO_SERIALIZE_MEMORY_FORMAT.items():
        assert values.decode({"as_memory_format": int(number)}) is form
    assert values.layout(int(schema.Layout.Strided)) is torch.strided


def test_every_sym_op_of_the_serializer_is_known() -> None:
    for op in serialize._SYM_OPS:
        assert values.op_name(f"{op.__module__}.{op.__name__}").startswith(values.SYM)


def test_every_kind_of_argument_is_read_or_refused() -> None:
    kinds = {f"{k}" for k in schema.Argument.__annotations__}
    refused = {"as_graph", "as_custom_obj", "as_operator", "as_string_to_argument"}
    assert kinds - refused <= values._DECODE.keys()
    for kind in refused:
        with pytest.raises(GraphError, match="cannot be read"):
            values.decode({kind: {}})


def first_node(**changes: Any) -> Callable[[Any], None]:
    return lambda d: d["graph_module"]["graph"]["nodes"][1].update(changes)


def graph(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda d: change(d["graph_module"]["graph"])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda d: d["schema_version"].update(major=9), GraphError, "schema version is 9, and 8 is read"),
        (lambda d: d.pop("schema_version"), GraphError, "schema version is None"),
        (lambda d: d.pop("graph_module"), GraphError, "not as torch.export writes it"),
        (lambda d: d.update(graph_module=[]), GraphError, "not as torch.export writes it"),
        (first_node(target="torch.ops.aten.from_file.default"), UnsafeFileError, "could reach outside"),
        (first_node(target="torch.ops.debugprims.load_tensor.default"), UnsafeFileError, "from outside PyTorch"),
        (first_node(target="torch.ops.aten.relu_.default"), GraphError, "writes to its argument"),
        (first_node(target="torch.ops.aten.none.default"), GraphError, "has no operator aten.none.default"),
        (first_node(target="os.system"), GraphError, "is not an operator"),
        (first_node(target="_operator.attrgetter"), GraphError, "is not an operator"),
        (first_node(target="torch.ops.higher_order.cond"), GraphError, "higher-order operator cond"),
        (first_node(target=3), GraphError, "the node is not as"),
        (first_node(inputs=[{"name": "self"}]), GraphError, "the node is not as"),
        (first_node(inputs=[]), GraphError, "lacks its argument"),
        (first_node(outputs=[{"as_tensor": {"name": "x"}}]), GraphError, "'x' is defined twice"),
        (graph(lambda g: g["nodes"].reverse()), GraphError, "which nothing before it makes"),
        (graph(lambda g: g["tensor_values"].pop("x")), GraphError, "not as torch.export writes it"),
        (graph(lambda g: g["tensor_values"]["x"].update(dtype=77)), GraphError, "dtype number 77"),
    ],
)
def test_faults(
    toy: tuple[dict[str, Any], dict[str, Tensor]], change: Callable[[Any], None], kind: type[Error], message: str
) -> None:
    document = copy.deepcopy(toy[0])
    change(document)
    with pytest.raises(kind, match=message) as error:
        exported.program(document, toy[1], "toy")
    assert "toy" in str(error.value) and "\n" not in str(error.value)


class Thirds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 3 == 0 else x + 1


def test_what_the_exporter_took_to_be_true_is_kept() -> None:
    program = torch.export.export(Thirds(), (torch.randn(6),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    read = exported.program(capture.serialize(program), {}, "thirds")
    (symbol,) = read.symbols
    assert f"{symbol} % 3 == 0" in read.guards


def test_weight_of_another_shape_is_named(toy: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    with pytest.raises(GraphError, match=r"torch.float16 \(4,\).*conv.bias"):
        exported.program(toy[0], toy[1] | {"conv.bias": torch.ones(4, dtype=torch.float16)}, "toy")
    with pytest.raises(GraphError, match=r"a weight is missing .*conv.bias"):
        exported.program(toy[0], {k: v for k, v in toy[1].items() if k != "conv.bias"}, "toy")


def test_operators_of_other_libraries_need_trust() -> None:
    with torch.library._scoped_library("fusegen_test", "DEF") as library:
        library.define("double(Tensor x, float by) -> Tensor")
        with pytest.raises(UnsafeFileError, match="trust=True"):
            operators.resolve("fusegen_test.double.default")
        op = operators.resolve("fusegen_test.double.default", trust=True)
        assert operators.complete(op, {"x": Ref("x"), "by": 2}, "") == {"x": Ref("x"), "by": 2.0}


def test_defaults_that_the_schema_holds_as_numbers() -> None:
    contiguous = operators.complete(operators.resolve("aten.contiguous.default"), {"self": Ref("x")}, "")
    assert contiguous["memory_format"] is torch.contiguous_format
    assert operators.complete(operators.resolve("aten.randperm.default"), {"n": 3}, "")["dtype"] is torch.int64


def test_every_allowed_string_argument_belongs_to_an_operator() -> None:
    """The list of string arguments that pick a behaviour holds nothing that is not needed."""
    names = {
        a.name
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("aten::") and any("Tensor" in str(r.type) for r in s.returns)
        for a in s.arguments
        if "str" in str(a.type)
    }
    assert operators._STRINGS - names == set()
    assert {"filename"} & operators._STRINGS == set()
