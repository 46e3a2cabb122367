"""Scales that are learnt, and those that follow from them.

An int32 bias has the product of its layer's input and weight scales, or kernels that add it to int32 sums compute wrong
values: where those two are learnt it follows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from torch import Tensor

from onnxcomp.torch_bridge.plan import Step
from onnxcomp.torch_bridge.registry import NodeCall
from onnxcomp.torch_bridge.weights import FLOATS, SCALES, Held, kind_of

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
    for name in sorted(of_bias):
        found = {_product(reading.node) for reading in scales[name].readers}
        parts = {part for each in found if each is not None for part in (each.first, each.second)}
        if None in found or len(found) != 1 or not parts <= learnt:
            learnt -= parts
        else:
            products.update((name, each) for each in found if each is not None)
    kept = {name: each for name, each in products.items() if {each.first, each.second} <= learnt}
    dropped = {part for name, each in products.items() if name not in kept for part in (each.first, each.second)}
    return learnt - dropped, {name: each for name, each in kept.items() if not {each.first, each.second} & dropped}


def _is_scale(held: Held) -> bool:
    """Whether a constant is a float scale of quantized values and of nothing else."""
    all_scales = all(SCALES.get(reading.node.op) == reading.index for reading in held.readers)
    return bool(held.readers) and kind_of(held) in FLOATS and all_scales


def _is_of_int32(node: gs.Node) -> bool:
    codes = node.inputs[0]
    return isinstance(codes, gs.Constant) and codes.dtype is not None and codes.dtype.name == "int32"


def _product(node: gs.Node) -> Product | None:
    """What the scale of a DequantizeLinear of a bias is the product of; None where that is not to be seen."""
    readers = node.outputs[0].outputs
    layer = readers[0] if len(readers) == 1 else None
    if layer is None or layer.op not in BIASED or len(layer.inputs) < 3 or layer.inputs[2] is not node.outputs[0]:
        return None
    parts = [_scale_of(tensor) for tensor in layer.inputs[:2]]
    return Product(*parts) if all(parts) else None


def _scale_of(tensor: gs.Tensor) -> str:
    """The name of the constant scale of what a DequantizeLinear gives; empty where it is none."""
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if maker is None or maker.op != "DequantizeLinear" or not isinstance(maker.inputs[1], gs.Constant):
        return ""
    return str(maker.inputs[1].name)


def following(products: Mapping[str, Product], shapes: Mapping[str, tuple[int, ...]]) -> list[Step]:
    """The steps that compute the scales which follow from others."""

    def multiply(call: NodeCall, one: Tensor, other: Tensor) -> Tensor:
        return (one.reshape(-1) * other.reshape(-1)).expand(shapes[call.name] or (1,)).reshape(shapes[call.name])

    return [
        Step(multiply, NodeCall(name, "Mul"), (product.first, product.second), (name,))
        for name, product in products.items()
    ]
