"""Where a model's error comes from: every tensor of the original against the same tensor of the optimized model."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, shape_inference

from onnxcomp.deviation import TensorError
from onnxcomp.errors import ModelError
from onnxcomp.model import Model
from onnxcomp.runtime import Feed, Runtime

__all__ = ["GraphView", "captured", "channel_axes", "layer_errors", "tensor_pairs"]

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
"""Element types of tensors that have an error; others are shapes, indices, masks and codes."""

CLIPS = frozenset({"Relu", "Clip"})
"""Operators that become part of the int8 kernel before them."""

IMAGES = frozenset({"Conv", "ConvTranspose", "QLinearConv", "BatchNormalization", "InstanceNormalization", "MaxPool"})
IMAGES |= {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "DepthToSpace", "SpaceToDepth"}
"""Operators whose channels are on axis 1."""

ROWS = frozenset({"MatMul", "Gemm", "Flatten", "Reshape", "Transpose", "Squeeze", "Gather", "LayerNormalization"})
"""Operators behind which the channels are on the last axis, or anywhere."""


def layer_errors(
    runtime: Runtime,
    original: Path,
    candidate: Path,
    feeds: Callable[[], Iterable[Feed]],
    tensors: Sequence[str] | None = None,
    *,
    optimize: bool = True,
) -> dict[str, TensorError]:
    """Measure the error of every tensor that two models have by the same name.

    Both models run in the worker on each feed in turn; no activation leaves it. Memory is that of the models and of
    one group of tensors of one run (256 MB), whatever the number of feeds; each group is a pass over the feeds.

    Behind a QuantizeLinear, a tensor is what its readers see: the output of the DequantizeLinear, where no node reads
    the float value itself. Tensors inside of an int8 kernel, such as the result of a Conv before its Relu, are not
    looked at unless they are asked for: to see them, ONNX Runtime would have to give the kernel up.

    The error of a tensor is that of all layers up to it, not of the layer alone.

    Seeing a tensor makes it a graph output, and ONNX Runtime fuses no float operators across it: floats differ by
    rounding from an unobserved run (1e-6, about 120 dB; two equal models are seen alike and have no error at all).
    Integers do not differ, since a DequantizeLinear is copied for its further reader, and the int8 kernels around it
    stay. The exception are int8 activations on x86, which are made uint8 only for one reader: such a kernel is
    replaced by its float equivalent, which differs where it rounds the other way.

    Args:
        runtime: Runs the models.
        original: The original's file.
        candidate: The optimized model's file; it takes the same inputs.
        feeds: Gives the same inputs each time it is called; shapes may change from feed to feed.
        tensors: The tensors to look at; None is all inputs and inner tensors of the main graph that hold floats.
        optimize: False turns all of ONNX Runtime's graph optimizations off, in both models.

    Returns:
        Tensor name -> error, in the order of the original's graph or of `tensors`.

    Raises:
        ModelError: A model cannot be read, or one of `tensors` is not in both.
        RuntimeFailure: ONNX Runtime refuses a model or a feed.
        WorkerDied: ONNX Runtime crashed or did not end in time.

    Example:
        >>> import numpy as np
        >>> from tempfile import mkdtemp
        >>> model = "<ir_version: 8, opset_import: ['' : 17]> g (float[N] x) => (float[N] y) { h = Abs(x) y = %s(h) }"
        >>> files = [Path(mkdtemp()) / "model.onnx" for _ in range(2)]
        >>> for file, op in zip(files, ("Relu", "Neg")):
        ...     onnx.save(onnx.parser.parse_model((model % op).replace("'", '"')), file)
        >>> feeds = lambda: [{"x": np.array([3.0, -4.0], np.float32)}]
        >>> with Runtime() as runtime:
        ...     {name: error.relative_error for name, error in layer_errors(runtime, *files, feeds).items()}
        {'x': 0.0, 'h': 0.0, 'y': 2.0}
    """
    protos = Model.load(original).proto(), Model.load(candidate).proto()
    pairs = tensor_pairs(*protos, tensors)
    axes = channel_axes(protos[0].graph)
    # Two names may stand for one pair, which is then looked at once.
    observers = {pair: TensorError(axes.get(name, -1)) for name, pair in pairs.items()}
    seen = runtime.observe_pair(original, candidate, feeds, observers, optimize=optimize)
    errors = {name: seen[pair] for name, pair in pairs.items()}
    return errors if tensors is not None else {name: error for name, error in errors.items() if error.shape is not None}


def tensor_pairs(
    original: onnx.ModelProto, candidate: onnx.ModelProto, tensors: Sequence[str] | None = None
) -> dict[str, tuple[str, str]]:
    """Find where two models show the tensors that they have by the same name.

    Args:
        original: The one model; external data need not be loaded.
        candidate: The other.
        tensors: Names; None is all that hold floats and can be seen without breaking an int8 kernel.

    Returns:
        Name -> (the tensor that shows it in the original, and in the candidate).

    Raises:
        ModelError: One of `tensors` is not in both.
    """
    views = GraphView(original.graph), GraphView(candidate.graph)
    names = _float_tensors(original, views[0]) if tensors is None else tensors
    pairs = {}
    for name in names:
        missing = next((what for what, view in zip(("original", "other model"), views, strict=True)
                        if not view.has(name)), None)  # fmt: skip
        if tensors is not None and missing is not None:
            message = f"the main graph of the {missing} has no tensor {name!r}; only a tensor of both has an error"
            raise ModelError(message)
        if missing is None and (tensors is not None or not any(view.is_inside_kernel(name) for view in views)):
            pairs[name] = views[0].shown(name), views[1].shown(name)
    return pairs


def channel_axes(graph: onnx.GraphProto) -> dict[str, int]:
    """The channel axis of each tensor: 1 behind convolutions, until a node that lays the data out anew; else -1."""
    images: set[str] = set()
    for node in graph.node:
        if node.op_type in IMAGES or (node.op_type not in ROWS and any(name in images for name in node.input)):
            images.update(node.output)
    return {name: 1 if name in images else -1 for node in graph.node for name in node.output if name}


class GraphView:
    """Look-ups in the main graph of a model: who makes a tensor, who reads it, which tensor shows its value.

    Args:
        graph: The main graph. What its nodes' subgraphs read of it counts as read.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in {*node.input, *captured(node)} - {""}:
                self.readers[name].append(node)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.constants.update(tensor.values.name for tensor in graph.sparse_initializer)
        self.inputs = [info.name for info in graph.input if info.name not in self.constants]
        self.outputs = {info.name for info in graph.output}
        self._given = set(self.inputs)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, other than a constant."""
        return name in self.makers or name in self._given

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer or made by a node from initializers alone."""
        node = self.makers.get(name)
        if node is None:
            return name in self.constants
        return all(source in self.constants for source in node.input if source) and not captured(node)

    def shown(self, name: str) -> str:
        """The tensor that a reader of `name` sees: itself, or what the Q and DQ that alone read it make of it."""
        readers = self._readers_all(name, "QuantizeLinear")
        for quantize in readers:
            for reader in self.readers.get(quantize.output[0], ()):
                if reader.op_type == "DequantizeLinear":
                    return str(reader.output[0])
        return name

    def is_inside_kernel(self, name: str) -> bool:
        """Whether a tensor is in the midst of what ONNX Runtime makes an int8 kernel of: seeing it would undo that."""
        maker, readers = self.makers.get(name), self.readers.get(name, ())
        if maker is None or len(readers) != 1 or name in self.outputs:
            return False
        reader = readers[0]
        dequantized = any(self._is_made_by(source, "DequantizeLinear") for source in maker.input)
        joins = reader.op_type in CLIPS or (reader.op_type == "Add" and maker.op_type == "MatMul")
        return dequantized and joins and bool(self._readers_all(reader.output[0], "QuantizeLinear"))

    def _is_made_by(self, name: str, op: str) -> bool:
        return name in self.makers and self.makers[name].op_type == op

    def _readers_all(self, name: str, op: str) -> list[onnx.NodeProto]:
        """The readers of a tensor, if they are all of one kind and it is no graph output."""
        readers = self.readers.get(name, [])
        return readers if name not in self.outputs and all(node.op_type == op for node in readers) else []


