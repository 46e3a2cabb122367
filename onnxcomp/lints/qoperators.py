"""Traps in models that are quantized with operators of their own, not with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnxcomp.lints.finding import Seen, Subject, lint
from onnxcomp.lints.quantization import REDUCED, largest_code
from onnxcomp.qdq import codes_of

__all__: list[str] = []

WEIGHTS = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulIntegerToFloat": 1,
}
"""Operator -> which of its inputs is the weight."""


def _nodes(subject: Subject) -> Iterator[gs.Node]:
    for graph in subject.model.graphs() if subject.model is not None else ():
        yield from graph.nodes


@lint(
    "qoperator-int8",
    "warning",
    on=("x86-vnni", "x86", "web"),
    why="int8 activations in QLinear operators cannot be made uint8, and their kernels are slow on x86",
    fix="use QuantizeLinear and DequantizeLinear with uint8 activations: quantize the float model anew",
)
def qoperator_int8(subject: Subject) -> Seen:
    """QLinearConv and QLinearMatMul of int8 activations."""
    for node in _nodes(subject):
        if node.op in {"QLinearConv", "QLinearMatMul"} and str(node.inputs[2].dtype) == "int8":
            yield str(node.name or node.outputs[0].name), f"this {node.op} has int8 activations"


@lint(
    "qoperator-saturation",
    "error",
    on=("x86",),
    why="without VNNI the kernel adds pairs of products in 16 bits, which overflow: outputs are wrong, and only there",
    fix="quantize the float model anew, with weights of 7 bits (reduce_range)",
)
def qoperator_saturation(subject: Subject) -> Seen:
    """Weights of 8 bits in QLinear and Integer operators."""
    for node in _nodes(subject):
        place = WEIGHTS.get(node.op)
        codes = codes_of(node.inputs[place]) if place is not None and place < len(node.inputs) else None
        if codes is not None and codes.dtype.name == "int8" and (largest := largest_code(codes)) > REDUCED:
            yield str(node.name or node.outputs[0].name), f"the codes of its weight reach {largest}, not {REDUCED}"
