"""Reductions along axes, and sums that run along one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnxcomp.torch_bridge.operators.common import UNSIGNED, axes_of, wide
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _largest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.amax(x, axes, keepdim=keep) if x.numel() else _of_nothing(x, axes, keep, largest=True)


def _smallest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.amin(x, axes, keepdim=keep) if x.numel() else _of_nothing(x, axes, keep, largest=False)


def _of_nothing(x: Tensor, axes: list[int], keep: bool, *, largest: bool) -> Tensor:
    """The largest or smallest of no values: the other end of the type."""
    start: float | bool
    if x.dtype == torch.bool:
        start = not largest
    elif x.is_floating_point():
        start = -torch.inf if largest else torch.inf
    else:
        limits = torch.iinfo(x.dtype)
        start = limits.min if largest else limits.max
    return torch.full_like(x.sum(axes, keepdim=keep, dtype=torch.int64), start, dtype=x.dtype)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.mean(x, axes, keepdim=keep) if x.is_floating_point() else _in_floats(_mean, x, axes, keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _norm2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keep) if x.is_floating_point() else _in_floats(_norm2, x, axes, keep)


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep)) if x.is_floating_point() else _in_floats(_log_sum, x, axes, keep)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep) if x.is_floating_point() else _in_floats(_log_sum_exp, x, axes, keep)


def _in_floats(function: Reduction, x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return function(x.double(), axes, keep).to(x.dtype)


REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": _norm2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _largest,
    "ReduceMean": _mean,
    "ReduceMin": _smallest,
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}


def _reduce(function: Reduction) -> Callable[..., Tensor]:
    def run(call: NodeCall, x: Tensor, axes: Tensor | None = None) -> Tensor:
        along = axes_of(call, axes)
        keep = bool(call.get("keepdims", 1))
        if not along:
            if call.get("noop_with_empty_axes", 0) or not x.ndim:
                return wide(lambda each: function(each.unsqueeze(-1), [-1], False), x)
            along = list(range(x.ndim))
        if x.dtype in UNSIGNED:
            return wide(lambda each: function(each, along, keep), x)
        return function(x, along, keep)

    return run


for _name, _function in REDUCTIONS.items():
    operator(_name)(_reduce(_function))


@operator("ArgMax", "ArgMin")
def _arg(call: NodeCall, x: Tensor) -> Tensor:
    axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
    function = torch.argmax if call.op == "ArgMax" else torch.argmin
    x = x.to(torch.int64) if x.dtype in UNSIGNED else x
    if call.get("select_last_index", 0):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
    return function(x, axis, keepdim=keep)


@operator("CumSum", "CumProd")
def _running(call: NodeCall, x: Tensor, axis: Tensor) -> Tensor:
    function, start = (torch.cumsum, 0) if call.op == "CumSum" else (torch.cumprod, 1)
    if x.dtype in UNSIGNED:
        return _running(call, x.to(torch.int64), axis).to(x.dtype)
    along, backward = int(axis), bool(call.get("reverse", 0))
    if backward:
        x = x.flip(along)
    found = function(x, along, dtype=x.dtype)
    if call.get("exclusive", 0):
        found = found.narrow(along, 0, x.shape[along] - 1)
        found = torch.cat([torch.full_like(x.narrow(along, 0, 1), start), found], along)
    return found.flip(along) if backward else found
