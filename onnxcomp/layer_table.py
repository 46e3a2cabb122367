"""The layers of two models side by side: what they compute, what runs them, and how far apart their results are."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import onnx
from onnx import inliner

from onnxcomp.analysis import WeightRow, weight_table
from onnxcomp.deviation import TensorError
from onnxcomp.layers import CLIPS, GraphView, layer_errors, tensor_pairs
from onnxcomp.macs import LAYER_OPERATORS
from onnxcomp.model import Model
from onnxcomp.runtime import Census, Feed, KernelNode, Runtime, explain
from onnxcomp.runtime.explain import kernel_source
from onnxcomp.shapes import Shape, traced_nodes

__all__ = ["LayerComparison", "LayerRow", "ModelLayers", "compared_layers", "layer_partners", "layer_rows"]

KERNELS = ("Conv", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Attention", "Einsum")
"""What the names of kernels that compute a layer hold."""

FUSED = frozenset({"Add", "Mul", "Div", "Sigmoid", "HardSigmoid", "Tanh", "LeakyRelu", "Elu"})
"""What a kernel may compute besides, as well as what a rewrite merges: residuals, scales, activations."""

BLOCKED = "_nchwc"
"""ONNX Runtime names a convolution in its blocked layout after the tensor that it writes, with this behind."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of two models.

    Attributes:
        name: The node's name in the original, or in the new model where only that has it.
        op: Its operator there.
        where: "both"; "original" or "new" where the other has no such layer.
        tensor: The tensor whose error is given: the layer's output, or that of the activation behind it where the two
            become one node. None where the models have none in common, so that no error is known.
        output_shape: For the first sample; None where it cannot be told.
        weight_shape: Of its largest weight, as the original stores it.
        weight_bytes_before: What that takes in the original; None without a weight of its own.
        weight_bytes_after: The same in the new model.
        kernel_before: The operator of ONNX Runtime's optimized graph that computes it in the original; None where it
            is part of another's.
        kernel_after: The same in the new model.
        reason: Why it has no sound int8 kernel in the new model although it is quantized there.
        sqnr_db: Signal-to-noise ratio of the tensor; infinite where it is equal. None without a tensor.
        error: Relative error of the tensor. None without a tensor.
        weight_before: The name of that weight in the original.
        weight_after: The name of what holds it in the new model.
        weight_type_before: The type that its largest weight, or that weight's codes, are stored as in the original.
        weight_type_after: The same in the new model.
        weight_zeros_before: Which share of that weight is zero in the original.
        weight_zeros_after: The same in the new model.
    """

    name: str
    op: str
    where: str
    tensor: str | None
    output_shape: Shape | None
    weight_shape: Shape | None
    weight_bytes_before: int | None
    weight_bytes_after: int | None
    kernel_before: str | None
    kernel_after: str | None
    reason: str | None
    sqnr_db: float | None
    error: float | None
    weight_before: str | None = None
    weight_after: str | None = None
    weight_type_before: str | None = None
    weight_type_after: str | None = None
    weight_zeros_before: float | None = None
    weight_zeros_after: float | None = None


@dataclass(frozen=True)
class _Layer:
    """A layer of one model.

    Attributes:
        tensors: Its output, then those of the nodes behind it that may be merged into it.
        inputs: What it reads.
        kernel_node: The name of the node of ONNX Runtime's optimized graph that computes it.
    """

    op: str
    tensors: tuple[str, ...]
    output_shape: Shape | None
    weight: WeightRow | None
    kernel: str | None
    reason: str | None
    inputs: tuple[str, ...] = ()
    kernel_node: str | None = None

    @property
    def weight_bytes(self) -> int | None:
        return self.weight.bytes if self.weight else None

    @property
    def weight_type(self) -> str | None:
        return self.weight.dtype if self.weight else None

    @property
    def weight_zeros(self) -> float | None:
        return self.weight.zeros / self.weight.elements if self.weight and self.weight.elements else None


class ModelLayers:
    """The convolutions, matrix products and recurrent layers of a model, by name, in the order of the graph.

    Args:
        model: The model; its weights are read one at a time.
        census: The kernels that run it.
        shapes: Sizes of its inputs.
        wide: The type of 16-bit activations that the target has kernels for, which no census shows.
    """

    def __init__(
        self, model: Model, census: Census, shapes: Mapping[str, Sequence[int]], *, wide: str | None = None
    ) -> None:
        proto = model.proto()
        missed = {miss.node: miss.reason for miss in explain(proto, census, wide=wide).missed}
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
        weights: dict[str, WeightRow] = {}
        for row in weight_table(model):
            largest = weights.get(row.node)
            if len(row.shape) > 1 and row.elements > (largest.elements if largest else 0):
                weights[row.node] = row
        view = GraphView(proto.graph)
        traced = [
            node
            for node in traced_nodes(proto, shapes)
            if node.node.op_type in LAYER_OPERATORS and any(node.node.output)
        ]
        chains = {layer.name: tuple(_chain(view, layer.node)) for layer in traced}
        kernels = _kernels(census, {layer.name: tuple(_chain(view, layer.node, FUSED)) for layer in traced})
        self.by_name: dict[str, _Layer] = {}
        self.by_tensor: dict[str, str] = {}
        for layer in traced:
            self.by_name[layer.name] = _Layer(
                op=layer.node.op_type,
                tensors=chains[layer.name],
                output_shape=layer.shapes[len(layer.node.input) + list(map(bool, layer.node.output)).index(True)],
                weight=weights.get(layer.name),
                kernel=kernels[layer.name].op if layer.name in kernels else None,
                reason=missed.get(layer.name),
                inputs=tuple(name for name in layer.node.input if view.has(name)),
                kernel_node=kernels[layer.name].name if layer.name in kernels else None,
            )
            for tensor in chains[layer.name]:
                self.by_tensor.setdefault(tensor, layer.name)

    def inputs(self, known: Container[str]) -> dict[str, list[str]]:
        """Layer -> those of `known` among what it reads; the first is what its weight is multiplied with."""
        return {name: [tensor for tensor in layer.inputs if tensor in known] for name, layer in self.by_name.items()}

    def results(self, known: Container[str]) -> list[str]:
        """The tensor that stands for each layer: the first of `known` among its output and those behind it."""
        firsts = (next((name for name in layer.tensors if name in known), None) for layer in self.by_name.values())
        return list(dict.fromkeys(name for name in firsts if name is not None))


@dataclass(frozen=True)
class LayerComparison:
    """The layers of two models, and how far apart tensors of both are.

    Attributes:
        original: The one model's layers.
        new: The other's.
        errors: Tensor name -> error.
    """

    original: ModelLayers
    new: ModelLayers
    errors: Mapping[str, TensorError]

    @cached_property
    def rows(self) -> list[LayerRow]:
        """The rows, as `layer_rows` gives them."""
        return layer_rows(self.original, self.new, self.errors)

    def name_in_new(self, row: LayerRow) -> str | None:
        """What the new model calls a row's layer; None where it has no such layer."""
        return row.name if row.where == "new" else self._partners.get(row.name)

    @cached_property
    def _partners(self) -> dict[str, str]:
        return dict(layer_partners(self.original, self.new))


