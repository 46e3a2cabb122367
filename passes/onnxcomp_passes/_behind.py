"""What comes behind a layer before anything else reads its results: a shortcut's Add, an activation.

::

    y = Conv(x, W, b)    s = Add(y, shortcut)    z = Relu(s)      what counts is z, not y
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model, value_of
from onnxcomp_passes._workspace import is_dense, is_standard

__all__ = ["Behind", "find_behind"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Behind:
    """What is done with a layer's results: clip(results + offset + shortcut, low, high).

    Attributes:
        result: The tensor that holds it.
        shortcut: The tensor that is added; None: there is none.
        offset: What is added to each output.
        low: Where the activation ends below.
        high: Where it ends above.
    """

    result: str
    shortcut: str | None = None
    offset: Array | float = 0.0
    low: float = -np.inf
    high: float = np.inf


def find_behind(model: Model, node: gs.Node) -> Behind | None:
    """What comes behind a layer of the main graph; None: its results are read as they are, or by more than one."""
    main = {id(each) for each in model.graph.nodes}
    outputs = {id(tensor) for tensor in model.graph.outputs}
    tensor, shortcut = node.outputs[0], None
    offset: Array | float = 0.0
    while len(tensor.outputs) == 1 and id(tensor) not in outputs and id(tensor.outputs[0]) in main:
        reader = tensor.outputs[0]
        if is_standard(reader, "Relu", "Clip"):
            bounds = (0.0, np.inf) if reader.op == "Relu" else _bounds(reader)
            return None if bounds is None else Behind(str(reader.outputs[0].name), shortcut, offset, *bounds)
        if not is_standard(reader, "Add"):
            break
        other = reader.inputs[1 if reader.inputs[0] is tensor else 0]
        added = _vector(other) if node.op == "MatMul" else None
        if added is not None:
            offset = offset + added
        elif shortcut is None and not isinstance(other, gs.Constant):
            shortcut = str(other.name)
        else:
            break
        tensor = reader.outputs[0]
    return Behind(str(tensor.name), shortcut, offset) if shortcut else None


def _vector(tensor: gs.Tensor) -> Array | None:
    """A constant with one value for all, or one for each entry of the last axis."""
    if not is_dense(tensor) or np.prod(tensor.shape) != (tensor.shape[-1] if tensor.shape else 1):
        return None
    return value_of(tensor).astype(np.float64).reshape(-1)


def _bounds(clip: gs.Node) -> tuple[float, float] | None:
    """Where a Clip ends; None where that is not known."""
    found = [float(clip.attrs.get("min", -np.inf)), float(clip.attrs.get("max", np.inf))]
    for index, tensor in enumerate(clip.inputs[1:3]):
        if not tensor.name:
            continue
        if not is_dense(tensor):
            return None
        found[index] = float(value_of(tensor))
    return (found[0], found[1]) if found[0] < found[1] else None
