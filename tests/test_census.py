from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.runtime import Census, KernelNode, KernelReport, Runtime, RuntimeFailure, explain
from onnxcomp.runtime.census import node_names

SCALE = np.float32(0.05)
WEIGHT_SCALE = np.float32(0.01)
U8, I8 = np.uint8(0), np.int8(0)

only_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="ONNX Runtime runs int8 activations natively elsewhere"
)


class Builder:
    """Writes a QDQ model node by node; every method returns the name of the tensor that it makes."""

    def __init__(self, shape: Sequence[int] = (1, 4, 8, 8), kind: int = TensorProto.FLOAT) -> None:
        self.input = helper.make_tensor_value_info("x", kind, shape)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, *, name: str | None = None, **attributes: Any) -> str:
        made = helper.make_node(op, inputs, [output], name=f"the_{output}" if name is None else name, **attributes)
        self.nodes.append(made)
        return output

    def dequantize(self, source: str, output: str, scale: Any, zero: Any, **attributes: Any) -> str:
        inputs = [source, self.constant(f"{output}_scale", scale)]
        if zero is not None:
            inputs.append(self.constant(f"{output}_zero", zero))
        return self.node("DequantizeLinear", inputs, output, **attributes)

    def quantize(self, source: str, *, scale: Any = SCALE, zero: Any = U8) -> str:
        inputs = [source, self.constant(f"{source}_q_scale", scale), self.constant(f"{source}_q_zero", zero)]
        return self.node("QuantizeLinear", inputs, f"{source}_q")

    def qdq(self, source: str, *, scale: Any = SCALE, zero: Any = U8) -> str:
        return self.dequantize(self.quantize(source, scale=scale, zero=zero), f"{source}_dq", scale, zero)

    def weight(self, shape: Sequence[int], *, axis: int | None = None, dtype: Any = np.int8, zero: bool = True) -> str:
        info = np.iinfo(dtype)
        values = self.random.integers(info.min, info.max, shape).astype(dtype)
        size = () if axis is None else shape[axis]
        attributes = {} if axis is None else {"axis": axis}
        zeros = np.zeros(size, dtype) if zero else None
        scale = np.full(size, WEIGHT_SCALE, np.float32)
        return self.dequantize(self.constant("w_q", values), "w", scale, zeros, **attributes)

    def bias(self, size: int, *, scale: float = float(SCALE * WEIGHT_SCALE), dtype: Any = np.int32) -> str:
        values = np.linspace(-100, 100, size).astype(dtype)
        return self.dequantize(self.constant("b_q", values), "b", np.float32(scale), None)

    def conv(self, source: str = "x_dq", weight: str = "w", *more: str) -> str:
        return self.node("Conv", [source, weight, *more], "y", pads=[1, 1, 1, 1])

    def model(self, *outputs: str) -> onnx.ModelProto:
        values = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", [self.input], values, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as runtime:
        yield runtime


def report_on(model: onnx.ModelProto, runtime: Runtime, folder: Path) -> KernelReport:
    onnx.save(model, folder / "model.onnx")
    return explain(model, runtime.census(folder / "model.onnx"))


def good_conv(**weight: Any) -> onnx.ModelProto:
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3), **weight)
    return b.model(b.qdq(b.conv("x_dq", "w", b.bias(8))))


def matmul(*, axis: int | None = None, zero: Any = U8, output: bool = True) -> onnx.ModelProto:
    b = Builder((4, 16))
    b.qdq("x")
    y = b.node("MatMul", ["x_dq", b.weight((16, 24), axis=axis)], "y")
    return b.model(b.qdq(y, zero=zero) if output else y)


def gemm(
    *, bias: str | None = None, output: bool = True, axis: int | None = None, zero: bool = True, **attributes: Any
) -> onnx.ModelProto:
    b = Builder((4, 16))
    b.qdq("x")
    inputs = ["x_dq", b.weight((24, 16) if attributes.get("transB") else (16, 24), axis=axis, zero=zero)]
    if bias == "float":
        inputs.append(b.constant("b", np.zeros(24, np.float32)))
    elif bias is not None:
        inputs.append(b.bias(24, scale=float(SCALE * WEIGHT_SCALE) * (4 if bias == "wrong scale" else 1)))
    y = b.node("Gemm", inputs, "y", **attributes)
    return b.model(b.qdq(y) if output else y)


def matmul_add(*, bias: str, output: bool) -> onnx.ModelProto:
    b = Builder((4, 16))
    b.qdq("x")
    y = b.node("MatMul", ["x_dq", b.weight((16, 24))], "y")
    other = b.bias(24) if bias == "int32" else b.constant("b", np.ones(24, np.float32))
    y = b.node("Add", [other, y], "sum")
    return b.model(b.qdq(y) if output else y)


