"""Traps in the biases of quantized layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxcomp.lints.finding import Seen, Subject, lint
from onnxcomp.qdq import (
    QuantizedLayer,
    codes_dtype,
    encoder,
    is_constant,
    product_scale,
    quantized_layers,
    scale_of,
    zero_point_of,
)

__all__ = ["has_float_bias", "same_steps"]

BIAS_TOLERANCE = 0.01
"""Relative: ONNX Runtime takes 1.1% for equal and refuses 2%, where it looks at all."""


def _layers(subject: Subject) -> Iterator[QuantizedLayer]:
    """Of all graphs: a kernel saturates in the body of an If, too."""
    for graph in subject.model.graphs() if subject.model is not None else ():
        yield from quantized_layers(graph)


@lint(
    "bias-scale",
    "error",
    why="int8 kernels add the bias's codes to sums of products unseen: what they compute is not what the graph says",
    fix="hold the bias in the scale of the input times that of the weight",
    mended_by="fit-target",
)
def bias_scale(subject: Subject) -> Seen:
    """An int32 bias in another scale than that of the products, or with a zero point."""
    for layer in _layers(subject):
        wanted = product_scale(layer)
        bias = None if layer.bias is None else scale_of(layer.bias)
        if layer.bias is None or bias is None or wanted is None or codes_dtype(layer.bias) != "int32":
            continue
        zero = zero_point_of(layer.bias)
        if zero is not None and np.any(zero):
            yield layer.name, f"its bias has the zero point {int(zero.ravel()[np.argmax(zero.ravel() != 0)])}"
        elif not same_steps(bias, wanted, BIAS_TOLERANCE):
            first = float(wanted.ravel()[0])
            yield layer.name, f"its bias has the scale {float(bias.ravel()[0]):.4g}, the products have {first:.4g}"


def same_steps(scale: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], tolerance: float) -> bool:
    """Whether a bias's scales are those of the products, where one may stand for many."""
    fits = scale.size == wanted.size or 1 in {scale.size, wanted.size}
    return fits and bool(np.allclose(scale.ravel(), wanted.ravel(), rtol=tolerance, atol=0))


@lint(
    "float-bias",
    "warning",
    why="ONNX Runtime rounds it to int32 with the scale of the products when it loads the model, other runtimes may "
    "not: what is verified here is not what runs there; where that scale is tiny, it overflows",
    fix="write the bias as int32 with a DequantizeLinear of that scale",
    mended_by="fit-target",
)
def float_bias(subject: Subject) -> Seen:
    """A float bias in a quantized layer."""
    for layer in _layers(subject):
        if has_float_bias(layer):
            yield layer.name, "its bias is float"


def has_float_bias(layer: QuantizedLayer) -> bool:
    """Whether a layer that gives codes has a constant float bias, which its int8 kernel would round."""
    inputs = layer.node.inputs
    if layer.node.op == "MatMul" or len(inputs) < 3 or not inputs[2].name or not is_constant(inputs[2]):
        return False
    return _writes_codes(layer) and product_scale(layer) is not None


def _writes_codes(layer: QuantizedLayer) -> bool:
    """Whether the layer's result is quantized, be it behind a Relu or Clip."""
    readers = layer.node.outputs[0].outputs
    if len(readers) == 1 and readers[0].op in {"Relu", "Clip"}:
        readers = readers[0].outputs[0].outputs
    return any(encoder(output) is not None for reader in readers for output in reader.outputs[:1])
