"""Poolings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.convolution import CONVOLUTIONS
from onnxcomp.torch_bridge.operators.windows import Windows, flat_pads, windows_of
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

MAX_POOLS: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _reach(call: NodeCall, sizes: Sequence[int], windows: Windows) -> list[int]:
    """How far behind the input the last windows reach, by axis; below 0 where they end before it does."""
    found = []
    for axis, size in enumerate(sizes):
        span = (windows.kernel[axis] - 1) * windows.dilations[axis] + 1
        stride, before = windows.strides[axis], windows.before[axis]
        room = size + before + windows.after[axis] - span
        count = room // stride + 1
        if call.get("ceil_mode", 0):
            count = -(-room // stride) + 1
            if (count - 1) * stride >= size + before:  # a window may not begin behind the input
                count -= 1
        found.append((count - 1) * stride + span - size - before)
    return found


@operator("MaxPool")
def _max_pool(call: NodeCall, x: Tensor) -> Any:
    if not x.is_floating_point():
        found = _max_pool(call, x.double())
        return (found[0].to(x.dtype), found[1]) if isinstance(found, tuple) else found.to(x.dtype)
    kernel = call.attrs["kernel_shape"]
    windows = windows_of(call, x.shape[2:], kernel, cuts=True)
    function = MAX_POOLS[len(kernel)]
    indices = len(call.wanted) > 1 and call.wanted[1]
    small = all(2 * pad <= size for pad, size in zip(windows.before, kernel, strict=True))
    if windows.symmetric and small and not call.get("ceil_mode", 0) and not indices:
        return function(x, kernel, windows.strides, windows.before, windows.dilations)
    padded = F.pad(x, flat_pads(windows.before, _reach(call, x.shape[2:], windows)), value=-math.inf)
    found = function(padded, kernel, windows.strides, 0, windows.dilations, return_indices=bool(indices))
    if not indices:
        return found
    return found[0], _places(call, found[1], padded.shape[2:], x.shape, windows.before)


def _places(call: NodeCall, flat: Tensor, padded: Sequence[int], shape: Sequence[int], before: Sequence[int]) -> Tensor:
    """Flat places inside of a padded image, as those in the whole input."""
    coordinates = []
    for size, low in zip(reversed(padded), reversed(before), strict=True):
        coordinates.append(flat % size - low)
        flat = flat // size
    coordinates.reverse()
    sizes = list(shape[2:])
    if call.get("storage_order", 0):
        coordinates.reverse()
        sizes.reverse()
    place = torch.zeros_like(flat)
    for each, size in zip(coordinates, sizes, strict=True):
        place = place * size + each
    planes = torch.arange(shape[0] * shape[1]).reshape(shape[0], shape[1], *[1] * len(sizes))
    return planes * math.prod(sizes) + place


@operator("AveragePool")
def _average_pool(call: NodeCall, x: Tensor) -> Tensor:
    kernel = call.attrs["kernel_shape"]
    windows = windows_of(call, x.shape[2:], kernel, cuts=True)
    inside = bool(call.get("count_include_pad", 0))
    small = all(2 * pad <= size for pad, size in zip(windows.before, kernel, strict=True))
    plain = not call.get("ceil_mode", 0) and set(windows.dilations) == {1}
    if windows.symmetric and small and plain:
        return AVERAGE_POOLS[len(kernel)](
            x, kernel, windows.strides, windows.before, count_include_pad=inside, ceil_mode=False
        )
    reach = _reach(call, x.shape[2:], windows)
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    if inside:
        counted = [min(low, high) for low, high in zip(windows.after, reach, strict=True)]
        ones = F.pad(ones, flat_pads(windows.before, counted), value=1.0)
        left = [high - low for low, high in zip(counted, reach, strict=True)]
        counts = _window_sums(F.pad(ones, flat_pads([0] * len(left), left)), windows)
    else:
        counts = _window_sums(F.pad(ones, flat_pads(windows.before, reach)), windows)
    return _window_sums(F.pad(x, flat_pads(windows.before, reach)), windows) / counts


def _window_sums(x: Tensor, windows: Windows) -> Tensor:
    """The sum of each window of each plane."""
    weight = torch.ones(1, 1, *windows.kernel, dtype=x.dtype)
    planes = x.reshape(-1, 1, *x.shape[2:])
    found = CONVOLUTIONS[len(windows.kernel)](planes, weight, None, windows.strides, 0, windows.dilations)
    return found.reshape(*x.shape[:2], *found.shape[2:])


@operator("LpPool")
def _lp_pool(call: NodeCall, x: Tensor) -> Tensor:
    windows = windows_of(call, x.shape[2:], call.attrs["kernel_shape"], cuts=True)
    power = call.get("p", 2)
    padded = F.pad(x, flat_pads(windows.before, _reach(call, x.shape[2:], windows)))
    return _window_sums(padded.abs().pow(power), windows).pow(1 / power)


@operator("GlobalAveragePool")
def _global_average_pool(call: NodeCall, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(call: NodeCall, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalLpPool")
def _global_lp_pool(call: NodeCall, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call.get("p", 2), tuple(range(2, x.ndim)), keepdim=True)


@operator("MaxUnpool")
def _max_unpool(call: NodeCall, x: Tensor, indices: Tensor, shape: Tensor | None = None) -> Tensor:
    kernel = call.attrs["kernel_shape"]
    windows = windows_of(call, x.shape[2:], kernel, cuts=True)
    natural = [
        (size - 1) * windows.strides[axis] + kernel[axis] - windows.before[axis] - windows.after[axis]
        for axis, size in enumerate(x.shape[2:])
    ]
    # The indices are those of the natural size; another output shape adds to it behind.
    flat = torch.zeros(math.prod([*x.shape[:2], *natural]), dtype=x.dtype)
    found = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(*x.shape[:2], *natural)
    if shape is None:
        return found
    more = [wanted - size for wanted, size in zip(shape.tolist()[2:], natural, strict=True)]
    return F.pad(found, flat_pads([0] * len(more), more))
