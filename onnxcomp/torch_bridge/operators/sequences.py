"""Sequences, which are lists here, and optional values, where None is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onnxcomp.torch_bridge.operators.common import numbers
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

operator("SequenceConstruct")(lambda call, *inputs: list(inputs))
operator("SequenceEmpty")(lambda call: [])
operator("SequenceLength")(lambda call, values: torch.tensor(len(values)))
operator("Optional")(lambda call, value=None: value)
operator("OptionalGetElement")(lambda call, value: value)
operator("OptionalHasElement")(lambda call, value=None: torch.tensor(value is not None))


@operator("SequenceAt")
def _at(call: NodeCall, values: list[Tensor], place: Tensor) -> Tensor:
    return values[int(place)]


@operator("SequenceErase")
def _erase(call: NodeCall, values: list[Tensor], place: Tensor | None = None) -> list[Tensor]:
    index = (-1 if place is None else int(place)) % len(values)
    return values[:index] + values[index + 1 :]


@operator("SequenceInsert")
def _insert(call: NodeCall, values: list[Tensor], value: Tensor, place: Tensor | None = None) -> list[Tensor]:
    index = len(values) if place is None else int(place)
    index += len(values) if index < 0 else 0
    return [*values[:index], value, *values[index:]]


@operator("ConcatFromSequence")
def _concat(call: NodeCall, values: list[Tensor]) -> Tensor:
    axis = call.attrs["axis"]
    return torch.stack(values, axis) if call.get("new_axis", 0) else torch.cat(values, axis)


@operator("SplitToSequence")
def _split(call: NodeCall, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    axis = call.get("axis", 0)
    if sizes is None:
        return list(x.split(1, axis) if call.get("keepdims", 1) else x.unbind(axis))
    return list(x.split(int(sizes) if sizes.ndim == 0 else numbers(sizes), axis))


@operator("SequenceMap")
def _map(call: NodeCall, values: list[Tensor], *more: Any, body: Callable[..., list[Any]]) -> Any:
    rows = [
        body(*(each[index] if isinstance(each, list) else each for each in (values, *more)))
        for index in range(len(values))
    ]
    made = [list(column) for column in zip(*rows, strict=True)]
    return tuple(made) if len(made) != 1 else made[0]
