"""What a layer costs, whole and in factors: multiply-accumulates, and milliseconds where ONNX Runtime can be asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp.shapes import traced_nodes
from onnxcomp.weights import Spool
from onnxcomp_passes._conv_factors import ConvFactors
from onnxcomp_passes._conv_forms import factor_shapes
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._thin_graph import Factors, MatrixFactors, put_factors
from onnxcomp_passes._thin_layers import Unit, find_units

__all__ = ["LayerTimes", "Sizes", "layer_macs", "layer_sizes"]

Array = np.ndarray[Any, Any]

ROUNDS = 25
SECONDS = 0.1
"""Enough to tell a layer that gains from one that does not."""


@dataclass(frozen=True)
class Sizes:
    """What a node reads and writes.

    Attributes:
        data: The shape of the input that is no weight.
        output: The shape of the output.
    """

    data: tuple[int, ...]
    output: tuple[int, ...]


def layer_sizes(model: Model, units: Sequence[Unit], shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Sizes]]:
    """The sizes of each unit's nodes, by its name, part by part; units with unknown ones are left out.

    Args:
        model: The model.
        units: Of it.
        shapes: Of the model's inputs.
    """
    seen = {
        traced.node.output[0]: (traced.shapes[: len(traced.node.input)], traced.shapes[len(traced.node.input)])
        for traced in traced_nodes(model.proto(), shapes)
        if traced.node.output
    }
    found = {}
    for unit in units:
        sizes = []
        for part in unit.parts:
            for reader in part.readers:
                inputs, output = seen.get(str(reader.outputs[0].name), ([], None))
                data = inputs[1 - part.view.index] if len(inputs) > 1 else None
                if data is not None and output is not None and all(map(_is_size, (*data, *output))):
                    sizes.append(Sizes(tuple(map(int, data)), tuple(map(int, output))))
        if len(sizes) == sum(len(part.readers) for part in unit.parts):
            found[unit.name] = sizes
    return found


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and size > 0


def layer_macs(unit: Unit, sizes: Sequence[Sizes], thin: Thin | None = None) -> int:
    """Multiply-accumulates of a unit; with `thin` what they would be."""
    groups, inputs, outputs = unit.sizes
    node = unit.node
    if node.op == "Gather":
        return 0 if thin is None else sum(math.prod(each.output) for each in sizes) * thin.ranks[0]
    dense = sum(math.prod(each.output) for each in sizes) * inputs
    if thin is None:
        return dense
    if thin.form == "svd":
        return dense * thin.parameters(unit) // (groups * inputs * outputs)
    shapes = factor_shapes(thin.form, unit.parts[0].view.shape, groups, thin.ranks)
    factors = ConvFactors(thin.form, groups, tuple(np.zeros(shape, np.float32) for shape in shapes))
    return sum(each.data[0] * factors.macs(each.data[2:], each.output[2:]) for each in sizes)


@dataclass
class LayerTimes:
    """Times single layers; equal ones once.

    Attributes:
        runtime: ONNX Runtime.
        workdir: For the models of single layers.
    """

    runtime: Runtime
    workdir: Path
    _known: dict[Any, float] = field(default_factory=dict)

    def measure(self, unit: Unit, sizes: Sequence[Sizes], thin: Thin) -> tuple[float, float]:
        """Milliseconds of a unit as it is, and what share of these its factors take, timed in turn."""
        key = _signature(unit, sizes)
        if (key, str(thin)) not in self._known:
            proto, feed = _alone(unit, sizes)
            paths = [self.workdir / "layer_dense.onnx", self.workdir / "layer_thin.onnx"]
            model = Model.load(proto)
            model.save(paths[0], durable=False)
            [whole] = find_units(model, Context(), Changes())
            put_factors(model, whole, _random_factors(whole, thin), Spool())
            model.save(paths[1], durable=False)
            try:
                times = self.runtime.time(paths, feed, min_rounds=ROUNDS, max_rounds=1000, seconds=SECONDS)
            finally:
                for path in paths:
                    path.unlink()
            self._known[key, str(thin)] = times[1].median_ms / times[0].median_ms
            self._known.setdefault(key, times[0].median_ms)
        return self._known[key], self._known[key, str(thin)]


def _signature(unit: Unit, sizes: Sequence[Sizes]) -> Any:
    """Equal for layers that take equally long."""
    attrs = tuple(sorted((name, str(value)) for name, value in unit.node.attrs.items()))
    shapes = tuple(part.view.shape for part in unit.parts)
    return unit.node.op, unit.parts[0].view.index, attrs, shapes, tuple(sizes), str(unit.parts[0].view.holder.dtype)


def _alone(unit: Unit, sizes: Sequence[Sizes]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of a unit's nodes with random weights, and random inputs for it."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(unit.parts[0].view.holder.dtype)
    onnx_type = helper.np_dtype_to_tensor_dtype(dtype)
    nodes, weights, outputs = [], [], []
    for number, part in enumerate(unit.parts):
        node = part.view.node
        values = rng.standard_normal(part.view.shape, np.float32) / math.sqrt(unit.sizes[1])
        weights.append(numpy_helper.from_array(values.astype(dtype), f"w{number}"))
        inputs = ["x", f"w{number}"] if part.view.index else [f"w{number}", "x"]
        attrs = {name: value for name, value in node.attrs.items() if node.op != "Gemm" or name.startswith("trans")}
        nodes.append(helper.make_node(node.op, inputs, [f"y{number}"], name=f"n{number}", **attrs))
        outputs.append(helper.make_tensor_value_info(f"y{number}", onnx_type, None))
    feed: dict[str, Array] = {}
    if unit.node.op == "Gather":
        feed["x"] = rng.integers(0, unit.parts[0].view.shape[0], sizes[0].data)
        onnx_type = onnx.TensorProto.INT64
    else:
        feed["x"] = rng.standard_normal(sizes[0].data, np.float32).astype(dtype)
    given = helper.make_tensor_value_info("x", onnx_type, sizes[0].data)
    graph = helper.make_graph(nodes, "layer", [given], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), feed


def _random_factors(unit: Unit, thin: Thin) -> Factors:
    """Factors of the right shapes."""
    rng = np.random.default_rng(1)
    groups, inputs, outputs = unit.sizes
    if unit.node.op == "Conv":
        part = unit.parts[0]
        shapes = factor_shapes(thin.form, part.view.shape, groups, thin.ranks)
        return ConvFactors(thin.form, groups, tuple(rng.standard_normal(shape, np.float32) for shape in shapes))
    shape = (groups, inputs, thin.ranks[0]), (groups, thin.ranks[0], outputs)
    first, second = (rng.standard_normal(each, np.float32) / math.sqrt(each[1]) for each in shape)
    return MatrixFactors(first, second)
