"""A hypothesis strategy of graphs with most of what models are made of, wider than `tests.strategies`.

Convolutions of all kinds, recurrent layers, attention, embeddings, pooling, normalization, residuals, parts that are
quantized already, subgraphs that read outer tensors and weights, other element types, opsets, dynamic axes, and weights
that the caller may feed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.printer
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.strategies import CHANNELS, SIDE, STEPS, Builder

__all__ = ["WideGraph", "wide_graphs"]

Array = np.ndarray[Any, Any]

WORDS, TOKENS = 11, 3
SAMPLES = 8


@dataclass(frozen=True, repr=False)
class WideGraph:
    """A model, and as many samples of its inputs as calibration takes."""

    model: onnx.ModelProto
    samples: dict[str, Array]

    def __repr__(self) -> str:
        """The model as text: what hypothesis shows of a failure."""
        return onnx.printer.to_text(self.model)

    def feed(self, rows: int) -> dict[str, Array]:
        """The first of the samples."""
        return {name: values[:rows] for name, values in self.samples.items()}


# --- activations, element types ---------------------------------------------------------------------------------------


def _activation(build: Builder) -> None:
    source = build.pick()
    names = ["Sigmoid", "LeakyRelu", "HardSwish", "Erf", "Elu", "Softplus", "Abs", "Exp", "Clip", "PRelu", "Softmax"]
    op, shape = build.draw(st.sampled_from(names)), build.tensors[source]
    if op == "Clip":
        bounds = [build.constant(np.float32(0), shared=False), build.constant(np.float32(6), shared=False)]
        build.add(op, [source, *bounds], shape)
    elif op == "PRelu":
        build.add(op, [source, build.normal(shape[0], *(1,) * (len(shape) - 1))], shape)
    elif op == "Exp":
        build.add("Exp", [build.inner("Neg", [build.inner("Abs", [source])])], shape)
    else:
        build.add(op, [source], shape)


def _gelu(build: Builder) -> None:
    """As exporters write it."""
    source = build.pick()
    root = build.constant(np.float32(2**0.5), shared=False)
    error = build.inner("Erf", [build.inner("Div", [source, root])])
    one, half = (build.constant(np.float32(value), shared=False) for value in (1, 0.5))
    whole = build.inner("Mul", [source, build.inner("Add", [error, one])])
    build.add("Mul", [whole, half], build.tensors[source])


def _other_type(build: Builder) -> None:
    """Through float16, double or integers and back, or a comparison."""
    source = build.pick()
    shape = build.tensors[source]
    kind = build.draw(st.sampled_from(["half", "double", "integers", "where"]))
    if kind == "where":
        where = build.inner("Greater", [source, build.constant(np.float32(0.1), shared=False)])
        build.add("Where", [where, source, build.constant(np.float32(-1), shared=False)], shape)
        return
    to = {"half": TensorProto.FLOAT16, "double": TensorProto.DOUBLE, "integers": TensorProto.INT32}[kind]
    cast = build.inner("Cast", [source], to=to)
    numbers = helper.tensor_dtype_to_np_dtype(to)
    other = build.constant(np.asarray(2, numbers), shared=False)
    build.add("Cast", [build.inner("Mul", [cast, other])], shape, to=TensorProto.FLOAT)


# --- layers -----------------------------------------------------------------------------------------------------------


def _any_conv(build: Builder) -> None:
    source = build.pick(3)
    channels, *sides = build.tensors[source]
    kind = build.draw(st.sampled_from(["depthwise", "point", "strided", "dilated", "transposed", "same"]))
    if kind == "transposed":
        weight = build.normal(channels, 3, 2, 2)
        build.add("ConvTranspose", [source, weight], (3, *(2 * side for side in sides)), strides=[2, 2])
        return
    size = 1 if kind == "point" else 3
    weight = build.normal(channels if kind == "depthwise" else 6, 1 if kind == "depthwise" else channels, size, size)
    inputs = [source, weight]
    filters = channels if kind == "depthwise" else 6
    if build.draw(st.booleans()):
        inputs.append(build.normal(filters))
    attributes: dict[str, Any] = {"pads": [size // 2] * 4}
    if kind == "depthwise":
        attributes["group"] = channels
    if kind == "dilated":
        attributes |= {"dilations": [2, 2], "pads": [2] * 4}
    if kind == "same":
        attributes = {"auto_pad": "SAME_UPPER"}
    if kind == "strided":
        attributes["strides"], sides = [2, 2], [(side + 1) // 2 for side in sides]
    build.add("Conv", inputs, (filters, *sides), **attributes)


def _pool(build: Builder) -> None:
    source = build.pick(3)
    channels, *sides = build.tensors[source]
    kind = build.draw(st.sampled_from(["MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Resize"]))
    if kind in {"MaxPool", "AveragePool"}:
        build.add(kind, [source], (channels, *sides), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    elif kind == "GlobalAveragePool":
        pooled = build.inner(kind, [source])
        build.add("Flatten", [pooled], (channels,))
    elif kind == "Resize":
        scales = build.constant(np.array([1, 1, 2, 2], np.float32), shared=False)
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        build.add(kind, [source, "", scales], (channels, *(2 * side for side in sides)), **how)
    elif build.opset >= 18:
        build.add(kind, [source, build.constant(np.array([2, 3]))], (channels,), keepdims=0)
    else:
        build.add(kind, [source], (channels,), axes=[2, 3], keepdims=0)


def _normalization(build: Builder) -> None:
    source = build.pick()
    shape = build.tensors[source]
    if len(shape) == 3 and build.draw(st.booleans()):
        build.add("InstanceNormalization", [source, build.normal(shape[0]), build.normal(shape[0])], shape)
    elif build.opset >= 17:
        build.add("LayerNormalization", [source, build.normal(shape[-1]), build.normal(shape[-1])], shape)


def _residual(build: Builder) -> None:
    source = build.pick()
    same = [name for name, shape in build.tensors.items() if shape == build.tensors[source]]
    build.add(build.draw(st.sampled_from(["Add", "Mul", "Max"])), [source, build.draw(st.sampled_from(same))],
              build.tensors[source])  # fmt: skip


def _parts(build: Builder) -> None:
    """Split along channels, and put one part back, or none."""
    source = build.pick()
    channels, *rest = build.tensors[source]
    if channels < 2:
        return
    sizes = build.constant(np.array([channels // 2, channels - channels // 2]))
    names = [build.name("part"), build.name("part")]
    build.nodes.append(helper.make_node("Split", [source, sizes], names, axis=1))
    build.tensors[names[0]] = (channels // 2, *rest)
    if build.draw(st.booleans()):
        build.add("Concat", [names[1], names[0]], (channels, *rest), axis=1)


# --- sequences --------------------------------------------------------------------------------------------------------


def _embedding(build: Builder) -> None:
    table = build.normal(WORDS, CHANNELS)
    build.add("Gather", [table, "ids"], (TOKENS, CHANNELS))


def _sequence(build: Builder) -> str:
    """A tensor of tokens and features."""
    if not any(len(shape) == 2 for shape in build.tensors.values()):
        _embedding(build)
    return build.pick(2)


def _attention(build: Builder) -> None:
    source = _sequence(build)
    tokens, features = build.tensors[source]
    query, key, value = (build.inner("MatMul", [source, build.normal(features, CHANNELS)]) for _ in range(3))
    turned = build.inner("Transpose", [key], perm=[0, 2, 1])
    scores = build.inner("Div", [build.inner("MatMul", [query, turned]), build.constant(np.float32(2), shared=False)])
    build.add("MatMul", [build.inner("Softmax", [scores], axis=-1), value], (tokens, CHANNELS))


def _projection(build: Builder) -> None:
    source = _sequence(build)
    tokens, features = build.tensors[source]
    product = build.inner("MatMul", [source, build.normal(features, 6)])
    build.add("Add", [product, build.normal(6)], (tokens, 6))


def _recurrent(build: Builder) -> None:
    source = _sequence(build)
    tokens, features = build.tensors[source]
    op = build.draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op] * CHANNELS
    weights = [build.normal(1, gates, features), build.normal(1, gates, CHANNELS), build.normal(1, 2 * gates)]
    turned = build.inner("Transpose", [source], perm=[1, 0, 2])
    states = build.inner(op, [turned, *weights], hidden_size=CHANNELS)
    flat = build.inner("Squeeze", [states, build.constant(np.array([1]))])
    build.add("Transpose", [flat], (tokens, CHANNELS), perm=[1, 0, 2])


# --- quantized parts --------------------------------------------------------------------------------------------------


def _scale(build: Builder, kind: type, *, size: int = 0) -> list[str]:
    scale = np.full((size,) if size else (), 0.03, np.float32)
    zero = np.zeros_like(scale).astype(kind) + kind(120 if kind is np.uint8 else 0)
    return [build.constant(scale, shared=False), build.constant(zero, shared=False)]


def _qdq(build: Builder) -> None:
    source = build.pick()
    kind = build.draw(st.sampled_from([np.int8, np.uint8]))
    scale = _scale(build, kind)
    codes = build.inner("QuantizeLinear", [source, *scale])
    build.add("DequantizeLinear", [codes, *scale], build.tensors[source])


def _quantized_weight(build: Builder) -> None:
    """A layer whose weight is stored in int8, for each channel or as a whole."""
    source = build.pick()
    shape = build.tensors[source]
    is_conv, per_channel = len(shape) == 3, build.draw(st.booleans())
    wide = (6, shape[0], 3, 3) if is_conv else (shape[-1], 6)
    axis = 0 if is_conv else 1
    codes = build.constant(build.rng.integers(-127, 128, wide).astype(np.int8), shared=False)
    scale = _scale(build, np.int8, size=6 if per_channel else 0)
    weight = build.inner("DequantizeLinear", [codes, *scale], **({"axis": axis} if per_channel else {}))
    if is_conv:
        build.add("Conv", [source, weight], (6, *shape[1:]), pads=[1, 1, 1, 1])
    else:
        build.add("MatMul", [source, weight], (*shape[:-1], 6))


# --- subgraphs --------------------------------------------------------------------------------------------------------


def _branches(build: Builder) -> None:
    """An If that a constant or the input decides; both branches read an outer tensor, and one weight."""
    source = build.pick()
    shape = build.tensors[source]
    if build.draw(st.booleans()):
        condition = build.constant(np.array(build.draw(st.booleans())), shared=False)
    else:
        total = build.inner("ReduceMax", ["z"], keepdims=0)
        condition = build.inner("Greater", [total, build.constant(np.float32(0), shared=False)])
    weight = build.normal(shape[-1], shape[-1])
    bodies = []
    for op in ("Tanh", "Relu"):
        inner = [
            helper.make_node("MatMul", [source, weight], [build.name("inner")]),
            helper.make_node(op, [f"inner{build.count}"], [f"branch{build.count}"]),
        ]
        result = helper.make_tensor_value_info(inner[1].output[0], TensorProto.FLOAT, ["N", *shape])
        bodies.append(helper.make_graph(inner, op.lower(), [], [result]))
    build.add("If", [condition], shape, then_branch=bodies[0], else_branch=bodies[1])


def _loop(build: Builder) -> None:
    """Two rounds over a tensor, with a weight inside the body or outside."""
    source = build.pick()
    shape, name = build.tensors[source], build.name("round")
    weight = build.rng.normal(size=(shape[-1], shape[-1])).astype(np.float32) * np.float32(0.4)
    outer = build.constant(weight) if build.draw(st.booleans()) else ""
    used = outer or f"{name}_w"
    nodes = [
        helper.make_node("MatMul", [f"{name}_in", used], [f"{name}_m"]),
        helper.make_node("Tanh", [f"{name}_m"], [f"{name}_out"]),
        helper.make_node("Identity", [f"{name}_go"], [f"{name}_on"]),
    ]
    kinds: list[tuple[str, int, list[int]]] = [
        (f"{name}_i", TensorProto.INT64, []),
        (f"{name}_go", TensorProto.BOOL, []),
    ]
    inputs = [helper.make_tensor_value_info(*each) for each in kinds]
    inputs.append(helper.make_tensor_value_info(f"{name}_in", TensorProto.FLOAT, ["N", *shape]))
    outputs = [helper.make_tensor_value_info(f"{name}_on", TensorProto.BOOL, [])]
    outputs.append(helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["N", *shape]))
    inside = [] if outer else [numpy_helper.from_array(weight, used)]
    body = helper.make_graph(nodes, "body", inputs, outputs, inside)
    build.add("Loop", [build.constant(np.array(2)), "", source], shape, body=body)


# --- the whole --------------------------------------------------------------------------------------------------------

WIDE_STEPS = [
    *(_activation, _gelu, _other_type, _any_conv, _any_conv, _pool, _normalization, _residual, _residual, _parts),
    *(_embedding, _attention, _projection, _recurrent, _qdq, _qdq, _quantized_weight, _branches, _loop),
]
LARGEST = 4096
"""Numbers of one sample of a tensor; what would make larger ones is left out."""


@st.composite
def wide_graphs(draw: Any, max_nodes: int = 10) -> WideGraph:
    """Models with inputs x: (N, 4, 5, 5), z: (N, 4) and ids: (N, 3), one to three outputs, and samples for them."""
    build = Builder(draw)
    build.opset = draw(st.sampled_from([13, 15, 17, 18, 20, 21]))
    steps = [*STEPS, *WIDE_STEPS, *WIDE_STEPS]
    for step in draw(st.lists(st.sampled_from(steps), min_size=1, max_size=max_nodes)):
        known = dict(build.tensors)
        if build.opset < 14 and step is _activation:
            continue  # HardSwish
        step(build)
        build.tensors = {n: s for n, s in build.tensors.items() if n in known or np.prod(s) <= LARGEST}
    made = [name for node in build.nodes for name in node.output if name in build.tensors]
    made = made or [build.add("Relu", ["x"], build.tensors["x"])]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    return WideGraph(_model(build, list(dict.fromkeys([*outputs, made[-1]]))), _samples(build))


def _model(build: Builder, outputs: list[str]) -> onnx.ModelProto:
    batch = build.draw(st.sampled_from(["N", "N", None]))
    declared: dict[str, tuple[int, tuple[Any, ...]]] = {
        "x": (TensorProto.FLOAT, build.tensors["x"]),
        "z": (TensorProto.FLOAT, build.tensors["z"]),
    }
    declared["ids"] = (TensorProto.INT64, (TOKENS,))
    if build.draw(st.integers(0, 3)) == 0:  # a side that the model does not fix
        declared["x"] = (TensorProto.FLOAT, (CHANNELS, "H", SIDE))
    inputs = [helper.make_tensor_value_info(name, kind, [batch, *shape]) for name, (kind, shape) in declared.items()]
    weights = [numpy_helper.from_array(value, name) for name, value in build.weights.items()]
    floats = [tensor for tensor in weights if tensor.data_type == TensorProto.FLOAT]
    if floats and build.draw(st.integers(0, 5)) == 0:  # a weight that the caller may feed
        tensor = build.draw(st.sampled_from(floats))
        inputs.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims)))
    ranks = [helper.make_tensor_value_info(name, TensorProto.FLOAT, _declared(build, name)) for name in outputs]
    graph = helper.make_graph(build.nodes, "wide", inputs, ranks, weights)
    if build.draw(st.booleans()):
        for number, node in enumerate(graph.node):
            node.name = f"{node.op_type}_{number}"
    versions = [helper.make_opsetid("", build.opset)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8 if build.opset < 19 else 10)


def _declared(build: Builder, name: str) -> list[Any]:
    """The shape of an output: named axes only, since a free side of the input may be any."""
    return [None] * (1 + len(build.tensors[name]))


def _samples(build: Builder) -> dict[str, Array]:
    floats = {name: build.rng.normal(size=(SAMPLES, *build.tensors[name])).astype(np.float32) for name in ("x", "z")}
    return {**floats, "ids": build.rng.integers(0, WORDS, (SAMPLES, TOKENS))}
