"""The compute form of a weight: a DequantizeLinear that ONNX Runtime makes a MatMulNBits of, with the node behind it.

::

    W_int4 -> DequantizeLinear(scale, axis=0, block_size=32) -> MatMul

The codes stay packed in memory and are decoded in the kernel. Found by running ONNX Runtime 1.32: 2, 4 and 8 bits,
signed or not, with zero points or without, per tensor, per column or in blocks of a power of two from 16 on, also where
the last block is shorter. It takes one reader: a MatMul, or a Gemm that is no more than a MatMul and a bias, with a
matrix of shape (inputs, outputs), and neither with a Relu or Clip behind it: ONNX Runtime then looks for the pattern of
int8 activations and stops there. Other readers would be fed by a DequantizeLinear that runs at each inference.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model
from onnxcomp_passes._stored import Encoded, redirect

__all__ = ["KERNEL", "compute_refusal", "dequantize", "is_transposed"]

KERNEL = "MatMulNBits"


def compute_refusal(constant: gs.Constant, node: gs.Node, index: int) -> str | None:
    """Why a weight cannot have the compute form, or None."""
    if node.op not in {"MatMul", "Gemm"} or index != 1 or len(constant.shape) != 2:
        return f"no {KERNEL} kernel for this operator"
    if len(constant.outputs) != 1:
        return f"has {len(constant.outputs)} readers, {KERNEL} takes one"
    if node.op == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        plain = node.attrs.get("alpha", 1.0) == 1.0 and not node.attrs.get("transA", 0)
        if not plain or (bias is not None and (node.attrs.get("beta", 1.0) != 1.0 or len(bias.shape or ()) != 1)):
            return "its Gemm is more than a MatMul and a bias"
    if _is_clipped(node):
        return f"ONNX Runtime makes no {KERNEL} in front of a Relu or Clip"
    return None


def _is_clipped(node: gs.Node) -> bool:
    """Whether a Relu or Clip alone reads a node's result, straight or behind the addition of a bias."""
    readers = node.outputs[0].outputs
    if len(readers) == 1 and readers[0].op == "Add" and any(isinstance(t, gs.Constant) for t in readers[0].inputs):
        readers = readers[0].outputs[0].outputs
    return len(readers) == 1 and readers[0].op in {"Relu", "Clip"}


def is_transposed(node: gs.Node) -> bool:
    """Whether a layer holds its weight as (outputs, inputs): the compute form wants the other."""
    return bool(node.op == "Gemm" and node.attrs.get("transB", 0))


def dequantize(
    model: Model, graph: gs.Graph, constant: gs.Constant, encoded: Encoded, *, block: int, per_channel: bool
) -> None:
    """Put a constant into its compute form.

    Args:
        model: For names.
        graph: Where the constant's one reader is.
        constant: The weight.
        encoded: Its codes of shape (inputs, outputs), also where the constant is transposed, and packed zero points.
        block: Values in a group; 0 for none.
        per_channel: Whether there is a scale for each column, where there are no blocks.
    """
    reader = constant.outputs[0]
    attrs = {"axis": 0, "block_size": block} if block else {"axis": 1} if per_channel else {}
    parts = [("q", encoded.codes), ("s", encoded.scale), ("z", encoded.zero)]
    inputs = [gs.Constant(model.unique_name(f"{letter}.0"), part) for letter, part in parts if part is not None]
    result = Variable(constant.name)
    if is_transposed(reader):
        reader.attrs["transB"] = 0
    redirect(constant, result)
    graph.nodes[:0] = [Node("DequantizeLinear", "", attrs, inputs, [result])]