def compared_layers(
    runtime: Runtime,
    layers: tuple[ModelLayers, ModelLayers],
    models: tuple[Model, Model],
    paths: tuple[Path, Path],
    feeds: Callable[[], Iterable[Feed]],
) -> LayerComparison:
    """Measure the errors of what the layers of an original read and give.

    Args:
        runtime: Runs the models.
        layers: Those of the original and of the new model.
        models: The two models.
        paths: Their files.
        feeds: Gives the same inputs each time it is called.

    Raises:
        OnnxcompError: ONNX Runtime cannot show the tensors between the layers.
    """
    known = tensor_pairs(models[0].proto(), models[1].proto())
    tensors = dict.fromkeys([*layers[0].results(known), *chain.from_iterable(layers[0].inputs(known).values())])
    return LayerComparison(*layers, layer_errors(runtime, *paths, feeds, list(tensors)))


def layer_rows(original: ModelLayers, new: ModelLayers, errors: Mapping[str, TensorError]) -> list[LayerRow]:
    """Put the layers of two models side by side, the least signal-to-noise ratio first.

    Layers belong together that have the same name, or else that write the same tensor.

    Args:
        original: The one model's layers.
        new: The other's.
        errors: Tensor name -> error, as `onnxcomp.layers.layer_errors` gives it.

    Returns:
        A row for each layer of the original and each further one of the new model. Those without an error come last,
        in the order of the graphs.
    """
    partners = dict(layer_partners(original, new))
    taken = set(partners.values())
    rows = []
    for name, layer in original.by_name.items():
        other = new.by_name.get(partners.get(name, ""))
        tensor = next((tensor for tensor in layer.tensors if tensor in errors), None) if other else None
        rows.append(_row(name, layer, other, "both" if other else "original", tensor, errors))
    rows += [_row(name, layer, layer, "new", None, errors) for name, layer in new.by_name.items() if name not in taken]
    return sorted(rows, key=lambda row: (row.sqnr_db is None, row.sqnr_db or 0.0))


