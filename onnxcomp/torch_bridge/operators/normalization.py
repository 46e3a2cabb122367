"""Normalizations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__ = ["layer_norm"]

CHANNEL_SCALES = 21
"""Since this opset GroupNormalization has a scale for each channel; before, one for each group."""


@operator("BatchNormalization")
def _batch_normalization(call: NodeCall, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    """With the statistics of the graph, unless the node itself says that it is in training."""
    epsilon = call.get("epsilon", 1e-5)
    if not call.get("training_mode", 0):
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    old = call.get("momentum", 0.9)
    found_mean, found_var = x.mean(axes), x.var(axes, unbiased=False)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return y, mean * old + found_mean * (1 - old), var * old + found_var * (1 - old)


@operator("InstanceNormalization")
def _instance_normalization(call: NodeCall, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if x[0, 0].numel() == 1:  # which torch refuses: it is its own mean
        return torch.zeros_like(x) * scale.reshape(-1, *[1] * (x.ndim - 2)) + bias.reshape(-1, *[1] * (x.ndim - 2))
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


def layer_norm(x: Tensor, axis: int, scale: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer normalization from an axis on, with a scale and a bias that may have to be broadcast."""
    shape = x.shape[axis:]
    if all(each is None or each.shape == shape for each in (scale, bias)):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    found = F.layer_norm(x, shape, None, None, epsilon)
    found = found if scale is None else found * scale
    return found if bias is None else found + bias


@operator("LayerNormalization")
def _layer_normalization(call: NodeCall, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Any:
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    y = layer_norm(x, axis, scale, bias, epsilon)
    if not any(call.wanted[1:]):
        return y
    axes = list(range(axis, x.ndim))
    return y, x.mean(axes, keepdim=True), torch.rsqrt(x.var(axes, unbiased=False, keepdim=True) + epsilon)


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_normalization(call: NodeCall, x: Tensor, scale: Tensor | None = None) -> Tensor:
    shape = x.shape[call.get("axis", -1) % x.ndim :]
    epsilon = call.get("epsilon", 1e-5)
    if scale is None or scale.shape == shape:
        return F.rms_norm(x, shape, scale, epsilon)
    return F.rms_norm(x, shape, None, epsilon) * scale


@operator("GroupNormalization")
def _group_normalization(call: NodeCall, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, epsilon = call.attrs["num_groups"], call.get("epsilon", 1e-5)
    if call.opset < CHANNEL_SCALES and scale.numel() == groups:
        scale, bias = (each.repeat_interleave(x.shape[1] // groups) for each in (scale, bias))
    return F.group_norm(x, groups, scale, bias, epsilon)


@operator("LpNormalization")
def _lp_normalization(call: NodeCall, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


@operator("LRN")
def _local_response_normalization(call: NodeCall, x: Tensor) -> Tensor:
    size = call.attrs["size"]
    low, high = (size - 1) // 2, math.ceil((size - 1) / 2)
    pads = [0, 0] * (x.ndim - 2) + [low, high]
    sums = F.pad(x * x, pads).unfold(1, size, 1).sum(-1)
    alpha, beta, bias = call.get("alpha", 1e-4), call.get("beta", 0.75), call.get("bias", 1.0)
    return x / (bias + alpha / size * sums) ** beta


@operator("MeanVarianceNormalization")
def _mean_variance_normalization(call: NodeCall, x: Tensor) -> Tensor:
    axes = call.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + EPSILON)


EPSILON = 1e-9
"""That of ONNX's definition of MeanVarianceNormalization."""
