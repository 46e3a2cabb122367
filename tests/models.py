"""Small models for the tests, and ways to run and compare them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, parser

from onnxcomp.model import Model, ModelSource

Array = np.ndarray[Any, Any]

FLOAT_ROUNDING = 1e-5
"""Relative to the largest output: some dozens of float32 roundings (6e-8 each), as a fused or reordered sum has."""


# --- building ---------------------------------------------------------------------------------------------------------


SMALL_NETWORK = """g (float[N, 4, 12, 12] x) => (float[N, 20] y) {
    [first] a = Conv(x, first_w, first_b)
    b = Relu(a)
    [middle] c = Conv<strides = [2, 2]>(b, middle_w)
    d = Relu(c)
    e = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(d)
    f = Flatten(e)
    [head] y = Gemm(f, head_w, head_b)
}"""
"""Two Conv and a Gemm, without their weights."""


def graph_model(
    graph: str, weights: Mapping[str, Any] | None = None, /, *, opset: int = 17, ir_version: int = 8, **more: Any
) -> onnx.ModelProto:
    """A model from the text form of its graph; weights (a mapping, or keywords) become initializers.

    >>> model = graph_model("g (float[N, 2] x) => (float[N, 2] y) { y = Add(x, b) }", b=np.ones(2, np.float32))
    >>> model.graph.initializer[0].name
    'b'
    """
    model = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}]> {graph}')
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in {**(weights or {}), **more}.items()
    )
    _clear_empty_domains(model.graph)
    return model


def _clear_empty_domains(graph: onnx.GraphProto) -> None:
    """The parser writes out the empty domain, exporters do not."""
    for node in graph.node:
        if not node.domain:
            node.ClearField("domain")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _clear_empty_domains(attribute.g)


def matmul_model(weight: Array) -> Model:
    """Y = MatMul(X, W), X: (N, k), W: (k, n)."""
    rows, columns = weight.shape
    text = f"g (float[N, {rows}] X) => (float[N, {columns}] Y) {{ Y = MatMul(X, W) }}"
    return Model.load(graph_model(text, W=weight))


def random_weights(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Normally distributed float32 weights."""
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def mlp_model(sizes: tuple[int, ...] = (8, 16, 4), *, seed: int = 0) -> onnx.ModelProto:
    """Gemm and Relu in turn, with weights W0, b0, W1, ..."""
    weights: dict[str, Array] = {}
    lines, source = [], "x"
    for number, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        weights[f"W{number}"] = random_weights(rows, columns, seed=seed + number, scale=rows**-0.5)
        weights[f"b{number}"] = random_weights(columns, seed=seed + number + 100)
        last = number == len(sizes) - 2
        target = "y" if last else f"h{number}"
        lines.append(f"{target} = Gemm({source}, W{number}, b{number})")
        if not last:
            source = f"r{number}"
            lines.append(f"{source} = Relu({target})")
    body = "\n".join(lines)
    return graph_model(f"g (float[N, {sizes[0]}] x) => (float[N, {sizes[-1]}] y) {{ {body} }}", weights)


def batch_norm_weights(channels: int, *, seed: int = 0, dtype: str = "float32") -> dict[str, Array]:
    """Parameters of a BatchNormalization: scale, bias, mean, variance."""
    rng = np.random.default_rng(seed)
    values = {
        "scale": rng.uniform(0.5, 2, channels),
        "bias": rng.normal(size=channels),
        "mean": rng.normal(size=channels),
        "variance": rng.uniform(0.3, 3, channels),
    }
    return {name: value.astype(dtype) for name, value in values.items()}


