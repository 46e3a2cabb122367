"""Arithmetic and functions of one element."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__ = ["add", "identity", "relu"]


@operator("Identity")
def identity(call: NodeCall, x: Tensor) -> Tensor:
    """The input itself."""
    return x


@operator("Add")
def add(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    """Sum, with numpy's broadcasting."""
    return a + b


@operator("Relu")
def relu(call: NodeCall, x: Tensor) -> Tensor:
    """Negative values become 0."""
    return torch.relu(x)


@operator("Constant")
def constant(call: NodeCall) -> Tensor:
    """A value that the node itself holds."""
    if "value" in call.attrs:
        value: Tensor = call.attrs["value"]
        return value
    for name, dtype in (("float", torch.float32), ("int", torch.int64)):
        for key in (f"value_{name}", f"value_{name}s"):
            if key in call.attrs:
                return torch.tensor(call.attrs[key], dtype=dtype)
    message = "only tensors and numbers can be constants here"
    raise NotImplementedError(message)
