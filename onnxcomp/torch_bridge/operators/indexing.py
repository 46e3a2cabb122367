"""Values picked and put by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.common import UNSIGNED, numbers, type_of, wide
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []


def _positive(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front, in the type that torch wants."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather")
def _gather(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    if indices.ndim == 0:
        return x.select(axis, int(indices))
    if x.dtype in UNSIGNED:
        return _gather(call, x.to(torch.int64), indices).to(x.dtype)
    axis %= x.ndim
    places = _positive(indices, x.shape[axis])
    if axis == 0 and x.ndim == 2 and x.is_floating_point():
        return F.embedding(places, x)
    found = x.index_select(axis, places.reshape(-1))
    return found if indices.ndim == 1 else found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operator("GatherElements")
def _gather_elements(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return wide(lambda each: each.gather(axis, _positive(indices, x.shape[axis])), x)


@operator("GatherND")
def _gather_nd(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    batch, depth = call.get("batch_dims", 0), indices.shape[-1]
    indices = indices.long()
    front: list[Tensor] = []
    for axis in range(batch):
        shape = [1] * (indices.ndim - 1)
        shape[axis] = -1
        front.append(torch.arange(x.shape[axis]).reshape(shape))
    return x[(*front, *(indices[..., index] for index in range(depth)))]


REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _reduction(call: NodeCall) -> str | None:
    name = call.get("reduction", "none")
    return REDUCTIONS.get(name.decode() if isinstance(name, bytes) else name)


@operator("ScatterElements", "Scatter")
def _scatter_elements(call: NodeCall, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    places = _positive(indices, x.shape[axis])
    if x.dtype in UNSIGNED:
        wider = (each.to(torch.int64) for each in (x, indices, updates))
        return _scatter_elements(call, *wider).to(x.dtype)
    how = _reduction(call)
    return x.scatter(axis, places, updates) if how is None else x.scatter_reduce(axis, places, updates, how)


@operator("ScatterND")
def _scatter_nd(call: NodeCall, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if x.dtype in UNSIGNED:
        return _scatter_nd(call, x.to(torch.int64), indices, updates.to(torch.int64)).to(x.dtype)
    depth = indices.shape[-1]
    places = tuple(_positive(indices[..., axis], x.shape[axis]) for axis in range(depth))
    how = _reduction(call)
    if how in {None, "sum"}:
        return x.index_put(places, updates, accumulate=how == "sum")
    rows = torch.zeros_like(places[0])
    for place, size in zip(places, x.shape, strict=False):
        rows = rows * size + place
    inner = math.prod(x.shape[depth:])
    flat = x.reshape(-1, inner)
    index = rows.reshape(-1, 1).expand(-1, inner)
    return flat.scatter_reduce(0, index, updates.reshape(-1, inner), how).reshape(x.shape)


@operator("TensorScatter")
def _tensor_scatter(call: NodeCall, past: Tensor, update: Tensor, starts: Tensor | None = None) -> Tensor:
    axis = call.get("axis", -2) % past.ndim
    steps = torch.arange(update.shape[axis])
    begins = torch.zeros(past.shape[0], dtype=torch.int64) if starts is None else starts.reshape(-1)
    places = begins.reshape(-1, 1) + steps
    if call.get("mode", "linear") in {"circular", b"circular"}:
        places = places % past.shape[axis]
    shape = [1] * past.ndim
    shape[0], shape[axis] = places.shape
    return past.scatter(axis, places.reshape(shape).expand(update.shape), update)


@operator("Where")
def _where(call: NodeCall, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("OneHot")
def _one_hot(call: NodeCall, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    axis, count = call.get("axis", -1), int(depth)
    places = indices.long().unsqueeze(axis)
    shape = [1] * places.ndim
    shape[axis] = count
    hit = places % count == torch.arange(count).reshape(shape)
    hit = hit & (places >= -count) & (places < count)
    return torch.where(hit, values[1], values[0])


@operator("NonZero")
def _non_zero(call: NodeCall, x: Tensor) -> Tensor:
    return (x != 0).nonzero().T


@operator("Compress")
def _compress(call: NodeCall, x: Tensor, condition: Tensor) -> Tensor:
    chosen = condition.reshape(-1).nonzero().reshape(-1)
    axis = call.get("axis")
    return x.reshape(-1).index_select(0, chosen) if axis is None else x.index_select(axis, chosen)


@operator("TopK")
def _top_k(call: NodeCall, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    axis, count = call.get("axis", -1), int(call.attrs["k"] if k is None else k)
    if x.dtype in UNSIGNED:
        values, places = _top_k(call, x.to(torch.int64), k)
        return values.to(x.dtype), places
    # A stable sort, since of equal values the first is wanted first.
    values, places = torch.sort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@operator("Range")
def _range(call: NodeCall, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = (each.item() for each in (start, limit, delta))
    count = max(math.ceil((last - first) / step), 0)
    return (torch.arange(count) * step + first).to(start.dtype)


@operator("ConstantOfShape")
def _constant_of_shape(call: NodeCall, shape: Tensor) -> Tensor:
    value = call.get("value")
    if value is None:
        return torch.zeros(numbers(shape))
    return value.reshape(()).expand(numbers(shape)).contiguous()


@operator("EyeLike")
def _eye_like(call: NodeCall, x: Tensor) -> Tensor:
    dtype = type_of(call, "dtype") if "dtype" in call.attrs else x.dtype
    rows, columns = x.shape
    return (torch.arange(columns) - torch.arange(rows)[:, None] == call.get("k", 0)).to(dtype)


@operator("Unique")
def _unique(call: NodeCall, x: Tensor) -> tuple[Tensor, ...]:
    axis = call.get("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=axis)
    size = x.shape[axis]
    first = torch.full((len(counts),), size).scatter_reduce(0, inverse, torch.arange(size), "amin")
    if not call.get("sorted", 1):
        order = first.argsort()
        values, first, counts = values.index_select(axis, order), first[order], counts[order]
        inverse = order.argsort()[inverse]
    return values, first, inverse, counts


@operator("HannWindow", "HammingWindow", "BlackmanWindow")
def _window(call: NodeCall, size: Tensor) -> Tensor:
    count = int(size)
    turns = count if call.get("periodic", 1) else count - 1
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / max(turns, 1))
    first, second, third = WINDOWS[call.op]
    found = first - second * torch.cos(angles) + third * torch.cos(2 * angles)
    return found.to(type_of(call, "output_datatype"))


WINDOWS = {"HannWindow": (0.5, 0.5, 0.0), "HammingWindow": (25 / 46, 21 / 46, 0.0), "BlackmanWindow": (0.42, 0.5, 0.08)}


@operator("GridSample")
def _grid_sample(call: NodeCall, x: Tensor, grid: Tensor) -> Tensor:
    mode, padding = (_text(call.get(key, default)) for key, default in (("mode", "linear"), ("padding_mode", "zeros")))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid, mode, padding, bool(call.get("align_corners", 0)))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