def conv_bn_model(*, bias: bool = True, group: int = 1, tail: str = "y = Relu(n)") -> onnx.ModelProto:
    """Conv (weight W, bias b), BatchNormalization, Relu on x: (N, 4, 8, 8)."""
    weights = {"W": random_weights(8, 4 // group, 3, 3), **batch_norm_weights(8)}
    if bias:
        weights["b"] = random_weights(8, seed=1)
    text = f"""g (float[N, 4, 8, 8] x) => (float[N, 8, 6, 6] y) {{
        c = Conv<group = {group}>(x, W{", b" if bias else ""})
        n = BatchNormalization(c, scale, bias, mean, variance)
        {tail}
    }}"""
    return graph_model(text, weights)


def if_model() -> onnx.ModelProto:
    """y = x * W (outer weight, captured) or x + b (its own), by a boolean input."""
    text = """g (bool condition, float[2, 3] x) => (float[2, 3] y) {
        y = If(condition) <
            then_branch = yes () => (float[2, 3] then_y) {
                t = Mul(x, W)
                u = Identity(t)
                then_y = Add(u, u)
            },
            else_branch = no () => (float[2, 3] else_y) {
                b = Constant<value = float[3] {1.0, 2.0, 3.0}>()
                else_y = Add(x, b)
            }
        >
    }"""
    return graph_model(text, W=random_weights(3))


def loop_model() -> onnx.ModelProto:
    """Doubles the rows of x at each turn: the shape of what the loop carries changes."""
    text = """g (int64 turns, float[1, 2] x) => (float[M, 2] y, int64[K] rows) {
        go = Constant<value = bool {1}>()
        y, rows = Loop(turns, go, x) <
            body = turn (int64 i, bool before, float[1, 2] carried) => (bool after, float[P, 2] wider, int64 count) {
                after = Identity(before)
                shape = Shape(carried)
                zero = Constant<value_int = 0>()
                count = Gather(shape, zero)
                wider = Concat<axis = 0>(carried, carried)
            }
        >
    }"""
    return graph_model(text)


def external_model(folder: Path, *, layers: int = 2, size: int = 64) -> Path:
    """A chain of MatMuls W0, W1, ... saved with external data; returns its path."""
    lines = [f"h{n + 1} = MatMul(h{n}, W{n})" for n in range(layers)]
    text = f"g (float[N, {size}] h0) => (float[N, {size}] h{layers}) {{ {' '.join(lines)} }}"
    weights = {f"W{n}": random_weights(size, size, seed=n, scale=size**-0.5) for n in range(layers)}
    path = folder / "model.onnx"
    onnx.save(graph_model(text, weights), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


# --- running ----------------------------------------------------------------------------------------------------------


def proto_of(source: ModelSource) -> onnx.ModelProto:
    """The whole model as a ModelProto."""
    return source if isinstance(source, onnx.ModelProto) else Model.load(source).to_proto()


def run(source: ModelSource, feeds: Mapping[str, Any], *, optimized: bool = False) -> list[Any]:
    """Run in ONNX Runtime, by default with its optimizations off so that they cannot hide a bad graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = proto_of(source).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def random_inputs(source: ModelSource, *, seed: int = 0, batch: int = 2) -> dict[str, Array]:
    """Feeds for every input that no initializer fills; unknown dimensions become `batch`."""
    model = proto_of(source)
    rng = np.random.default_rng(seed)
    filled = {tensor.name for tensor in model.graph.initializer}
    feeds: dict[str, Array] = {}
    for info in model.graph.input:
        if info.name in filled:
            continue
        tensor_type = info.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else batch for dim in tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor_type.elem_type)
        if tensor_type.elem_type == TensorProto.BOOL:
            feeds[info.name] = rng.random(shape) < 0.5
        elif dtype.kind == "f":
            feeds[info.name] = np.asarray(rng.normal(size=shape), dtype)
        else:
            feeds[info.name] = np.asarray(rng.integers(0, 3, shape), dtype)
    return feeds


def assert_same_outputs(one: ModelSource, other: ModelSource, feeds: Mapping[str, Any], *, exact: bool = False) -> None:
    """Both models give the same outputs, to float rounding, with ONNX Runtime's optimizations off and on."""
    for optimized in (False, True):
        wanted, got = (run(each, feeds, optimized=optimized) for each in (one, other))
        assert len(wanted) == len(got)
        for left, right in zip(wanted, got, strict=True):
            assert_same_arrays(np.asarray(left), np.asarray(right), exact=exact)


def assert_same_arrays(wanted: Array, got: Array, *, exact: bool = False) -> None:
    """Equal dtype and shape, and equal values to float rounding (or exactly)."""
    assert wanted.dtype == got.dtype, f"dtype {got.dtype}, expected {wanted.dtype}"
    assert wanted.shape == got.shape, f"shape {got.shape}, expected {wanted.shape}"
    if exact or wanted.dtype.kind not in "f" or not wanted.size:
        np.testing.assert_array_equal(got, wanted)
    else:
        finite = np.abs(wanted[np.isfinite(wanted)])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=FLOAT_ROUNDING * float(finite.max(initial=1.0)))


def ops(source: ModelSource) -> list[str]:
    """The operators of the main graph in order.

    >>> ops(mlp_model((2, 3, 4)))
    ['Gemm', 'Relu', 'Gemm']
    """
    return [node.op_type for node in proto_of(source).graph.node]
