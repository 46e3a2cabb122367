"""Attention (opset 23 and later)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.common import type_of
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []


@operator("Attention")
def _attention(
    call: NodeCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Any:
    flat = q.ndim == 3
    if flat:
        q = _heads(q, call.attrs["q_num_heads"])
        k, v = (_heads(each, call.attrs["kv_num_heads"]) for each in (k, v))
    before = 0 if past_key is None else past_key.shape[2]
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = (k, v)
    if q.shape[1] != k.shape[1]:
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    shown = len(call.wanted) > 3 and call.wanted[3]
    offset: int | Tensor = before
    if lengths is not None and past_key is None:
        offset = lengths.reshape(-1, 1, 1, 1) - q.shape[2]
    bias = _bias(call, q, k, mask, offset, lengths)
    if bias is None and not shown and not call.get("softcap"):
        y, scores = F.scaled_dot_product_attention(q, k, v, scale=call.get("scale")), None
    else:
        y, scores = _step_by_step(call, q, k, v, bias)
    if flat:
        y = y.transpose(1, 2).flatten(2)
    return (y, *present, scores) if any(call.wanted[1:]) else y


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def _bias(
    call: NodeCall, q: Tensor, k: Tensor, mask: Tensor | None, offset: int | Tensor, lengths: Tensor | None
) -> Tensor | None:
    """What is added to the scores: the mask, and minus infinity for keys that a query does not see."""
    size, keys = q.shape[2], k.shape[2]
    ahead = torch.arange(keys) - torch.arange(size).unsqueeze(1) - offset  # how far a key is ahead of a query
    seen: list[Tensor] = []
    if call.get("is_causal", 0):
        seen.append(ahead <= 0)
    left, right = call.get("left_window_size", -1), call.get("right_window_size", -1)
    if left >= 0:
        seen.append(-ahead <= left)
    if right >= 0:
        seen.append(ahead <= right)
    if lengths is not None:
        seen.append(torch.arange(keys) < lengths.reshape(-1, 1, 1, 1))
    never = torch.tensor(-torch.inf, dtype=q.dtype)
    bias = None
    if mask is not None:
        short = keys - mask.shape[-1]
        if mask.dtype == torch.bool:
            seen.append(F.pad(mask, (0, short), value=False))
        else:
            bias = F.pad(mask, (0, short), value=-torch.inf)
    for each in seen:
        bias = torch.where(each, torch.zeros_like(never) if bias is None else bias, never)
    return bias


def _step_by_step(call: NodeCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and the scores at the point that the node asks for."""
    root = (call.get("scale") or q.shape[3] ** -0.5) ** 0.5
    scores = (q * root) @ (k * root).mT
    cap = call.get("softcap", 0.0)
    point = call.get("qk_matmul_output_mode", 0)
    shown = scores
    if cap:
        scores = cap * torch.tanh(scores / cap)
        # The first point of all is before the cap, but ONNX's reference shows the capped scores there too.
        shown = scores
    blind = None
    if bias is not None:
        blind = bias.amax(-1, keepdim=True) == -torch.inf  # sees no key at all: the result is 0
        if point == 2:
            shown = scores + bias
        scores = scores + torch.where(blind, 0, bias)
    precise = scores.to(type_of(call, "softmax_precision")) if "softmax_precision" in call.attrs else scores
    weights = torch.softmax(precise, -1)
    if blind is not None:
        weights = torch.where(blind, 0, weights)
    weights = weights.to(q.dtype)
    return weights @ v, weights if point == 3 else shown
