"""A hypothesis strategy of small valid graphs: layers, shape arithmetic, no-ops, dead nodes, shared initializers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Builder", "small_graphs"]

CHANNELS, SIDE = 4, 5
OPSET = 17
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Builder:
    """Grows a graph node by node; every tensor has N (unknown) as its first dimension."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}
        self.tensors: dict[str, tuple[int, ...]] = {"x": (CHANNELS, SIDE, SIDE), "z": (CHANNELS,)}
        self.count = 0
        self.opset = OPSET

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        """A node with one output that later nodes may read."""
        output = self.inner(op, inputs, **attributes)
        self.tensors[output] = shape
        return output

    def inner(self, op: str, inputs: list[str], **attributes: Any) -> str:
        """A node whose output is no candidate for later nodes."""
        output = self.name(op.lower())
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, value: Any, *, shared: bool = True) -> str:
        """An initializer or a Constant node; sometimes one that exists already, or an equal copy of it."""
        array = np.asarray(value)
        twins = [
            name for name, other in self.weights.items() if other.shape == array.shape and other.dtype == array.dtype
        ]
        if shared and array.dtype == np.float32 and twins and self.draw(st.booleans()):
            twin = self.draw(st.sampled_from(twins))
            if self.draw(st.booleans()):
                return str(twin)
            array = self.weights[twin]
        name = self.name("w")
        if self.draw(st.booleans()):
            self.weights[name] = array
        else:
            tensor = numpy_helper.from_array(array, name)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def normal(self, *shape: int) -> str:
        scale = max(1, int(np.prod(shape[1:]))) ** -0.5
        return self.constant(np.asarray(scale * self.rng.normal(size=shape), np.float32))

    def pick(self, rank: int | None = None) -> str:
        """A tensor, of a given rank without the first dimension."""
        fitting = [name for name, shape in self.tensors.items() if rank is None or len(shape) == rank]
        return str(self.draw(st.sampled_from(fitting)))


def _activation(build: Builder) -> None:
    source = build.pick()
    build.add(build.draw(st.sampled_from(["Relu", "Tanh", "Neg", "Identity"])), [source], build.tensors[source])


def _conv(build: Builder) -> None:
    source = build.pick(3)
    channels, *sides = build.tensors[source]
    pads: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    if build.draw(st.booleans()):
        source = build.inner("Pad", [source, build.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))])
        pads = {}
    inputs = [source, build.normal(CHANNELS, channels, 3, 3)]
    if build.draw(st.booleans()):
        inputs.append(build.normal(CHANNELS))
    build.add("Conv", inputs, (CHANNELS, *sides), **pads)


def _batch_norm(build: Builder) -> None:
    source = build.pick()
    channels = build.tensors[source][0]
    scale, bias, mean = (build.normal(channels) for _ in range(3))
    variance = build.constant(build.rng.uniform(0.5, 2, channels).astype(np.float32), shared=False)
    build.add("BatchNormalization", [source, scale, bias, mean, variance], build.tensors[source])


def _arithmetic(build: Builder) -> None:
    source = build.pick()
    shape = build.tensors[source]
    kind = build.draw(st.sampled_from(["neutral", "scalar", "channel", "last", "self"]))
    op = build.draw(st.sampled_from(["Add", "Mul", "Sub", "Div"]))
    if kind == "self":
        build.add("Add", [source, source], shape)
        return
    neutral = np.float32(0 if op in {"Add", "Sub"} else 1)
    wide = {"scalar": (), "channel": (shape[0], *(1,) * (len(shape) - 1)), "last": (shape[-1],), "neutral": ()}[kind]
    numbers = build.rng.uniform(0.5, 1.5, wide).astype(np.float32)
    other = build.constant(neutral if kind == "neutral" else numbers, shared=False)
    swapped = op in {"Add", "Mul", "Sub"} and build.draw(st.booleans())
    build.add(op, [other, source] if swapped else [source, other], shape)


