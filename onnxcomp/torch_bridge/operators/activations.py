"""Activation functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.common import wide
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

BROADCASTING = 7
ONE_AXIS = 13
"""Since this opset Softmax and its kin work along one axis; before, over all axes from it on."""

SIXTH_ROUNDING = 1e-8
"""A sixth as float32 holds it is no further than this from a sixth."""

operator("Relu")(lambda call, x: torch.relu(x))
operator("Sigmoid")(lambda call, x: torch.sigmoid(x))
operator("Tanh")(lambda call, x: torch.tanh(x))
operator("Softplus")(lambda call, x: torch.logaddexp(x, torch.zeros_like(x)))
operator("Softsign")(lambda call, x: F.softsign(x))
operator("Mish")(lambda call, x: F.mish(x))
operator("HardSwish")(lambda call, x: F.hardswish(x))
operator("Elu")(lambda call, x: F.elu(x, call.get("alpha", 1.0)))
operator("Celu")(lambda call, x: F.celu(x, call.get("alpha", 1.0)))
operator("LeakyRelu")(lambda call, x: F.leaky_relu(x, call.get("alpha", 0.01)))


@operator("Selu")
def _selu(call: NodeCall, x: Tensor) -> Tensor:
    alpha, gamma = call.get("alpha", 1.6732632423543772), call.get("gamma", 1.0507009873554805)
    return gamma * F.elu(x, alpha)


@operator("ThresholdedRelu")
def _thresholded_relu(call: NodeCall, x: Tensor) -> Tensor:
    return F.threshold(x, call.get("alpha", 1.0), 0.0)


@operator("HardSigmoid")
def _hard_sigmoid(call: NodeCall, x: Tensor) -> Tensor:
    alpha, beta = call.get("alpha", 0.2), call.get("beta", 0.5)
    if beta == 0.5 and abs(alpha - 1 / 6) < SIXTH_ROUNDING:
        return F.hardsigmoid(x)
    return F.hardtanh(x * alpha + beta, 0.0, 1.0)


@operator("PRelu")
def _prelu(call: NodeCall, x: Tensor, slope: Tensor) -> Tensor:
    by_channel = slope.numel() == 1 or (call.opset < BROADCASTING and slope.ndim == 1)
    if slope.ndim == x.ndim - 1 and x.ndim > 1 and slope.shape[0] in {1, x.shape[1]}:
        by_channel = by_channel or slope.numel() == slope.shape[0]
    if by_channel and x.is_floating_point() and x.ndim > 1 and slope.numel() in {1, x.shape[1]}:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


@operator("Gelu")
def _gelu(call: NodeCall, x: Tensor) -> Tensor:
    approximate = call.get("approximate", "none")
    return F.gelu(x, approximate="tanh" if approximate in {"tanh", b"tanh"} else "none")


@operator("Swish")
def _swish(call: NodeCall, x: Tensor) -> Tensor:
    alpha = call.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Shrink")
def _shrink(call: NodeCall, x: Tensor) -> Tensor:
    limit, bias = call.get("lambd", 0.5), call.get("bias", 0.0)
    shrunk = torch.where(x > limit, x - bias, torch.where(x < -limit, x + bias, torch.zeros_like(x)))
    return shrunk.to(x.dtype)


@operator("Clip")
def _clip(call: NodeCall, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least = call.get("min") if low is None else _number(low)
    most = call.get("max") if high is None else _number(high)
    if least is None and most is None:
        return x
    if isinstance(least, Tensor) or isinstance(most, Tensor):
        limits = (limit if limit is None else torch.as_tensor(limit, dtype=x.dtype) for limit in (least, most))
        return torch.clamp(x, *limits)
    if least is None or most is None:
        return torch.relu(x) if least == 0 else wide(lambda each: torch.clamp(each, least, most), x)
    if least > most:
        return torch.full_like(x, most)
    if x.is_floating_point():
        return F.hardtanh(x, least, most)  # its gradient is several times as fast as that of clamp
    return wide(lambda each: torch.clamp(each, least, most), x)


def _number(limit: Tensor) -> float | Tensor:
    """Limits as numbers are faster; a limit that gets a gradient stays a tensor."""
    return limit if limit.requires_grad else limit.item()


def _along(function: Callable[[Tensor, int], Tensor]) -> Callable[[NodeCall, Tensor], Tensor]:
    def run(call: NodeCall, x: Tensor) -> Tensor:
        if call.opset >= ONE_AXIS:
            return function(x, call.get("axis", -1))
        axis = call.get("axis", 1) % max(x.ndim, 1)
        if axis == x.ndim - 1:
            return function(x, axis)
        return function(x.flatten(axis), axis).reshape(x.shape)

    return run


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


operator("Softmax")(_along(torch.softmax))
operator("LogSoftmax")(_along(torch.log_softmax))
operator("Hardmax")(_along(_hardmax))