def _row(
    name: str,
    layer: _Layer,
    other: _Layer | None,
    where: str,
    tensor: str | None,
    errors: Mapping[str, TensorError],
) -> LayerRow:
    before = layer if where != "new" else None
    return LayerRow(
        name=name,
        op=layer.op,
        where=where,
        tensor=tensor,
        output_shape=layer.output_shape,
        weight_shape=layer.weight.shape if layer.weight else None,
        weight_bytes_before=before.weight_bytes if before else None,
        weight_bytes_after=other.weight_bytes if other else None,
        kernel_before=before.kernel if before else None,
        kernel_after=other.kernel if other else None,
        reason=other.reason if other else None,
        sqnr_db=errors[tensor].sqnr_db if tensor is not None else None,
        error=errors[tensor].relative_error if tensor is not None else None,
        weight_before=before.weight.name if before and before.weight else None,
        weight_after=other.weight.name if other and other.weight else None,
        weight_type_before=before.weight_type if before else None,
        weight_type_after=other.weight_type if other else None,
        weight_zeros_before=before.weight_zeros if before else None,
        weight_zeros_after=other.weight_zeros if other else None,
    )


def layer_partners(original: ModelLayers, new: ModelLayers) -> Iterator[tuple[str, str]]:
    """Layers of the original and of the new model that belong together; each of them once."""
    same = original.by_name.keys() & new.by_name.keys()
    yield from ((name, name) for name in same)
    taken = set(same)
    for name, layer in original.by_name.items():
        if name in same:
            continue
        found = next((new.by_tensor[tensor] for tensor in layer.tensors if tensor in new.by_tensor), None)
        if found is not None and found not in taken:
            taken.add(found)
            yield name, found


def _chain(view: GraphView, node: onnx.NodeProto, fused: Container[str] = ()) -> Iterator[str]:
    """A node's output, and what the nodes that alone read it make of it: those that a rewrite merges, and `fused`."""
    name = next(filter(None, node.output))
    while True:
        yield name
        readers = view.readers.get(name, [])
        if len(readers) != 1 or not readers[0].output:
            return
        if readers[0].op_type not in fused and not _is_merged(view, readers[0]):
            return
        name = readers[0].output[0]


def _is_merged(view: GraphView, node: onnx.NodeProto) -> bool:
    if node.op_type in {"Add", "Mul"}:
        return any(view.is_constant(name) for name in node.input)
    return node.op_type in {*CLIPS, "BatchNormalization", "Identity", "QuantizeLinear", "DequantizeLinear"}


def _kernels(census: Census, chains: Mapping[str, Iterable[str]]) -> dict[str, KernelNode]:
    """Layer -> the kernel that computes it: one named after it, or one that writes its tensors."""
    computing = [node for node in census.nodes if any(part in node.op for part in KERNELS)]
    named: dict[str, KernelNode] = {}
    writing: dict[str, KernelNode] = {}
    for node in computing:
        named.setdefault(kernel_source(node.name, chains), node)
        for tensor in (*node.outputs, node.name.removesuffix(BLOCKED)):
            writing.setdefault(tensor, node)
    found = {}
    for name, tensors in chains.items():
        kernel = named.get(name) or next((writing[tensor] for tensor in tensors if tensor in writing), None)
        if kernel is not None:
            found[name] = kernel
    return found