def _dense(build: Builder) -> None:
    source = build.pick(1)
    weight = build.normal(build.tensors[source][0], CHANNELS)
    if build.draw(st.booleans()):
        build.add("Gemm", [source, weight, build.normal(CHANNELS)], (CHANNELS,))
    else:
        build.add("MatMul", [source, weight], (CHANNELS,))


def _transpose(build: Builder) -> None:
    source = build.pick(3)
    order = build.draw(st.permutations([0, 1, 2]))
    shape = build.tensors[source]
    build.add("Transpose", [source], tuple(shape[i] for i in order), perm=[0, *(i + 1 for i in order)])


def _reshape(build: Builder) -> None:
    """To two dimensions or back, by a constant or a computed shape."""
    source = build.pick()
    shape = build.tensors[source]
    target = (int(np.prod(shape)),) if len(shape) > 1 else (1, 1, shape[0])
    how = build.draw(st.sampled_from(["constant", "copied", "computed", "same"]))
    if how == "same":
        build.add("Reshape", [source, build.inner("Shape", [source])], shape)
    elif how == "computed":
        first = build.inner("Gather", [build.inner("Shape", [source]), build.constant(np.array(0))])
        listed = build.inner("Unsqueeze", [first, build.constant(np.array([0]))])
        whole = build.inner("Concat", [listed, build.constant(np.array(target))], axis=0)
        build.add("Reshape", [source, whole], target)
    else:
        build.add("Reshape", [source, build.constant(np.array([0 if how == "copied" else -1, *target]))], target)


def _concat(build: Builder) -> None:
    source = build.pick()
    shape = build.tensors[source]
    same = [name for name, other in build.tensors.items() if other == shape]
    others = [str(build.draw(st.sampled_from(same))) for _ in range(build.draw(st.integers(0, 1)))]
    if shape[0] <= 2 * CHANNELS:
        build.add("Concat", [source, *others], (shape[0] * (1 + len(others)), *shape[1:]), axis=1)


def _noop(build: Builder) -> None:
    source = build.pick()
    shape = build.tensors[source]
    kind = build.draw(st.sampled_from(["Dropout", "Cast", "Slice", "Squeeze", "Expand"]))
    if kind == "Slice":
        bounds = [build.constant(np.array([0])), build.constant(np.array([2**63 - 1]))]
        build.add("Slice", [source, *bounds, build.constant(np.array([1]))], shape)
    elif kind == "Squeeze":
        axis = build.constant(np.array([1]))
        build.add("Squeeze", [build.inner("Unsqueeze", [source, axis]), axis], shape)
    elif kind == "Expand":
        build.add("Expand", [source, build.inner("Shape", [source])], shape)
    else:
        build.add(kind, [source], shape, **({"to": TensorProto.FLOAT} if kind == "Cast" else {}))


def _twin(build: Builder) -> None:
    """A second node that computes what another one does."""
    candidates = [node for node in build.nodes if node.output[0] in build.tensors and len(node.output) == 1]
    if candidates:
        twin = onnx.NodeProto()
        twin.CopyFrom(build.draw(st.sampled_from(candidates)))
        shape = build.tensors[twin.output[0]]
        twin.output[0] = build.name("twin")
        build.nodes.append(twin)
        build.tensors[twin.output[0]] = shape


STEPS = [
    *(_activation, _conv, _conv, _batch_norm, _batch_norm, _arithmetic, _arithmetic, _dense, _transpose),
    *(_reshape, _reshape, _concat, _noop, _noop, _twin),
]


@st.composite
def small_graphs(draw: Any, max_nodes: int = 12) -> onnx.ModelProto:
    """Models with inputs x: (N, 4, 5, 5) and z: (N, 4), some dead nodes, and one to three outputs."""
    build = Builder(draw)
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=max_nodes)):
        step(build)
    made = [name for node in build.nodes for name in node.output if name in build.tensors]
    if not made:
        made = [build.add("Relu", ["x"], build.tensors["x"])]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    outputs = list(dict.fromkeys([*outputs, made[-1]]))
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *build.tensors[n]]) for n in ("x", "z")]
    graph = helper.make_graph(
        build.nodes,
        "small",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *build.tensors[name]]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in build.weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
