"""What a layer's input and output were seen to be, and what the scale that was chosen for them can say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.analysis import named_nodes
from onnxcomp.deviation import TensorError
from onnxcomp.model import Model
from onnxcomp.qdq import codes_dtype, codes_of, decoder, scale_of, zero_point_of

__all__ = ["ActivationRanges"]

QOPERATORS = {"QLinearConv": (1, 6), "QLinearMatMul": (1, 6)}
"""Operators that take and give codes -> the inputs with the scale of their input and of their output; zero points
follow."""


class ActivationRanges:
    """The scales of activations in a model, by layer.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        nodes = [node for graph in model.graphs() for node in graph.nodes if node.outputs]
        names = named_nodes(model)
        self._nodes = {names[id(node)]: node for node in nodes}
        self._quantizers = {str(node.inputs[0].name): node for node in nodes if node.op == "QuantizeLinear"}

    def of_layer(
        self,
        name: str,
        results: Iterable[str],
        seen: Mapping[str, TensorError | None],
        *,
        reads: str | None = None,
    ) -> list[dict[str, Any]]:
        """The ranges at a layer's input and output.

        Args:
            name: The layer's node.
            results: The layer's output, and what is computed of it before it is quantized.
            seen: "input" and "output" -> what the original has there, as far as it was looked at.
            reads: The node that takes the layer's input, where the layer was split into several.

        Returns:
            For each place of which something is known: `place`; `seen_low` and `seen_high`, the original's extremes on
            the samples; and where the new model has one scale for it `type`, `scale`, `zero_point` and, as `low` and
            `high`, the least and the largest number that it can say. What is not known is None.
        """
        node, reader = self._nodes.get(name), self._nodes.get(reads or name)
        ends = {
            "input": None if reader is None else _input_scale(reader),
            "output": None if node is None else self._output_scale(node, results),
        }
        found = []
        for place, scale in ends.items():
            error = seen.get(place)
            known = error is not None and error.low <= error.high
            if scale is None and not known:
                continue
            row: dict[str, Any] = {"place": place, "seen_low": None, "seen_high": None, **(scale or UNKNOWN)}
            if error is not None and known:
                row.update(seen_low=error.low, seen_high=error.high)
            found.append(row)
        return found

    def _output_scale(self, node: gs.Node, results: Iterable[str]) -> dict[str, Any] | None:
        if node.op in QOPERATORS:
            return _of_codes(node, QOPERATORS[node.op][1])
        quantizer = next((self._quantizers[name] for name in results if name in self._quantizers), None)
        return None if quantizer is None else _said(quantizer)


UNKNOWN = {"type": None, "scale": None, "zero_point": None, "low": None, "high": None}


def _input_scale(node: gs.Node) -> dict[str, Any] | None:
    if node.op in QOPERATORS:
        return _of_codes(node, QOPERATORS[node.op][0])
    makers = [decoder(tensor) for tensor in node.inputs[:2]]
    # The weight's codes are constant: what is computed is the data.
    data = next((maker for maker in makers if maker is not None and maker.inputs[0].inputs), None)
    return None if data is None else _said(data)


def _said(node: gs.Node) -> dict[str, Any] | None:
    """What the scale of a QuantizeLinear or DequantizeLinear can say; None where it has several, or computes it."""
    return _range(scale_of(node), zero_point_of(node), codes_dtype(node))


def _of_codes(node: gs.Node, place: int) -> dict[str, Any] | None:
    scale, zero = codes_of(node.inputs[place]), codes_of(node.inputs[place + 1])
    return _range(scale, zero, None if zero is None else zero.dtype.name)


def _range(scale: Any, zero_point: Any, dtype: str | None) -> dict[str, Any] | None:
    if scale is None or scale.size != 1 or dtype not in {"int8", "uint8", "int16", "uint16"}:
        return None
    step, zero = float(scale.reshape(-1)[0]), 0 if zero_point is None else int(np.asarray(zero_point).reshape(-1)[0])
    if not math.isfinite(step):
        return None
    limits = np.iinfo(dtype)
    low, high = (int(limits.min) - zero) * step, (int(limits.max) - zero) * step
    return {"type": dtype, "scale": step, "zero_point": zero, "low": low, "high": high}