def matmul_clip() -> onnx.ModelProto:
    b = Builder((4, 16))
    b.qdq("x")
    y = b.node("MatMul", ["x_dq", b.weight((16, 24))], "y")
    return b.model(b.node("Abs", [b.node("Relu", [y], "cut")], "end"))


def conv_clip(op: str, *, scale: Any = SCALE, zero: Any = U8) -> onnx.ModelProto:
    b = Builder()
    b.qdq("x", zero=zero)
    b.weight((8, 4, 3, 3))
    limits = [b.constant("low", np.float32(0)), b.constant("high", np.float32(6))] if op == "Clip" else []
    return b.model(b.qdq(b.node(op, [b.conv(), *limits], "cut"), scale=scale, zero=zero))


def conv_unquantized() -> onnx.ModelProto:
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3))
    return b.model(b.node("HardSwish", [b.conv()], "swish"))


def conv_types(before: Any, after: Any, *, dtype: Any = np.int8) -> onnx.ModelProto:
    b = Builder()
    b.qdq("x", zero=before)
    b.weight((8, 4, 3, 3), dtype=dtype)
    return b.model(b.qdq(b.conv(), zero=after))


def conv_bias(**bias: Any) -> onnx.ModelProto:
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3))
    return b.model(b.qdq(b.conv("x_dq", "w", b.bias(8, **bias))))


def conv_computed_bias() -> onnx.ModelProto:
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3))
    mean = b.node("ReduceMean", ["x"], "mean", keepdims=0)
    bias = b.node("Expand", [mean, b.constant("eight", np.array([8]))], "computed")
    return b.model(b.qdq(b.conv("x_dq", "w", bias)))


def conv_float_output(*, second: str) -> onnx.ModelProto:
    """A Conv whose float result is read by more than its QuantizeLinear."""
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3))
    b.qdq(b.conv())
    return b.model("y_dq", "y" if second == "output" else b.node("Tanh", ["y"], "tanh"))


def conv_int8_read_twice() -> onnx.ModelProto:
    b = Builder()
    b.qdq("x", zero=I8)
    b.weight((8, 4, 3, 3))
    return b.model(b.qdq(b.conv(), zero=I8), b.node("Tanh", ["x_dq"], "tanh"))


def conv_int8_input() -> onnx.ModelProto:
    b = Builder(kind=TensorProto.INT8)
    b.dequantize("x", "x_dq", SCALE, I8)
    b.weight((8, 4, 3, 3))
    return b.model(b.qdq(b.conv(), zero=I8))


SOUND: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv": good_conv,
    "conv-weight-per-channel": lambda: good_conv(axis=0),
    "conv-weight-without-zero-point": lambda: good_conv(zero=False),
    "conv-uint8-weight": lambda: good_conv(dtype=np.uint8),
    "conv-relu": lambda: conv_clip("Relu"),
    "conv-clip": lambda: conv_clip("Clip", scale=np.float32(6 / 255)),
    "conv-relu-int8": lambda: conv_clip("Relu", zero=np.int8(-128)),
    "matmul": matmul,
    "matmul-per-column": lambda: matmul(axis=1),
    "matmul-float-output": lambda: matmul(output=False),
    "matmul-add": lambda: matmul_add(bias="int32", output=False),
    "matmul-add-float-bias": lambda: matmul_add(bias="float", output=True),
    "gemm": lambda: gemm(bias="int32"),
    "gemm-float-output": lambda: gemm(bias="int32", output=False),
    "gemm-float-bias": lambda: gemm(bias="float"),
    "gemm-transposed": lambda: gemm(transB=1, axis=0),
}


@pytest.mark.parametrize("build", SOUND.values(), ids=SOUND.keys())
def test_sound_patterns_run_in_int8(build: Callable[[], onnx.ModelProto], runtime: Runtime, tmp_path: Path):
    assert report_on(build(), runtime, tmp_path) == KernelReport(int8=("the_y",), missed=())


