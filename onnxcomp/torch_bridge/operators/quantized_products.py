"""Products of integers, on floats that hold whole numbers where gradients pass."""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from onnxcomp.torch_bridge.operators.convolution import conv
from onnxcomp.torch_bridge.operators.quantization import dequantize_linear, quantize_linear
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []


def _shifted(x: Tensor, zero_point: Tensor | None, dtype: torch.dtype, *, rows: bool = False) -> Tensor:
    """Codes less their zero point, which may be one number, or one for each row or column."""
    values = x.to(dtype)
    if zero_point is None:
        return values
    zero_point = zero_point.to(dtype)
    return values - (
        zero_point.unsqueeze(-1) if rows and zero_point.ndim == 1 and zero_point.numel() > 1 else zero_point
    )


def _compute_type(*tensors: Tensor) -> torch.dtype:
    """Floats where a gradient may pass, else a type in which the sums are exact."""
    return torch.float32 if any(each.is_floating_point() for each in tensors) else torch.float64


def _as_whole(found: Tensor) -> Tensor:
    return found if found.dtype == torch.float32 else found.to(torch.int32)


@operator("MatMulInteger")
def _matmul_integer(
    call: NodeCall, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    dtype = _compute_type(a, b)
    return _as_whole(torch.matmul(_shifted(a, a_zero, dtype, rows=True), _shifted(b, b_zero, dtype)))


@operator("ConvInteger")
def _conv_integer(
    call: NodeCall, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None
) -> Tensor:
    dtype = _compute_type(x, weight)
    if weight_zero is not None and weight_zero.numel() > 1:
        weight_zero = weight_zero.reshape(-1, *[1] * (weight.ndim - 1))
    return _as_whole(conv(call, _shifted(x, x_zero, dtype), _shifted(weight, weight_zero, dtype)))


def _quantized(call: NodeCall, found: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The result in codes, of the type that the node's last zero point has."""
    index = 7
    kind = call.input_types[index] if len(call.input_types) > index else 0
    if not kind:
        kind = TensorProto.INT8 if zero_point.dtype == torch.int8 else TensorProto.UINT8
    call = NodeCall(call.name, "QuantizeLinear", attrs={"output_dtype": kind}, input_types=(0, 0, kind))
    return quantize_linear(call, found, scale, zero_point)


@operator("QLinearMatMul")
def _qlinear_matmul(
    call: NodeCall,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    rows = a_scale.unsqueeze(-1) if a_scale.ndim == 1 and a_scale.numel() > 1 else a_scale
    first = _shifted(a, a_zero, torch.float32, rows=True)
    product = torch.matmul(first, _shifted(b, b_zero, torch.float32)) * (rows * b_scale).float()
    return _quantized(call, product, y_scale.float(), y_zero)


@operator("QLinearConv")
def _qlinear_conv(
    call: NodeCall,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    by_channel = NodeCall(call.name, "DequantizeLinear", attrs={"axis": 0})
    values = dequantize_linear(by_channel, x, x_scale, x_zero)
    kernel = dequantize_linear(by_channel, weight, weight_scale, weight_zero)
    offset = None if bias is None else bias.to(values.dtype) * (x_scale * weight_scale)
    return _quantized(call, conv(call, values, kernel, offset), y_scale, y_zero)
