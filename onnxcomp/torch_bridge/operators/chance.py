"""Random numbers. Those of torch: the seed of a node makes them the same each time, not those of another runtime."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onnxcomp.torch_bridge.operators.common import type_of
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []


def _generator(call: NodeCall) -> torch.Generator | None:
    seed = call.get("seed")
    return None if seed is None else torch.Generator().manual_seed(int(seed))


def _normal(call: NodeCall, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(tuple(shape), generator=_generator(call))
    return (drawn * call.get("scale", 1.0) + call.get("mean", 0.0)).to(dtype)


def _uniform(call: NodeCall, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    low, high = call.get("low", 0.0), call.get("high", 1.0)
    return (torch.rand(tuple(shape), generator=_generator(call)) * (high - low) + low).to(dtype)


def _dtype_like(call: NodeCall, x: Tensor) -> torch.dtype:
    return type_of(call, "dtype") if "dtype" in call.attrs else x.dtype


operator("RandomNormal")(lambda call: _normal(call, call.attrs["shape"], type_of(call, "dtype")))
operator("RandomUniform")(lambda call: _uniform(call, call.attrs["shape"], type_of(call, "dtype")))
operator("RandomNormalLike")(lambda call, x: _normal(call, x.shape, _dtype_like(call, x)))
operator("RandomUniformLike")(lambda call, x: _uniform(call, x.shape, _dtype_like(call, x)))


@operator("Bernoulli")
def _bernoulli(call: NodeCall, x: Tensor) -> Tensor:
    return torch.bernoulli(x.detach(), generator=_generator(call)).to(_dtype_like(call, x))


@operator("Multinomial")
def _multinomial(call: NodeCall, x: Tensor) -> Tensor:
    found = torch.multinomial(
        torch.softmax(x.detach(), -1), call.get("sample_size", 1), True, generator=_generator(call)
    )
    return found.to(type_of(call, "dtype", 6))