UNSOUND: list[tuple[str, str, Callable[[], onnx.ModelProto]]] = [
    ("no-output-q", "its result goes to HardSwish; a Conv needs", conv_unquantized),
    (
        "no-output-q",
        "its bias is float and its result goes to the graph's output",
        lambda: gemm(bias="float", output=False),
    ),
    (
        "no-output-q",
        "it needs an int32 bias, or a QuantizeLinear there",
        lambda: matmul_add(bias="float", output=False),
    ),
    ("clip-not-redundant", "its Relu cuts to [0, inf]", lambda: conv_clip("Relu", zero=np.uint8(128))),
    ("clip-not-redundant", "spans [-6.4, 6.35] (zero point 0)", lambda: conv_clip("Relu", zero=I8)),
    (
        "clip-not-redundant",
        "cuts to [0, 6] and the QuantizeLinear after it spans [0, 12.75]",
        lambda: conv_clip("Clip"),
    ),
    ("clip-without-q", "its Relu goes to Abs", matmul_clip),
    ("not-8-bit", "its data is uint16", lambda: conv_types(np.uint16(0), np.uint16(0))),
    ("weight-axis", "on axis 0; a MatMul wants the output channels, axis 1", lambda: matmul(axis=0)),
    ("weight-axis", "on axis 1; a Gemm wants the output channels, axis 0", lambda: gemm(transB=1, axis=1)),
    ("bias-not-int32", "its bias is int8", lambda: conv_bias(dtype=np.int8)),
    ("bias-not-int32", "its bias 'computed' is computed in float", conv_computed_bias),
    ("bias-scale", "its bias has scale 0.001 where", lambda: conv_bias(scale=0.001)),
    ("output-is-graph-output", "its float result 'y' is a graph output", lambda: conv_float_output(second="output")),
    ("two-readers", "'y' has 2 readers (QuantizeLinear, Tanh)", lambda: conv_float_output(second="reader")),
    ("gemm-beta", "its beta is 0.5", lambda: gemm(bias="int32", beta=0.5)),
    ("gemm-zero-point", "leaves the zero point out", lambda: gemm(bias="int32", zero=False)),
]


@pytest.mark.parametrize(("rule", "reason", "build"), UNSOUND, ids=[f"{row[0]}-{row[1]}" for row in UNSOUND])
def test_a_missed_rule_is_named(
    rule: str, reason: str, build: Callable[[], onnx.ModelProto], runtime: Runtime, tmp_path: Path
):
    report = report_on(build(), runtime, tmp_path)

    assert report.int8 == ()
    assert [(miss.node, miss.rule) for miss in report.missed] == [("the_y", rule)]
    assert reason in report.missed[0].reason


@only_x86
@pytest.mark.parametrize(
    ("rule", "reason", "build"),
    [
        ("two-readers", "its data 'x_q' is int8 and has several readers", conv_int8_read_twice),
        ("int8-activations", "int8 activations run in int8 on ARM only", conv_int8_input),
    ],
)
def test_a_rule_of_x86_is_named(
    rule: str, reason: str, build: Callable[[], onnx.ModelProto], runtime: Runtime, tmp_path: Path
):
    test_a_missed_rule_is_named(rule, reason, build, runtime, tmp_path)


@pytest.mark.parametrize(("before", "after"), [(U8, I8), (I8, U8)])
def test_a_type_mismatch_is_named_where_int8_stays_int8(before: Any, after: Any, tmp_path: Path):
    with Runtime(session_config={"session.qdqisint8allowed": "1"}) as runtime:
        report = report_on(conv_types(before, after), runtime, tmp_path)

    assert [miss.rule for miss in report.missed] == ["type-mismatch"]
    assert report.missed[0].reason == f"its input is {before.dtype} and its output {after.dtype}; they must be the same"


def wrong_conv_axis() -> onnx.ModelProto:
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3), axis=1)
    return b.model(b.qdq(b.conv()))


@pytest.mark.parametrize(
    ("rule", "build"),
    [
        ("weight-axis", wrong_conv_axis),
        ("weight-axis", lambda: matmul(axis=0, output=False)),
        ("bias-scale", lambda: gemm(bias="wrong scale")),
    ],
)
def test_a_kernel_that_computes_something_else_does_not_count(
    rule: str, build: Callable[[], onnx.ModelProto], runtime: Runtime, tmp_path: Path
):
    model = build()

    report = report_on(model, runtime, tmp_path)

    census = runtime.census(tmp_path / "model.onnx")
    assert {"QLinearConv", "MatMulIntegerToFloat", "QGemm"} & census.counts().keys()
    assert not runs_right(model, runtime, tmp_path / "model.onnx")
    assert [miss.rule for miss in report.missed] == [rule]


def runs_right(model: onnx.ModelProto, runtime: Runtime, path: Path) -> bool:
    """Whether the optimized model runs, and is within one quantization step of the plain one."""
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(0).random(shape, np.float32) * 5}
    ((expected,),) = runtime.run(path, [feed], optimize=False)
    try:
        ((actual,),) = runtime.run(path, [feed])
    except RuntimeFailure:
        return False
    return bool(np.abs(actual - expected).max() <= 1.001 * SCALE)


@pytest.mark.parametrize("build", SOUND.values(), ids=SOUND.keys())
def test_sound_patterns_compute_the_same(build: Callable[[], onnx.ModelProto], runtime: Runtime, tmp_path: Path):
    model = build()
    onnx.save(model, tmp_path / "model.onnx")

    assert runs_right(model, runtime, tmp_path / "model.onnx")


