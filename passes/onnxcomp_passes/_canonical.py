"""Says a float model with the operators that int8 kernels and ONNX Runtime's fusions know; it computes the same.

::

    HardSwish(x)                                   Mul(x, HardSigmoid(x))
    Div(Clip(Add(x, 3), 0, 6), 6)                  HardSigmoid(x)
    Div(Mul(x, Clip(Add(x, 3), 0, 6)), 6)          Mul(x, HardSigmoid(x))
    ReduceMean(x), over the pixels                 GlobalAveragePool(x)
    AveragePool(x), over all pixels                GlobalAveragePool(x)
    AveragePool(x), right behind a convolution     Conv(x, 1 / size of the window), depthwise
    Relu(MaxPool(x))                               MaxPool(Relu(x))
    Add(MatMul(x, W), bias)                        Gemm(x, W, bias), between Flatten and Reshape; where shapes are known
    LayerNormalization(Add(x, y))                  LayerNormalization(Sum(x, y))

ONNX Runtime's int8 AveragePool takes ten times as long as such a Conv, whose weight is exact in int8. Where it knows
the shape of x, it makes a Gemm of a MatMul and its bias by itself, which stays float if the bias does not look as the
int8 kernel wants it; elsewhere it adds the bias in float, or with a Gelu, and all is well. Of an Add before a
LayerNormalization it makes a SkipLayerNormalization, which takes four times as long as the two alone (1.32); not of a
Sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp.passes import Context
from onnxcomp.shapes import traced_nodes
from onnxcomp_passes._companions import clip_low
from onnxcomp_passes._shapes import KnownTensors, infer_known
from onnxcomp_passes._stored import find_stored

__all__ = ["canonicalize"]

Array = np.ndarray[Any, Any]

PIXELS = [2, 3]

BEFORE_POOL = frozenset({"Conv", "Add", "Concat", "MaxPool", "Mul"})
"""What makes the input of an AveragePool that is worth a Conv, with or without a Relu in between."""

CLOSE = 1e-4
"""Relative: constants are exported with five digits, such as 0.16667 for 1 / 6."""


def canonicalize(model: Model, context: Context) -> None:
    """Rewrite the main graph of a model in place; excluded nodes stay as they are.

    Args:
        model: Of operator set 13 or later.
        context: Says which nodes are excluded.
    """
    work = _Rewriter(model, context)
    for node in list(model.graph.nodes):
        if node.outputs and not node.domain and not context.excludes(node):
            work.rewrite(node)
    work.finish()


class _Rewriter:
    """One model while it is rewritten."""

    def __init__(self, model: Model, context: Context) -> None:
        self._model = model
        self._context = context
        self._known: KnownTensors = infer_known(model)
        self._traced = _static_shapes(model)
        self._seen_from_outside = {tensor.name for graph in model.graphs() for tensor in graph.outputs}
        self._before: dict[int, list[gs.Node]] = {}
        self._after: dict[int, list[gs.Node]] = {}
        self._gone: set[int] = set()
        self._rows: dict[int, gs.Tensor] = {}

    def rewrite(self, node: gs.Node) -> None:
        """Apply the rule for a node's operator."""
        if id(node) in self._gone:
            return
        if not self._is_float32(node.outputs[0]):
            return
        if node.op == "HardSwish":
            self._gate(node, node.inputs[0], 1 / 6, 0.5)
        elif node.op in {"Div", "Mul"}:
            self._hard_sigmoid(node)
        elif node.op == "ReduceMean":
            self._mean_of_pixels(node)
        elif node.op == "AveragePool":
            self._average(node)
        elif node.op == "Relu":
            self._relu_first(node)
        elif node.op == "Add":
            self._add(node)

    def finish(self) -> None:
        """Put the new nodes into the graph, in topological order, and take those out that nothing needs."""
        nodes = []
        for node in self._model.graph.nodes:
            nodes += [*self._before.get(id(node), ()), node, *self._after.get(id(node), ())]
        for node in nodes:
            if id(node) in self._gone:
                node.inputs.clear()
                node.outputs.clear()
        self._model.graph.nodes = [node for node in nodes if id(node) not in self._gone]

    # --- looking ------------------------------------------------------------------------------------------------------

    def _maker(self, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
        """The node that writes a tensor for one reader alone, if it is one of these operators."""
        if len(tensor.inputs) != 1 or len(tensor.outputs) != 1 or tensor.name in self._seen_from_outside:
            return None
        maker = tensor.inputs[0]
        usable = maker.op in ops and not maker.domain and len(maker.outputs) == 1 and not self._context.excludes(maker)
        return maker if usable else None

    def _dims(self, tensor: gs.Tensor) -> tuple[int | str, ...] | None:
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        found = self._known.get(id(tensor))
        dims = found[1].dims if found else None
        return self._traced.get(tensor.name, dims)

    def _is_float32(self, tensor: gs.Tensor) -> bool:
        found = self._known.get(id(tensor))
        return found is not None and found[1].dtype == np.float32

    @staticmethod
    def _scalar(tensor: gs.Tensor | None) -> float | None:
        if not isinstance(tensor, gs.Constant) or tensor.dtype != np.float32 or tuple(tensor.shape) not in {(), (1,)}:
            return None
        return float(value_of(tensor).item())

    def _split(self, node: gs.Node) -> tuple[gs.Tensor, gs.Tensor] | None:
        """The computed and the constant operand of a node with one of each."""
        if len(node.inputs) != 2:
            return None
        first, second = node.inputs
        if isinstance(second, gs.Constant) and not isinstance(first, gs.Constant):
            return first, second
        if isinstance(first, gs.Constant) and not isinstance(second, gs.Constant) and node.op != "Div":
            return second, first
        return None

    # --- hard sigmoids ------------------------------------------------------------------------------------------------

    def _gate(self, node: gs.Node, x: gs.Tensor, alpha: float, beta: float, data: gs.Tensor | None = None) -> None:
        """Make of a node Mul(data, HardSigmoid(x))."""
        result = Variable(self._model.unique_name("h.0"), dtype=np.float32)
        gate = Node("HardSigmoid", self._model.unique_name("gate.0"), {"alpha": alpha, "beta": beta}, [x], [result])
        self._before.setdefault(id(node), []).append(gate)
        node.op, node.attrs = "Mul", {}
        node.inputs.clear()
        node.inputs.extend([x if data is None else data, result])

    def _hard_sigmoid(self, node: gs.Node) -> None:
        """Of Div(Clip(Add(x, 3), 0, 6), 6), or of the same with a Mul by x before the Div."""
        parts = self._split(node)
        factor = None if parts is None else self._scalar(parts[1])
        if parts is None or factor is None or factor <= 0:
            return
        factor = 1 / factor if node.op == "Div" else factor
        product = self._maker(parts[0], "Mul")
        for source in [parts[0]] if product is None else list(product.inputs):
            found = self._clipped_sum(source, factor)
            if found is None:
                continue
            x, beta, nodes = found
            if product is None:
                node.op, node.attrs = "HardSigmoid", {"alpha": factor, "beta": beta}
                node.inputs.clear()
                node.inputs.append(x)
            else:
                data = next((tensor for tensor in product.inputs if tensor is not source), source)
                self._gate(node, x, factor, beta, data)
                nodes = [*nodes, product]
            self._gone.update(map(id, nodes))
            return

    def _clipped_sum(self, tensor: gs.Tensor, factor: float) -> tuple[gs.Tensor, float, list[gs.Node]] | None:
        """Of Clip(Add(x, c), 0, 1 / factor): x and factor * c, and the two nodes."""
        clip = self._maker(tensor, "Clip")
        if clip is None or clip_low(clip) != 0.0:
            return None
        high = clip.attrs.get("max", self._scalar(clip.inputs[2]) if len(clip.inputs) > 2 else None)
        total = self._maker(clip.inputs[0], "Add")
        parts = None if total is None else self._split(total)
        if high is None or total is None or parts is None or abs(high * factor - 1) > CLOSE:
            return None
        offset = self._scalar(parts[1])
        return None if offset is None else (parts[0], offset * factor, [clip, total])

    # --- pooling ------------------------------------------------------------------------------------------------------

    def _mean_of_pixels(self, node: gs.Node) -> None:
        axes = node.attrs.get("axes")
        if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
            axes = value_of(node.inputs[1]).reshape(-1).tolist()
        dims = self._dims(node.inputs[0])
        if axes is None or dims is None or len(dims) != 4:
            return
        if sorted(axis % 4 for axis in axes) != PIXELS:
            return
        keeps = node.attrs.get("keepdims", 1)
        node.op, node.attrs = "GlobalAveragePool", {}
        while len(node.inputs) > 1:
            node.inputs.pop()
        if not keeps:
            pooled, result = Variable(self._model.unique_name("p.0"), dtype=np.float32), node.outputs[0]
            node.outputs[0] = pooled
            flat = Node("Flatten", self._model.unique_name("flatten.0"), {"axis": 1}, [pooled], [result])
            self._after.setdefault(id(node), []).append(flat)

    def _average(self, node: gs.Node) -> None:
        """Make something else of an AveragePool over images: ONNX Runtime's int8 kernel for it is slow."""
        window, dims = node.attrs.get("kernel_shape", []), self._dims(node.inputs[0])
        pads, strides = node.attrs.get("pads", [0] * 4), node.attrs.get("strides", [1, 1])
        odd = node.attrs.get("ceil_mode", 0) or any(step != 1 for step in node.attrs.get("dilations", []))
        if dims is None or len(dims) != 4 or len(window) != 2 or odd:
            return
        if node.attrs.get("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
            return
        if not any(pads) and list(dims[2:]) == list(window):
            node.op, node.attrs = "GlobalAveragePool", {}
            return
        makers = node.inputs[0].inputs
        behind = makers[0].inputs[0].inputs if makers and makers[0].op in {"Relu", "Clip"} else makers
        if not isinstance(dims[1], int) or not behind or behind[0].op not in BEFORE_POOL:
            return
        if any(pads) and not node.attrs.get("count_include_pad", 0):
            sizes = [dim for dim in dims[2:] if isinstance(dim, int)]
            if len(sizes) < 2 or any(pad >= size for pad, size in zip(pads, [*window, *window], strict=True)):
                return
            counts = [_counts(sizes[i], window[i], strides[i], pads[i], pads[i + 2]) for i in range(2)]
            self._times(node, window[0] * window[1] / np.outer(*counts))
        node.op = "Conv"
        node.attrs = {"group": dims[1], "kernel_shape": list(window), "pads": list(pads), "strides": list(strides)}
        weight = np.full((dims[1], 1, *window), 1 / (window[0] * window[1]), np.float32)
        node.inputs.append(gs.Constant(self._model.unique_name("w.0"), weight))

    def _times(self, node: gs.Node, factors: Array) -> None:
        """Multiply what a node gives for each pixel: the padding counts there, and must not."""
        pooled, result = Variable(self._model.unique_name("p.0"), dtype=np.float32), node.outputs[0]
        node.outputs[0] = pooled
        constant = gs.Constant(self._model.unique_name("k.0"), factors.astype(np.float32)[None, None])
        name = self._model.unique_name("pool.0")
        self._after.setdefault(id(node), []).append(Node("Mul", name, {}, [pooled, constant], [result]))

    def _relu_first(self, node: gs.Node) -> None:
        """Swap a Relu with the MaxPool before it, where it then is right behind a layer."""
        pool = self._maker(node.inputs[0], "MaxPool")
        if pool is None or self._maker(pool.inputs[0], "Conv", "Add") is None:
            return
        x, result = pool.inputs[0], node.outputs[0]
        middle = Variable(self._model.unique_name("r.0"), dtype=np.float32)
        node.outputs[0] = middle
        pool.outputs[0] = result
        node.inputs[0], pool.inputs[0] = x, middle
        self._before.setdefault(id(pool), []).append(node)
        self._model.graph.nodes.remove(node)

    # --- sums ---------------------------------------------------------------------------------------------------------

    def _add(self, node: gs.Node) -> None:
        parts = self._split(node)
        product = None if parts is None else self._maker(parts[0], "MatMul")
        if parts is not None and product is not None:
            self._gemm(node, product, parts[1])
        readers = {reader.op for reader in node.outputs[0].outputs}
        if node.op == "Add" and ("LayerNormalization" in readers or {"ReduceMean", "Sub"} <= readers):
            node.op = "Sum"

    def _gemm(self, node: gs.Node, product: gs.Node, bias: gs.Constant) -> None:
        """Make a Gemm of a MatMul and the Add of its bias."""
        x, weight = product.inputs
        stored = find_stored(weight)
        held = stored.codes if stored else weight
        shape: tuple[int, ...] = tuple(held.shape) if isinstance(held, gs.Constant) else ()
        if isinstance(x, gs.Constant) or len(shape) != 2 or bias.dtype != np.float32:
            return
        source, dims = x, self._dims(x)
        if tuple(bias.shape) == (1, shape[1]):
            bias = gs.Constant(self._model.unique_name("b.0"), value_of(bias).reshape(-1))
        if tuple(bias.shape) != (shape[1],) or dims is None:
            return
        if len(dims) != 2 and not all(isinstance(dim, int) for dim in dims):
            return
        if len(dims) != 2:
            source, result = self._flat(product, x), node.outputs[0]
            node.outputs[0] = Variable(self._model.unique_name("g.0"), dtype=np.float32)
            inputs = [node.outputs[0], self._ints([*map(int, dims[:-1]), shape[1]])]
            name = self._model.unique_name("reshape.0")
            self._after.setdefault(id(node), []).append(Node("Reshape", name, {}, inputs, [result]))
        node.op, node.name, node.attrs = "Gemm", product.name, {}
        node.inputs.clear()
        node.inputs.extend([source, weight, bias])
        self._gone.add(id(product))

    def _flat(self, before: gs.Node, x: gs.Tensor) -> gs.Tensor:
        """The rows of a tensor, as a matrix; one for all that read it."""
        if id(x) not in self._rows:
            flat = Variable(self._model.unique_name("g.0"), dtype=np.float32)
            node = Node("Flatten", self._model.unique_name("flatten.0"), {"axis": -1}, [x], [flat])
            self._before.setdefault(id(before), []).append(node)
            self._rows[id(x)] = flat
        return self._rows[id(x)]

    def _ints(self, values: list[int]) -> gs.Constant:
        return gs.Constant(self._model.unique_name("n.0"), np.asarray(values, np.int64))


def _static_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors where those of all inputs are fixed: ONNX Runtime then computes shapes too."""
    dims = [dim for tensor in model.graph.inputs for dim in (tensor.shape if tensor.shape is not None else [None])]
    if not all(isinstance(dim, int) and dim > 0 for dim in dims):
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for traced in traced_nodes(model.proto(), {}):
        for name, shape in zip((*traced.node.input, *traced.node.output), traced.shapes, strict=True):
            if name and shape is not None:
                shapes.setdefault(name, shape)
    return shapes


def _counts(size: int, window: int, stride: int, before: int, after: int) -> Array:
    """How many pixels each window covers along one axis, padding not counted."""
    starts = np.arange((size + before + after - window) // stride + 1) * stride - before
    return np.minimum(starts + window, size) - np.maximum(starts, 0)
