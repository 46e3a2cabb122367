"""Scales that are learnt, and those that follow from them.

An int32 bias has the product of its layer's input and weight scales, or kernels that add it to int32 sums compute wrong
values: where those two are learnt it follows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from torch import Tensor

from onnxcomp.torch_bridge.plan import Step
from onnxcomp.torch_bridge.registry import NodeCall
from onnxcomp.torch_bridge.weights import FLOATS, SCALES, Held, kind_of, value_of_node

__all__ = ["find_scales", "following"]

BIASED = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Product:
    """A bias scale: the scales of its layer's input and weight, by name."""

    first: str
    second: str


def find_scales(constants: Sequence[Held]) -> tuple[set[str], dict[str, Product]]:
    """The scales that may be learnt, and those that follow from others.

    A scale of int32 values which is no such product is left as it is, and so are the scales it would have to follow.

    Returns:
        Names of scales; for each that follows, what it is the product of.
    """
    scales = {held.name: held for held in constants if _is_scale(held)}
    of_bias = {name for name, held in scales.items() if any(_is_of_int32(reading.node) for reading in held.readers)}
    learnt = scales.keys() - of_bias
    products: dict[str, Product] = {}
    for name in of_bias:
        found = {product for reading in scales[name].readers for product in _products(reading.node)}
        first = next(iter(found), Product("", ""))
        if len(found) == 1 and first.first and first.second:
            products[name] = first
        else:
            learnt -= {part for each in found for part in (each.first, each.second)}
    while lost := {name: each for name, each in products.items() if not {each.first, each.second} <= learnt}:
        learnt -= {part for each in lost.values() for part in (each.first, each.second)}
        products = {name: each for name, each in products.items() if name not in lost}
    return learnt, dict(sorted(products.items()))


def _is_scale(held: Held) -> bool:
    """Whether a constant is a float scale of quantized values and of nothing else."""
    all_scales = all(SCALES.get(reading.node.op) == reading.index for reading in held.readers)
    return bool(held.readers) and kind_of(held) in FLOATS and all_scales


def _is_of_int32(node: gs.Node) -> bool:
    codes = value_of_node(node.inputs[0]) or node.inputs[0]
    return codes.dtype is not None and np.dtype(codes.dtype) == np.int32


def _products(node: gs.Node) -> set[Product]:
    """What the scale of a DequantizeLinear of a bias is the product of, for each layer; what is not seen is empty."""
    found = set()
    for layer in node.outputs[0].outputs:
        biased = layer.op in BIASED and len(layer.inputs) > 2 and layer.inputs[2] is node.outputs[0]
        found.add(Product(*map(_scale_of, layer.inputs[:2])) if biased else Product("", ""))
    return found


def _scale_of(tensor: gs.Tensor) -> str:
    """The name of the constant scale of what a DequantizeLinear gives; empty where it is none."""
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if maker is None or maker.op != "DequantizeLinear":
        return ""
    scale = maker.inputs[1]
    return str(scale.name) if isinstance(scale, gs.Constant) or value_of_node(scale) is not None else ""


def following(products: Mapping[str, Product], shapes: Mapping[str, tuple[int, ...]]) -> list[Step]:
    """The steps that compute the scales which follow from others."""

    def multiply(call: NodeCall, one: Tensor, other: Tensor) -> Tensor:
        return (one.reshape(-1) * other.reshape(-1)).expand(shapes[call.name] or (1,)).reshape(shapes[call.name])

    return [
        Step(multiply, NodeCall(name, "Mul"), (product.first, product.second), (name,))
        for name, product in products.items()
    ]
