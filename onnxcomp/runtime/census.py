"""Which kernels really run: the nodes of ONNX Runtime's optimized graph."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing this package must not load onnx
    import onnx

INT8_OPERATORS = frozenset(
    {
        # Integer matrix products, with float or quantized results.
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        # Elementwise and pooling kernels that take and give quantized values.
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMul",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
        # Only ever made for quantized values: the layout that QLinearConv wants.
        "NhwcMaxPool",
    }
)
"""Operators of ONNX and com.microsoft whose kernel computes on 8-bit (or narrower) integers. The operator alone
decides: ONNX Runtime puts one in a graph only where it has that kernel."""

_FLOAT_COMPUTE = frozenset(
    {"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "NhwcFusedConv"}
)
_BITS = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}  # packed; all others take whole bytes


@dataclass(frozen=True)
class KernelNode:
    """A node of ONNX Runtime's optimized graph.

    Attributes:
        op: The operator, such as ``QLinearConv``.
        domain: Its domain, such as ``com.microsoft.nchwc``; empty for ONNX's own.
        name: The node's name; its first output where it has none.
        inputs: Tensor names; empty where an optional input is left out.
        outputs: Tensor names.
        int8: Whether the kernel computes on integers of 8 bits or fewer.
    """

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    int8: bool


@dataclass(frozen=True)
class Census:
    """The kernels of one model on this machine.

    Attributes:
        nodes: The nodes of the optimized graph, each subgraph's after the node that it belongs to.
        initializer_bytes: Size of the optimized graph's initializers.
    """

    nodes: tuple[KernelNode, ...]
    initializer_bytes: int

    def counts(self) -> dict[str, int]:
        """Operator -> how many nodes, the most frequent first."""
        return dict(Counter(node.op for node in self.nodes).most_common())

    @property
    def int8_nodes(self) -> tuple[KernelNode, ...]:
        """The nodes whose kernel computes on integers of 8 bits or fewer."""
        return tuple(node for node in self.nodes if node.int8)

    @property
    def float_compute_nodes(self) -> tuple[KernelNode, ...]:
        """The convolutions and matrix products that are left in floating point."""
        return tuple(node for node in self.nodes if node.op in _FLOAT_COMPUTE)


def read_census(path: Path) -> Census:
    """Read an optimized graph that ONNX Runtime has written.

    Args:
        path: The model file. Its external data is not read.

    Returns:
        The census.
    """
    import onnx

    nodes: list[KernelNode] = []
    size = 0
    for graph in graphs(onnx.load(path, load_external_data=False).graph):
        size += sum(_tensor_bytes(tensor) for tensor in graph.initializer)
        # ONNX Runtime holds these as dense tensors, and only writes them as they were.
        size += sum(_bytes_of(sparse.dims, sparse.values.data_type) for sparse in graph.sparse_initializer)
        nodes.extend(
            KernelNode(
                op=node.op_type,
                domain="" if node.domain == "ai.onnx" else node.domain,
                name=node.name or next(iter(node.output), ""),
                inputs=tuple(node.input),
                outputs=tuple(node.output),
                int8=node.op_type in INT8_OPERATORS,
            )
            for node in graph.node
        )
    return Census(tuple(nodes), size)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the subgraphs of its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)
            for inner in attribute.graphs:
                yield from graphs(inner)


def node_names(graph: onnx.GraphProto) -> list[str]:
    """A unique name for every node of a graph and its subgraphs, in their order.

    A node keeps its own name; one without a name, or with one that is taken, goes by its first output (with a number
    where that is taken too). ONNX Runtime names what it fuses after the nodes, so only unique names tell them apart.
    """
    return unique_names((node.name, node.output, node.op_type) for inner in graphs(graph) for node in inner.node)


def unique_names(nodes: Iterable[tuple[str, Sequence[str], str]]) -> list[str]:
    """The names of `node_names`, of nodes in its order: each with its own name, its outputs and its operator.

    Example:
        >>> unique_names([("mm", ["a"], "MatMul"), ("mm", ["b"], "MatMul"), ("", ["b"], "Relu")])
        ['mm', 'b', 'b#2']
    """
    listed = list(nodes)
    owner: dict[str, int] = {}
    for index, (name, _, _) in enumerate(listed):
        if name:
            owner.setdefault(name, index)
    names = []
    for index, (own, outputs, op) in enumerate(listed):
        name = own
        if not name or owner[name] != index:
            base = name = next((output for output in outputs if output), op)
            number = 2
            while name in owner:
                name = f"{base}#{number}"
                number += 1
            owner[name] = index
        names.append(name)
    return names


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    import onnx

    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    return _bytes_of(tensor.dims, tensor.data_type)


def _bytes_of(dims: Iterable[int], data_type: int) -> int:
    import onnx

    elements = math.prod(dims)
    bits = _BITS.get(onnx.TensorProto.DataType.Name(data_type))
    if bits is None:
        bits = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    return -(-elements * bits // 8)