def captured(node: onnx.NodeProto) -> set[str]:
    """What the subgraphs of a node read; their own tensors are among it, which does no harm."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            names.update(info.name for info in graph.output)
            for inner in graph.node:
                names.update(inner.input)
                names |= captured(inner)
    return names


def _float_tensors(model: onnx.ModelProto, view: GraphView) -> list[str]:
    """The inputs and inner tensors of the main graph that hold floats, or may: their type is not known."""
    types = _types(model)
    names = [*view.inputs, *view.makers]
    return [name for name in names if not view.is_constant(name) and _may_hold_floats(types.get(name))]


def _may_hold_floats(kind: onnx.TypeProto | None) -> bool:
    if kind is None or kind.WhichOneof("value") is None:
        return True
    return kind.HasField("tensor_type") and kind.tensor_type.elem_type in {*FLOATS, TensorProto.UNDEFINED}


def _types(model: onnx.ModelProto) -> Mapping[str, onnx.TypeProto]:
    # Of a model that its own operators contradict, what it declares has to do.
    with contextlib.suppress(shape_inference.InferenceError, RuntimeError, ValueError):
        model = shape_inference.infer_shapes(model)
    graph = model.graph
    return {info.name: info.type for info in (*graph.value_info, *graph.input, *graph.output)}
