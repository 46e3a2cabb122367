"""Where two runs of a quantized model part: the nodes whose codes differ though their inputs are the same."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model
from onnxcomp.qdq import encoder, scale_of
from onnxcomp.runtime.census import node_names
from onnxcomp.verification.results import NodeDifference

__all__ = ["Codes", "expose_codes", "parting_nodes"]

Array = np.ndarray[Any, Any]

HALF = 0.5
"""Values of equal codes differ by less than half a step."""

Codes = Mapping[str, Sequence[Array]]
"""Tensor name -> its values in each run."""


def expose_codes(model: Model) -> tuple[Model, list[str]]:
    """A model that also gives what its quantized activations stand for.

    The DequantizeLinear is made an output, not the codes: the int8 kernels stay, since ONNX Runtime gives the output a
    DequantizeLinear of its own.

    Args:
        model: The model; it is not changed.

    Returns:
        The other model, and the names of these outputs in the order of the graph; none where nothing is quantized.
    """
    fork = model.fork()
    outputs = {id(tensor) for tensor in fork.graph.outputs}
    exposed = [
        node.outputs[0] for node in fork.graph.nodes if node.op == "DequantizeLinear" and _quantizer(node) is not None
    ]
    for tensor in exposed:
        tensor.dtype = tensor.dtype or np.float32
        if id(tensor) not in outputs:
            fork.graph.outputs.append(tensor)
    return fork, [str(tensor.name) for tensor in exposed]


def parting_nodes(model: Model, ours: Codes, theirs: Codes) -> tuple[NodeDifference, ...]:
    """The nodes where a difference begins: their quantized inputs are equal, their outputs are not.

    Args:
        model: The model that `expose_codes` was given.
        ours: Values of the exposed tensors here.
        theirs: The same elsewhere.
    """
    names = dict(zip(map(id, model.graph.nodes), node_names(model.proto().graph), strict=False))
    decoders = [node for node in model.graph.nodes if node.op == "DequantizeLinear" and _quantizer(node) is not None]
    steps = {node.outputs[0].name: _scale(node) for node in decoders if node.outputs[0].name in ours}
    differ = {name for name, step in steps.items() if not _equal(ours[name], theirs[name], step)}
    found = []
    for decode in decoders:
        quantizer = _quantizer(decode)
        if decode.outputs[0].name not in differ or quantizer is None:
            continue
        if _codes_read(quantizer.inputs[0], ours.keys()) & differ:
            continue
        source = next(iter(quantizer.inputs[0].inputs), quantizer)
        name = decode.outputs[0].name
        gaps = [np.abs(a.astype(np.float64) - b) for a, b in zip(ours[name], theirs[name], strict=True)]
        largest = max(float(np.max(gap, initial=0.0)) for gap in gaps) / steps[name]
        share = float(np.mean(np.concatenate([(gap > HALF * steps[name]).ravel() for gap in gaps])))
        found.append(NodeDifference(names[id(source)], source.op, round(largest), share))
    return tuple(found)


def _quantizer(decode: gs.Node) -> gs.Node | None:
    """The QuantizeLinear whose codes a DequantizeLinear reads; None also where its scale is computed, or none."""
    scale = scale_of(decode)
    return encoder(decode.inputs[0]) if scale is not None and np.all(scale > 0) else None


def _equal(values: Sequence[Array], others: Sequence[Array], step: float) -> bool:
    """Whether the codes behind values are the same; accelerators give values in 16 bits."""
    pairs = zip(values, others, strict=True)
    return all(a.shape == b.shape and bool(np.all(np.abs(a - b) <= HALF * step)) for a, b in pairs)


def _codes_read(tensor: gs.Tensor, exposed: Container[str]) -> set[str]:
    """The exposed tensors that a tensor is computed of; not those behind them."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        present = waiting.pop()
        if id(present) in seen:
            continue
        seen.add(id(present))
        if present.name in exposed:
            found.add(str(present.name))
        else:
            waiting.extend(source for maker in present.inputs for source in maker.inputs)
    return found


def _scale(decode: gs.Node) -> float:
    scale = scale_of(decode)
    assert scale is not None
    return float(scale.ravel()[0])
