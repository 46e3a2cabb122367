"""A hypothesis strategy of graphs with channels that do nothing, and of what is left of each weight without them.

Each tensor carries a label for each of its channels. Layers make new labels, an Add makes two labels one: the builder
knows from the way it builds which channels can only go together. It shares no code with the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Builder", "Flow", "Silenced", "Unit", "silenced_cnns", "silenced_transformers"]

Array = np.ndarray[Any, Any]
Labels = Array
Draw = Callable[[st.SearchStrategy[Any]], Any]

ZERO, CONSTANT, UNREAD = "zero", "constant", "unread"
"""How a channel is silenced: what makes it writes zero, or a constant (zero weights, its bias stays); or what reads it
has zero weights."""


@dataclass(frozen=True)
class Silenced:
    """A graph in which some channels do nothing.

    Attributes:
        model: The graph.
        shapes: The shape of each weight that channels are part of, once these channels are gone, by name.
        ways: How each silenced unit was silenced.
    """

    model: onnx.ModelProto
    shapes: dict[str, tuple[int, ...]]
    ways: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """A tensor that layers read: its name, its labels, and its extents beside the batch and the channels."""

    name: str
    labels: Labels
    sides: tuple[int, ...]


@dataclass
class Unit:
    """Channels that can only go together.

    Attributes:
        labels: Their labels.
        pinned: They cannot go: part of the input or output, or read where all channels count.
        borders: A constant is none any more where it is read: padding with zeros lies beside it.
        moved: An activation turns zero into something else.
    """

    labels: list[int]
    pinned: bool = False
    borders: bool = False
    moved: bool = False

    def ways(self) -> list[str]:
        """How it may be silenced so that it can go."""
        if self.pinned:
            return []
        ways = [UNREAD] if self.borders and self.moved else [ZERO, UNREAD]
        return ways if self.borders else [*ways, CONSTANT]


@dataclass
class Weight:
    """An initializer, and what its axes stand for.

    Attributes:
        values: Its values.
        axes: The labels along each axis, None where it has none.
        out: The axis along which it makes channels, if it does.
        into: The axis along which it reads channels, if it does.
        offset: It is added (a bias), so that channels without weights are its constant.
        optional: Channels are zero even if this weight is not: a factor, or what only sees zeros.
    """

    values: Array
    axes: tuple[Labels | None, ...]
    out: int | None = None
    into: int | None = None
    offset: bool = False
    optional: bool = False


@dataclass
class Builder:
    """Grows a graph with a batch axis of unknown size."""

    draw: Draw
    opset: int
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    flows: list[Labels] = field(default_factory=list)
    outputs: list[Flow] = field(default_factory=list)

    # --- labels -------------------------------------------------------------------------------------------------------

    def fresh(self, count: int, *, pinned: bool = False) -> Labels:
        """New labels, each a unit of its own."""
        first = len(self.units)
        self.units.extend(Unit([first + number], pinned=pinned) for number in range(count))
        return np.arange(first, first + count)

    def join(self, *labels: Labels) -> None:
        """Channels at the same place can only go together."""
        for together in zip(*labels, strict=True):
            first, *others = {id(self.units[label]): self.units[label] for label in together}.values()
            for other in others:
                first.labels.extend(other.labels)
                first.pinned |= other.pinned
                first.borders |= other.borders
                first.moved |= other.moved
                for label in other.labels:
                    self.units[label] = first

    def mark(self, labels: Labels, attribute: str) -> None:
        """Set `pinned`, `borders` or `moved` of the units."""
        for label in labels:
            setattr(self.units[label], attribute, True)

    # --- parts of the graph -------------------------------------------------------------------------------------------

    def node(self, op: str, inputs: Iterable[str], **attributes: Any) -> str:
        """A node with one output."""
        return self.parts(op, inputs, 1, **attributes)[0]

    def parts(self, op: str, inputs: Iterable[str], count: int, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        name = f"{op}_{len(self.nodes)}"
        outputs = [f"{name}_{number}" for number in range(count)]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, **attributes))
        return outputs

    def constant(self, values: Any) -> str:
        """An initializer that no channel is part of."""
        array = np.asarray(values)
        return self.weight(array, (None,) * array.ndim)

    def weight(self, values: Array, axes: tuple[Labels | None, ...], **roles: Any) -> str:
        """An initializer."""
        name = f"w{len(self.weights)}"
        self.weights[name] = Weight(values, axes, **roles)
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Random float32 values, none of them next to zero: a channel is dead only where it was silenced."""
        values = self.rng.normal(size=shape)
        return np.asarray(scale * (values + 0.1 * np.sign(values)), np.float32)

    def bias(self, labels: Labels, *extents: int, **roles: Any) -> str:
        """A constant that is added to each channel."""
        values = self.normal(len(labels), *extents, scale=0.5)
        return self.weight(values, (labels, *(None,) * len(extents)), out=0, offset=True, **roles)

    def per_channel(self, labels: Labels, low: float, high: float, *extents: int) -> str:
        """A factor of each channel."""
        values = np.asarray(self.rng.uniform(low, high, (len(labels), *extents)), np.float32)
        return self.weight(values, (labels, *(None,) * len(extents)))

    def conv(self, x: Flow, channels: int, kernel: int = 3, *, pad: bool = True, optional: bool = False) -> Flow:
        """A Conv with or without a bias."""
        pad = pad and kernel > 1
        if pad:
            self.mark(x.labels, "borders")
        labels = self.fresh(channels)
        values = self.normal(channels, len(x.labels), kernel, kernel, scale=(len(x.labels) * kernel**2) ** -0.5)
        roles: dict[str, Any] = {"out": 0, "into": 1, "optional": optional}
        inputs = [x.name, self.weight(values, (labels, x.labels, None, None), **roles)]
        if self.draw(st.booleans()):
            inputs.append(self.bias(labels, optional=optional))
        side = 0 if pad else kernel - 1
        name = self.node("Conv", inputs, pads=[int(pad) * (kernel // 2)] * 4)
        return self.flow(name, labels, tuple(extent - side for extent in x.sides))

    def flow(self, name: str, labels: Labels, sides: tuple[int, ...]) -> Flow:
        """A tensor; some of its channels have to stay."""
        self.flows.append(labels)
        return Flow(name, labels, sides)

    def same(self, x: Flow, op: str, *inputs: str, **attributes: Any) -> Flow:
        """A node that keeps channels and extents."""
        return Flow(self.node(op, [x.name, *inputs], **attributes), x.labels, x.sides)

    # --- the result ---------------------------------------------------------------------------------------------------

    def silence(self, inputs: Iterable[tuple[str, tuple[int, ...]]]) -> Silenced:
        """Silence a random choice of units, each in a way that lets it go."""
        for output in self.outputs:
            self.mark(output.labels, "pinned")
        units = [unit for unit in {id(unit): unit for unit in self.units}.values() if unit.ways()]
        chosen = [unit for unit in units if self.rng.random() < 0.35]
        ways: dict[int, str] = {}
        live = [len({id(self.units[label]) for label in labels}) for labels in self.flows]
        holding: dict[int, list[int]] = {}
        for number, labels in enumerate(self.flows):
            for key in {id(self.units[label]) for label in labels}:
                holding.setdefault(key, []).append(number)
        for unit in chosen:
            if all(live[number] > 1 for number in holding.get(id(unit), [])):
                ways[id(unit)] = self.draw(st.sampled_from(unit.ways()))
                for number in holding.get(id(unit), []):
                    live[number] -= 1
        way_of = np.array([ways.get(id(unit), "") for unit in self.units], dtype=object)
        for weight in self.weights.values():
            self._silence(weight, way_of)
        shapes = {
            name: tuple(
                extent if labels is None else int(np.sum(way_of[labels] == ""))
                for extent, labels in zip(weight.values.shape, weight.axes, strict=True)
            )
            for name, weight in self.weights.items()
            if any(labels is not None for labels in weight.axes)
        }
        return Silenced(self._model(inputs), shapes, tuple(ways.values()))

    def _silence(self, weight: Weight, way_of: Array) -> None:
        if weight.out is not None and (labels := weight.axes[weight.out]) is not None:
            silent = way_of[labels] == ZERO
            if weight.optional and self.draw(st.booleans()):
                silent &= False
            if not weight.offset:
                silent |= way_of[labels] == CONSTANT
            np.moveaxis(weight.values, weight.out, 0)[silent] = 0
        if weight.into is not None and (labels := weight.axes[weight.into]) is not None:
            np.moveaxis(weight.values, weight.into, 0)[way_of[labels] == UNREAD] = 0

    def _model(self, inputs: Iterable[tuple[str, tuple[int, ...]]]) -> onnx.ModelProto:
        def info(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])

        graph = helper.make_graph(
            self.nodes,
            "channels",
            [info(name, shape) for name, shape in inputs],
            [info(flow.name, (len(flow.labels), *flow.sides)) for flow in self.outputs],
            [numpy_helper.from_array(weight.values, name) for name, weight in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def _builder(draw: Draw) -> Builder:
    return Builder(draw, draw(st.integers(13, 17)), np.random.default_rng(draw(st.integers(0, 2**16))))


# --- convolutional networks -------------------------------------------------------------------------------------------


def _normalized(build: Builder, x: Flow) -> Flow:
    """A BatchNormalization, or none."""
    if build.draw(st.booleans()):
        return x
    scale, variance = (build.per_channel(x.labels, 0.5, 1.5) for _ in range(2))
    return build.same(x, "BatchNormalization", scale, build.bias(x.labels), build.bias(x.labels), variance)


def _activated(build: Builder, x: Flow) -> Flow:
    kinds = ["Relu", "LeakyRelu", "HardSwish", "Clip", "PRelu", "Tanh", "Silu", "Sigmoid", "none", "Affine"]
    kind = build.draw(st.sampled_from(kinds))
    if kind == "Clip":
        return build.same(x, "Clip", build.constant(np.float32(0)), build.constant(np.float32(6)))
    if kind == "PRelu":
        return build.same(x, "PRelu", build.per_channel(x.labels, 0.1, 0.3, 1, 1))
    if kind == "Silu":
        return build.same(x, "Mul", build.same(x, "Sigmoid").name)
    if kind == "Affine":
        scaled = build.same(x, "Mul", build.per_channel(x.labels, 0.5, 1.5, 1, 1))
        return build.same(scaled, "Add", build.bias(x.labels, 1, 1))
    if kind == "HardSwish" and build.opset < 14:
        return build.same(x, "Mul", build.same(x, "HardSigmoid").name)
    if kind == "Sigmoid":
        build.mark(x.labels, "moved")
    return x if kind == "none" else build.same(x, kind)


def _layer(build: Builder, x: Flow, channels: int | None = None) -> Flow:
    channels = channels or build.draw(st.integers(3, 9))
    kernel = build.draw(st.sampled_from([1, 3]))
    pad = min(x.sides) < 6 or build.draw(st.booleans())
    return _activated(build, _normalized(build, build.conv(x, channels, kernel, pad=pad)))


def _padded(build: Builder, x: Flow, channels: int, kernel: int) -> Flow:
    return _normalized(build, build.conv(x, channels, kernel))


def _depthwise(build: Builder, x: Flow) -> Flow:
    """A depthwise Conv and a pointwise one."""
    build.mark(x.labels, "borders")
    values = build.normal(len(x.labels), 1, 3, 3, scale=1 / 3)
    inputs = [build.weight(values, (x.labels, None, None, None), out=0, optional=True), build.bias(x.labels)]
    inner = build.same(x, "Conv", *inputs, pads=[1, 1, 1, 1], group=len(x.labels))
    return _activated(build, build.conv(_activated(build, _normalized(build, inner)), build.draw(st.integers(3, 8)), 1))


def _residual(build: Builder, x: Flow) -> Flow:
    """Two convolutions beside the way past them, which has a projection where the widths differ."""
    channels = build.draw(st.sampled_from([len(x.labels), 6]))
    inner = _activated(build, _padded(build, x, build.draw(st.integers(3, 8)), 3))
    inner = _padded(build, inner, channels, build.draw(st.sampled_from([1, 3])))
    past = x if channels == len(x.labels) and build.draw(st.booleans()) else _padded(build, x, channels, 1)
    build.join(inner.labels, past.labels)
    summed = build.same(inner, "Add", past.name)
    return build.same(summed, "Relu") if build.draw(st.booleans()) else summed


def _dense(build: Builder, x: Flow) -> Flow:
    """What was there beside what a layer makes of it, as in DenseNet."""
    made = _activated(build, _padded(build, x, build.draw(st.integers(2, 5)), 3))
    return _joined(build, x, made)


def _joined(build: Builder, *flows: Flow) -> Flow:
    name = build.node("Concat", [flow.name for flow in flows], axis=1)
    return build.flow(name, np.concatenate([flow.labels for flow in flows]), flows[0].sides)


def _cut_in_two(build: Builder, x: Flow) -> Flow:
    """Split or Slice, a layer on one part, and both parts beside each other again."""
    x = _layer(build, x, build.draw(st.integers(4, 9)))
    at = build.draw(st.integers(2, len(x.labels) - 2))
    if build.draw(st.booleans()):
        names = build.parts("Split", [x.name, build.constant(np.array([at, len(x.labels) - at]))], 2, axis=1)
    else:
        bounds = [(0, at), (at, np.iinfo(np.int64).max)]
        names = [build.node("Slice", [x.name, *(build.constant(np.array([v])) for v in (*b, 1))]) for b in bounds]
    one, other = (build.flow(name, part, x.sides) for name, part in zip(names, np.split(x.labels, [at]), strict=True))
    return _joined(build, one, _activated(build, _padded(build, other, build.draw(st.integers(2, 5)), 3)))


def _grouped(build: Builder, x: Flow) -> Flow:
    """A grouped Conv between two others: as many channels have to go from each group."""
    groups, inputs, outputs = 2, build.draw(st.integers(3, 4)), build.draw(st.integers(3, 4))
    x = _padded(build, x, groups * inputs, 1)
    build.join(*np.split(x.labels, groups))
    build.mark(x.labels, "borders")
    labels = build.fresh(groups * outputs)
    build.join(*np.split(labels, groups))
    values = build.normal(groups * outputs, inputs, 3, 3, scale=(9 * inputs) ** -0.5)
    weight = build.weight(values, (labels, x.labels[:inputs], None, None), out=0, into=1)
    name = build.node("Conv", [x.name, weight, build.bias(labels)], pads=[1, 1, 1, 1], group=groups)
    inner = _activated(build, build.flow(name, labels, x.sides))
    if build.draw(st.booleans()):
        inner = _shuffled(build, inner, groups)
    return _padded(build, inner, build.draw(st.integers(3, 6)), 1)


def _shuffled(build: Builder, x: Flow, groups: int) -> Flow:
    """ShuffleNet's way to mix groups; `x` has the same units in each group."""
    channels = len(x.labels)
    apart = build.node("Reshape", [x.name, build.constant(np.array([0, groups, channels // groups, *x.sides]))])
    turned = build.node("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    name = build.node("Reshape", [turned, build.constant(np.array([0, channels, *x.sides]))])
    return Flow(name, x.labels.reshape(groups, -1).T.reshape(-1), x.sides)


def _gated(build: Builder, x: Flow) -> Flow:
    """Squeeze and excitation."""
    x = _padded(build, x, build.draw(st.integers(4, 8)), 1)
    mean = Flow(build.node("GlobalAveragePool", [x.name]), x.labels, (1, 1))
    inner = build.same(build.conv(mean, build.draw(st.integers(2, 4)), 1), "Relu")
    gate = build.conv(inner, len(x.labels), 1, optional=True)
    build.join(x.labels, gate.labels)
    return build.same(x, "Mul", build.same(gate, "Sigmoid").name)


def _resampled(build: Builder, x: Flow) -> Flow:
    """Pooling, Resize, Pad or ConvTranspose."""
    kinds = ["ConvTranspose", "Resize", "Pad", "MaxPool", "AveragePool"]
    kind = build.draw(st.sampled_from([kind for kind in kinds if (min(x.sides) >= 4) == (kind not in kinds[:2])]))
    if kind == "ConvTranspose":
        channels = build.draw(st.integers(3, 6))
        build.mark(x.labels, "borders")
        labels = build.fresh(channels)
        values = build.normal(len(x.labels), channels, 2, 2, scale=len(x.labels) ** -0.5)
        weight = build.weight(values, (x.labels, labels, None, None), out=1, into=0)
        name = build.node("ConvTranspose", [x.name, weight, build.bias(labels)], strides=[2, 2])
        return build.flow(name, labels, tuple(2 * extent for extent in x.sides))
    if kind == "Resize":
        scales = build.constant(np.array([1, 1, 2, 2], np.float32))
        name = build.node("Resize", [x.name, "", scales], mode=build.draw(st.sampled_from(["nearest", "linear"])))
        return Flow(name, x.labels, tuple(2 * extent for extent in x.sides))
    if kind == "Pad":
        mode = build.draw(st.sampled_from(["constant", "reflect", "edge"]))
        if mode == "constant":
            build.mark(x.labels, "borders")
        name = build.node("Pad", [x.name, build.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))], mode=mode)
        return Flow(name, x.labels, tuple(extent + 2 for extent in x.sides))
    name = build.node(kind, [x.name], kernel_shape=[2, 2], strides=[2, 2])
    return Flow(name, x.labels, tuple(extent // 2 for extent in x.sides))


STEPS = [_layer, _depthwise, _residual, _residual, _dense, _cut_in_two, _grouped, _gated, _resampled]


def _head(build: Builder, x: Flow) -> Flow:
    """Class scores: of the mean of each channel, or of all values."""
    kind = build.draw(st.sampled_from(["pool", "mean", "flat", "reshape"]))
    labels = x.labels
    if kind == "pool":
        name = build.node("Flatten", [build.node("GlobalAveragePool", [x.name])])
    elif kind == "mean":
        name = build.node("ReduceMean", [x.name], axes=[2, 3], keepdims=0)
    else:
        labels = np.repeat(x.labels, x.sides[0] * x.sides[1])
        shape = [] if kind == "flat" else [build.constant(np.array([0, -1]))]
        name = build.node("Flatten" if kind == "flat" else "Reshape", [x.name, *shape])
    made = build.fresh(5)
    values = build.normal(len(labels), 5, scale=len(labels) ** -0.5)
    if build.draw(st.booleans()):
        weight = build.weight(np.ascontiguousarray(values.T), (made, labels), out=0, into=1)
        name = build.node("Gemm", [name, weight, build.bias(made)], transB=1)
    else:
        name = build.node("MatMul", [name, build.weight(values, (labels, made), out=1, into=0)])
        name = build.node("Add", [name, build.bias(made)]) if build.draw(st.booleans()) else name
    return Flow(name, made, ())


@st.composite
def silenced_cnns(draw: Any, max_steps: int = 4) -> Silenced:
    """Networks of convolutions on x: (N, 3, 8, 8), with class scores and sometimes feature maps as outputs."""
    build = _builder(draw)
    flow = _layer(build, Flow("x", build.fresh(3, pinned=True), (8, 8)))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=max_steps)):
        flow = step(build, flow)
        if build.draw(st.integers(0, 9)) == 0:
            build.outputs.append(flow)
    build.outputs.append(_head(build, flow))
    return build.silence([("x", (3, 8, 8))])


# --- transformers -----------------------------------------------------------------------------------------------------

TOKENS, WIDTH = 5, 12


def _projected(build: Builder, x: Flow, labels: Labels, *, optional: bool = False) -> str:
    """MatMul and Add."""
    values = build.normal(len(x.labels), len(labels), scale=len(x.labels) ** -0.5)
    name = build.node("MatMul", [x.name, build.weight(values, (x.labels, labels), out=1, into=0, optional=optional)])
    inputs = [name, build.bias(labels, optional=optional)]
    return build.node("Add", inputs if build.draw(st.booleans()) else inputs[::-1])


def _layer_norm(build: Builder, x: Flow) -> Flow:
    """As one operator, or as the chain that exporters write before opset 17."""
    build.mark(x.labels, "pinned")
    gain, shift = build.per_channel(x.labels, 0.5, 1.5), build.bias(x.labels)
    if build.opset >= 17 and build.draw(st.booleans()):
        return build.same(x, "LayerNormalization", gain, shift, axis=-1)
    centred = build.same(x, "Sub", build.node("ReduceMean", [x.name], axes=[-1]))
    squares = build.same(centred, "Pow", build.constant(np.float32(2)))
    variance = build.node("ReduceMean", [squares.name], axes=[-1])
    root = build.node("Sqrt", [build.node("Add", [variance, build.constant(np.float32(1e-5))])])
    scaled = build.same(build.same(centred, "Div", root), "Mul", gain)
    return build.same(scaled, "Add", shift)


def _attention(build: Builder, x: Flow) -> str:
    """Heads are units: a head goes if its values are zero, or if nothing reads them."""
    heads, size = build.draw(st.integers(2, 4)), build.draw(st.sampled_from([2, 4]))
    parts = [build.fresh(heads * size) for _ in "qkv"]
    build.join(*(part.reshape(heads, size)[:, place] for part in parts for place in range(size)))
    build.mark(parts[2], "borders")
    if build.draw(st.booleans()):  # fused: q and k have to be silenced with v, or none of them
        whole = _projected(build, x, np.concatenate(parts))
        names = build.parts("Split", [whole, build.constant(np.array([heads * size] * 3))], 3, axis=-1)
    else:
        names = [_projected(build, x, part, optional=kind != "v") for kind, part in zip("qkv", parts, strict=True)]
    orders = [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]]
    shape = [0, build.draw(st.sampled_from([0, -1, TOKENS])), heads, size]
    query, key, value = (
        build.node("Transpose", [build.node("Reshape", [name, build.constant(np.array(shape))])], perm=order)
        for name, order in zip(names, orders, strict=True)
    )
    scaled = build.node("Div", [build.node("MatMul", [query, key]), build.constant(np.float32(size**0.5))])
    mixed = build.node("MatMul", [build.node("Softmax", [scaled], axis=-1), value])
    turned = build.node("Transpose", [mixed], perm=[0, 2, 1, 3])
    build.flows.append(parts[2])
    joined = build.node("Reshape", [turned, build.constant(np.array([0, TOKENS, heads * size]))])
    return _projected(build, Flow(joined, parts[2], (TOKENS,)), x.labels)


def _gelu(build: Builder, name: str) -> str:
    erf = build.node("Erf", [build.node("Div", [name, build.constant(np.float32(2**0.5))])])
    factor = build.node("Add", [erf, build.constant(np.float32(1))])
    return build.node("Mul", [build.node("Mul", [name, factor]), build.constant(np.float32(0.5))])


def _feed_forward(build: Builder, x: Flow) -> str:
    labels = build.fresh(build.draw(st.integers(6, 20)))
    build.flows.append(labels)
    inner = _projected(build, x, labels)
    inner = _gelu(build, inner) if build.draw(st.booleans()) else build.node("Relu", [inner])
    return _projected(build, Flow(inner, labels, (TOKENS,)), x.labels)


@st.composite
def silenced_transformers(draw: Any) -> Silenced:
    """Transformer blocks on x: (N, 5, 7), normalized before or after each part, and the mean of the tokens."""
    build = _builder(draw)
    stream = build.fresh(WIDTH)
    flow = Flow(_projected(build, Flow("x", build.fresh(7, pinned=True), (TOKENS,)), stream), stream, (TOKENS,))
    before = draw(st.booleans())
    for part in draw(st.lists(st.sampled_from([_attention, _feed_forward]), min_size=1, max_size=3)):
        made = part(build, _layer_norm(build, flow) if before else flow)
        flow = Flow(build.node("Add", [flow.name, made]), stream, (TOKENS,))
        flow = flow if before else _layer_norm(build, flow)
    mean = Flow(build.node("ReduceMean", [flow.name], axes=[1], keepdims=0), stream, ())
    scores = build.fresh(4)
    build.outputs.append(Flow(_projected(build, mean, scores), scores, ()))
    return build.silence([("x", (TOKENS, 7))])
