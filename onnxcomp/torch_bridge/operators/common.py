"""What several families of operators need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from onnx import TensorProto
from torch import Tensor

from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES, torch_dtype
from onnxcomp.torch_bridge.registry import NodeCall

__all__ = ["axes_of", "in_order", "is_quantized", "numbers", "type_of", "wide"]

UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""Types that torch holds but hardly computes in."""

INTEGERS = {*INTEGER_RANGES, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64}


def wide(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function; on unsigned types in 64 bits, the result brought back to the type of the first."""
    if tensors[0].dtype not in UNSIGNED:
        return function(*tensors)
    found = function(*(tensor.to(torch.int64) for tensor in tensors))
    return found.to(tensors[0].dtype) if found.dtype == torch.int64 else found


def in_order(x: Tensor) -> Tensor:
    """A tensor that compares as this one does, in a type that torch compares."""
    if x.dtype == torch.uint64:
        return x.view(torch.int64) ^ torch.iinfo(torch.int64).min
    return x.to(torch.int64) if x.dtype in UNSIGNED else x


def numbers(x: Tensor | Sequence[int]) -> list[int]:
    """Whole numbers as Python has them, from an attribute or an input."""
    found = x.reshape(-1).tolist() if isinstance(x, Tensor) else x
    return [int(each) for each in found]


def axes_of(call: NodeCall, axes: Tensor | None) -> list[int] | None:
    """Axes from the input, or the attribute of older opsets; None where none are given."""
    given = axes if axes is not None else call.get("axes")
    return None if given is None else numbers(given)


def is_quantized(call: NodeCall, x: Tensor, index: int = 0) -> bool:
    """Whether an input is declared as integers but held as floats, for the sake of gradients."""
    return x.is_floating_point() and len(call.input_types) > index and call.input_types[index] in INTEGERS


def type_of(call: NodeCall, key: str, default: int = TensorProto.FLOAT) -> torch.dtype:
    """The torch type of an attribute that names an element type.

    Raises:
        NotImplementedError: torch has none.
    """
    kind = call.get(key, default)
    try:
        return torch_dtype(kind)
    except KeyError as error:
        message = f"values of element type {TensorProto.DataType.Name(kind)} cannot be held in torch"
        raise NotImplementedError(message) from error
