"""Between ONNX's element types, numpy's and torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper

__all__ = ["INTEGER_RANGES", "as_tensor", "onnx_type", "torch_dtype"]

INTEGER_RANGES = {
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    getattr(TensorProto, "INT2", -1): (-2, 1),
    getattr(TensorProto, "UINT2", -2): (0, 3),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
}
"""ONNX element type -> the smallest and the largest value."""

_TORCH = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT16: torch.int16,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT32: torch.int32,
    TensorProto.UINT32: torch.uint32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    # Held in the next type that torch computes in.
    TensorProto.INT4: torch.int8,
    TensorProto.UINT4: torch.uint8,
    getattr(TensorProto, "INT2", -1): torch.int8,
    getattr(TensorProto, "UINT2", -2): torch.uint8,
}


def torch_dtype(onnx_dtype: int) -> torch.dtype:
    """The torch dtype that values of an ONNX element type are held in.

    Raises:
        KeyError: torch has none.
    """
    return _TORCH[onnx_dtype]


def onnx_type(dtype: Any) -> int:
    """The ONNX element type of a numpy dtype; 0 where there is none or none is known."""
    if dtype is None:
        return 0
    try:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    except (KeyError, TypeError, ValueError):
        return 0


def as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor with an array's values, which are copied; 0-d stays 0-d.

    Raises:
        KeyError: torch has no dtype for it.
    """
    kind = onnx_type(array.dtype)
    dtype = torch_dtype(kind)
    if kind == TensorProto.BFLOAT16:
        return torch.from_numpy(np.array(array.astype(np.float32))).to(dtype)
    if kind in INTEGER_RANGES and np.dtype(array.dtype).kind not in "iu":  # 2- and 4-bit types
        array = array.astype(np.int8 if INTEGER_RANGES[kind][0] else np.uint8)
    return torch.from_numpy(np.array(array, order="C"))
