"""Control flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

Body = Callable[..., list[Any]]

WITHOUT_BATCH = 9
"""Since this opset Scan has no batch axis of its own."""


def _results(found: list[Any]) -> Any:
    return tuple(found) if len(found) != 1 else found[0]


@operator("If")
def _if(call: NodeCall, condition: Tensor, *, then_branch: Body, else_branch: Body) -> Any:
    return _results(then_branch() if bool(condition) else else_branch())


@operator("Loop")
def _loop(call: NodeCall, trips: Tensor | None = None, condition: Tensor | None = None, *state: Any, body: Body) -> Any:
    most = None if trips is None else int(trips)
    going = condition is None or bool(condition)
    held = list(state)
    made: list[list[Tensor]] = [[] for _ in range(len(call.wanted) - len(held))]
    step = 0
    while going and (most is None or step < most):
        more, *found = body(torch.tensor(step), torch.tensor(True), *held)
        held = found[: len(held)]
        for each, value in zip(made, found[len(held) :], strict=False):
            each.append(value)
        going = bool(more)
        step += 1
    return _results([*held, *(torch.stack(each) if each else torch.zeros(0) for each in made)])


@operator("Scan")
def _scan(call: NodeCall, *inputs: Any, body: Body) -> Any:
    if call.opset < WITHOUT_BATCH:
        return _scan_batches(call, *inputs, body=body)
    count = call.attrs["num_scan_inputs"]
    return _results(_scanned(call, list(inputs[:-count]), list(inputs[-count:]), body))


def _scanned(call: NodeCall, held: list[Any], scanned: list[Tensor], body: Body) -> list[Any]:
    outputs = len(call.wanted) - len(held)
    axes = call.get("scan_input_axes") or [0] * len(scanned)
    directions = call.get("scan_input_directions") or call.get("directions") or [0] * len(scanned)
    columns = [
        each.flip(axis).unbind(axis) if back else each.unbind(axis)
        for each, axis, back in zip(scanned, axes, directions, strict=True)
    ]
    made: list[list[Tensor]] = [[] for _ in range(outputs)]
    for row in zip(*columns, strict=True):
        found = body(*held, *row)
        held = found[: len(held)]
        for each, value in zip(made, found[len(held) :], strict=True):
            each.append(value)
    back = call.get("scan_output_directions") or [0] * outputs
    along = call.get("scan_output_axes") or [0] * outputs
    for each, turned in zip(made, back, strict=True):
        if turned:
            each.reverse()
    return [*held, *(torch.stack(each, axis) for each, axis in zip(made, along, strict=True))]


def _scan_batches(call: NodeCall, lengths: Tensor | None, *inputs: Tensor, body: Body) -> Any:
    """Scan of opset 8: each example of a batch on its own."""
    count = call.attrs["num_scan_inputs"]
    if lengths is not None:
        message = "Scan of opset 8 with lengths of its own for each example"
        raise NotImplementedError(message)
    examples = []
    for index in range(inputs[0].shape[0]):
        given = [each[index] for each in inputs]
        examples.append(_scanned(call, given[:-count], given[-count:], body))
    return _results([torch.stack(each) for each in zip(*examples, strict=True)])