def test_census_lists_the_optimized_graph(runtime: Runtime, tmp_path: Path):
    onnx.save(good_conv(), tmp_path / "model.onnx")

    census = runtime.census(tmp_path / "model.onnx")

    assert census.counts()["QLinearConv"] == 1
    assert [node.op for node in census.int8_nodes] == ["QLinearConv"]
    assert census.float_compute_nodes == ()
    weights = 8 * 4 * 3 * 3
    assert weights < census.initializer_bytes < weights + 8 * 4 + 100


def test_census_without_optimization_keeps_the_float_node(runtime: Runtime, tmp_path: Path):
    onnx.save(good_conv(), tmp_path / "model.onnx")

    census = runtime.census(tmp_path / "model.onnx", optimize=False)

    assert census.int8_nodes == ()
    assert [node.name for node in census.float_compute_nodes] == ["the_y"]


def test_census_of_external_data(runtime: Runtime, tmp_path: Path):
    model = good_conv()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    stub = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for node in stub.graph.node:
        node.name = ""
    onnx.save(stub, tmp_path / "unnamed.onnx")

    for name in ("m.onnx", "unnamed.onnx"):
        assert runtime.census(tmp_path / name).counts()["QLinearConv"] == 1


def test_nodes_without_names_go_by_their_first_output(runtime: Runtime, tmp_path: Path):
    model = good_conv()
    for node in model.graph.node:
        node.name = ""

    assert report_on(model, runtime, tmp_path).int8 == ("y",)


def test_nodes_with_one_name_are_told_apart(runtime: Runtime, tmp_path: Path):
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3))
    good = b.node("Conv", ["x_dq", "w"], "good", name="conv")
    bad = b.node("Conv", ["x_dq", "w"], "bad", name="conv")

    report = report_on(b.model(b.qdq(good), bad), runtime, tmp_path)

    assert report.int8 == ("conv",)
    assert [(miss.node, miss.rule) for miss in report.missed] == [("bad", "output-is-graph-output")]


def test_names_are_unique_even_where_outputs_are_names_too():
    nodes = [
        helper.make_node("Relu", ["x"], [output], name=name) for output, name in (("a", "b"), ("b", ""), ("c", "b"))
    ]
    graph = helper.make_graph(nodes, "test", [], [])

    assert node_names(graph) == ["b", "b#2", "c"]


def test_weight_only_quantization_is_left_out(runtime: Runtime, tmp_path: Path):
    b = Builder((4, 16))
    model = b.model(b.node("MatMul", ["x", b.weight((16, 24))], "y"))

    assert report_on(model, runtime, tmp_path) == KernelReport((), ())


def test_subgraphs_are_looked_into(runtime: Runtime, tmp_path: Path):
    b = Builder()
    b.qdq("x")
    b.weight((8, 4, 3, 3))
    inner = helper.make_graph(
        [*b.nodes, helper.make_node("Conv", ["x_dq", "w"], ["y"], name="inner")],
        "branch",
        [],
        [onnx.ValueInfoProto(name="y", type=helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 8, 6, 6]))],
        b.initializers,
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["z"])],
        "other",
        [],
        [onnx.ValueInfoProto(name="z", type=helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 4, 8, 8]))],
    )
    outer = Builder()
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    outer.nodes.append(helper.make_node("If", ["flag"], ["out"], name="if", then_branch=inner, else_branch=other))
    model = outer.model("out")
    model.graph.input.append(flag)

    report = report_on(model, runtime, tmp_path)

    assert [(miss.node, miss.rule) for miss in report.missed] == [("inner", "output-is-graph-output")]


def test_explains_thousands_of_nodes_quickly():
    b = Builder((4, 16))
    weight = b.weight((16, 16))
    tensor = "x"
    for index in range(2000):
        tensor = b.node("MatMul", [b.qdq(tensor), weight], f"y{index}")
    model = b.model(b.qdq(tensor))
    kernels = tuple(KernelNode("QLinearMatMul", "", f"the_y{index}", (), (), int8=True) for index in range(0, 2000, 2))
    began = time.process_time()

    report = explain(model, Census(kernels, 0))

    assert (len(report.int8), len(report.missed)) == (1000, 1000)
    assert {miss.rule for miss in report.missed} == {"unknown"}
    assert time.process_time() - began < 5  # half a second; a walk over all nodes for each takes minutes


def test_sparse_weights_take_the_memory_of_dense_ones(runtime, tmp_path):
    values, places = numpy_helper.from_array(np.ones(3, np.float32), "W"), numpy_helper.from_array(np.arange(3))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 32]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "g", ends[:1], ends[1:])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [32, 32]))
    path = tmp_path / "sparse.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)

    assert runtime.census(path).initializer_bytes == 32 * 32 * 4
