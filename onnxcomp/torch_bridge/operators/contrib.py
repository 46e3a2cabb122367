"""Fused operators that ONNX Runtime's optimizer writes (domain com.microsoft)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.normalization import layer_norm
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

MICROSOFT = "com.microsoft"

operator("Gelu", domain=MICROSOFT)(lambda call, x: F.gelu(x))
operator("BiasGelu", domain=MICROSOFT)(lambda call, x, bias: F.gelu(x + bias))


@operator("FastGelu", domain=MICROSOFT)
def _fast_gelu(call: NodeCall, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def _quick_gelu(call: NodeCall, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


@operator("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_normalization(
    call: NodeCall, x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    total = x + skip if bias is None else x + skip + bias
    epsilon = call.get("epsilon", 1e-5)
    y = layer_norm(total, total.ndim - 1, gamma, beta, epsilon)
    if not any(call.wanted[1:]):
        return y
    return y, total.mean(-1, keepdim=True), torch.rsqrt(total.var(-1, unbiased=False, keepdim=True) + epsilon), total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_normalization(call: NodeCall, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None) -> Any:
    total = x + skip if bias is None else x + skip + bias
    epsilon = call.get("epsilon", 1e-5)
    y = F.rms_norm(total, total.shape[-1:], gamma, epsilon)
    if not any(call.wanted[1:]):
        return y
    return y, None, torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon), total
