"""QuantizeLinear and its kin, with gradients.

Quantized values are float tensors that hold whole numbers, so that gradients pass whatever lies between a
QuantizeLinear and its DequantizeLinear. Rounding passes them straight through (Bengio et al. 2013, "Estimating or
Propagating Gradients Through Stochastic Neurons"); with the division in the graph the gradient towards a scale is that
of learned step size quantization (Esser et al. 2020, section 2.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES, torch_dtype
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__ = ["dequantize_linear", "quantize_and_back", "quantize_linear", "round_through"]


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
@operator("QuantizeLinear", domain="com.microsoft")  # of 16 bits, before opset 21
def quantize_linear(call: NodeCall, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """clamp(round(x / scale) + zero point), as floats that hold whole numbers."""
    return _Quantize.apply(x, *_prepared(call, x, scale, zero_point), False)


def quantize_and_back(call: NodeCall, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """What a DequantizeLinear makes of the codes of a QuantizeLinear, of which `call` tells."""
    found = _Quantize.apply(x, *_prepared(call, x, scale, zero_point), True)
    return found if found.dtype == scale.dtype else found.to(scale.dtype)  # numbers behind codes are wider


def _prepared(
    call: NodeCall, x: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor | None, float, float]:
    """The scale and the zero point in the shape that x asks for, and the range."""
    kind = call.input_types[2] if zero_point is not None and len(call.input_types) > 2 else 0
    if not kind and zero_point is not None:  # an inner tensor, whose type the graph need not tell
        kind = next((each for each in INTEGER_RANGES if torch_dtype(each) == zero_point.dtype), 0)
    kind = kind or call.get("output_dtype") or TensorProto.UINT8
    if kind not in INTEGER_RANGES:
        message = f"values of element type {TensorProto.DataType.Name(kind)} are not trained through"
        raise NotImplementedError(message)
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    low, high = (-math.inf, math.inf) if kind == TensorProto.INT32 else INTEGER_RANGES[kind]
    low, high = call.get("range", (low, high))
    scale = spread(scale, x, axis, block)
    return scale, None if zero_point is None else spread(zero_point.to(scale.dtype), x, axis, block), low, high


class _Quantize(torch.autograd.Function):  # type: ignore[misc] # torch has no type information here
    """Divide, round, add the zero point and clamp; then, if asked for, back again.

    The gradients are those of these operations one by one, with rounding passed straight through, in fewer passes over
    the values.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, low: float, high: float, back: bool) -> Tensor:
        ratio = x / scale
        for_scale = ctx.needs_input_grad[1]
        codes = torch.round(ratio) if for_scale else ratio.round_()
        if zero is not None:
            codes += zero
        clamped = codes.clamp(low, high)
        if back:
            if zero is not None:
                clamped -= zero
            found = clamped * scale if for_scale else clamped.mul_(scale)
        else:
            found = clamped
        ctx.back, ctx.low, ctx.high = back, low, high
        ctx.save_for_backward(scale, codes, ratio if for_scale else None, clamped if for_scale and back else None)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, codes, ratio, whole = ctx.saved_tensors
        # 0 where a whole number was clamped: the fastest way to say so.
        towards_x = torch.ops.aten.hardtanh_backward(gradient, codes, ctx.low - 0.5, ctx.high + 0.5)
        if not ctx.back:
            towards_x /= scale
        towards_scale = None
        if ratio is not None:
            # In between, the scale's two gradients: from the product that is left, and from the division.
            from_division = towards_x * ratio
            towards_scale = (gradient * whole - from_division if ctx.back else -from_division).sum_to_size(scale.shape)
        return towards_x, towards_scale, None, None, None, None


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain="com.microsoft")  # of 16 bits, before opset 21
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
