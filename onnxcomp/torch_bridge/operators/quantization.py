"""QuantizeLinear and its kin, with gradients.

Quantized values are float tensors that hold whole numbers, so that gradients pass whatever lies between a
QuantizeLinear and its DequantizeLinear. Rounding passes them straight through (Bengio et al. 2013, "Estimating or
Propagating Gradients Through Stochastic Neurons"); with the division in the graph the gradient towards a scale is that
of learned step size quantization (Esser et al. 2020, section 2.1).
"""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES, torch_dtype
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__ = ["dequantize_linear", "quantize_linear", "round_through"]


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


def spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Bring a scale or zero point to a shape that broadcasts with what it belongs to.

    Args:
        parameter: One number; one each along `axis`; or one a block of `block` values along it.
        x: What it belongs to.
        axis: Of x.
        block: 0 where there are no blocks.
    """
    if block:
        return parameter.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


@operator("QuantizeLinear")
def quantize_linear(call: NodeCall, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """clamp(round(x / scale) + zero point), as floats that hold whole numbers."""
    kind = call.input_types[2] if zero_point is not None and len(call.input_types) > 2 else 0
    kind = kind or call.get("output_dtype") or TensorProto.UINT8
    if kind not in INTEGER_RANGES:
        message = f"values of element type {TensorProto.DataType.Name(kind)} are not trained through"
        raise NotImplementedError(message)
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    codes = round_through(x / spread(scale, x, axis, block))
    if zero_point is not None:
        codes = codes + spread(zero_point.to(codes.dtype), x, axis, block)
    low, high = INTEGER_RANGES[kind]
    return codes if kind == TensorProto.INT32 else torch.clamp(codes, low, high)


@operator("DequantizeLinear")
def dequantize_linear(call: NodeCall, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(x - zero point) * scale."""
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    values = x if x.is_floating_point() else x.to(scale.dtype)
    if zero_point is not None:
        values = values - spread(zero_point.to(values.dtype), x, axis, block)
    found = values * spread(scale, x, axis, block)
    wanted = call.get("output_dtype")
    dtype = torch_dtype(wanted) if wanted else scale.dtype
    return found if found.dtype == dtype else found.to(dtype)


@operator("DynamicQuantizeLinear")
def _dynamic_quantize_linear(call: NodeCall, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To uint8 by the range of the values themselves; the range gets no gradient."""
    low, high = INTEGER_RANGES[TensorProto.UINT8]
    with torch.no_grad():
        smallest, largest = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (largest - smallest) / (high - low)
        scale = torch.where(scale == 0, 1, scale)
        zero_point = torch.round((low - smallest / scale).clamp(low, high))
    return torch.clamp(round_through(x / scale) + zero_point, low, high), scale, zero_point
