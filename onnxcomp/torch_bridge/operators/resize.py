"""Resize: each axis on its own, as picked places or as a product with a matrix of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

Array = np.ndarray[Any, Any]

SAME_MODES: dict[tuple[str, str], dict[str, Any]] = {
    ("nearest", "asymmetric"): {"mode": "nearest"},
    ("linear", "half_pixel"): {"align_corners": False},
    ("linear", "pytorch_half_pixel"): {"align_corners": False},
    ("linear", "align_corners"): {"align_corners": True},
    ("cubic", "half_pixel"): {"align_corners": False},
    ("cubic", "pytorch_half_pixel"): {"align_corners": False},
    ("cubic", "align_corners"): {"align_corners": True},
}
"""Mode and coordinates -> what torch's interpolate calls that."""

TORCH_CUBIC = -0.75
"""The coefficient of torch's bicubic interpolation."""

FIRST_WITH_MODES = 11
"""Since this opset a node says how coordinates are transformed."""


@dataclass(frozen=True)
class _Way:
    """How an axis is resized."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    outside: bool
    antialias: bool


@dataclass(frozen=True)
class _Axis:
    """One axis: sizes, the scale between them, and the region that is read (tf_crop_and_resize)."""

    size: int
    out: int
    scale: float
    start: float = 0.0
    end: float = 1.0


@operator("Resize", "Upsample")
def _resize(call: NodeCall, x: Tensor, *inputs: Tensor | None) -> Tensor:
    way = _way(call)
    axes = [axis for axis in _axes(call, x.shape, inputs) if axis is not None]
    found = _by_torch(way, x, axes)
    if found is not None:
        return found
    for index, axis in enumerate(axes):
        if axis.size != axis.out or axis.scale != 1 or (axis.start, axis.end) != (0.0, 1.0):
            x = _resized(way, x, index, axis, call.get("extrapolation_value", 0.0))
    return x


def _way(call: NodeCall) -> _Way:
    def text(key: str, default: str) -> str:
        value = call.get(key, default)
        return value.decode() if isinstance(value, bytes) else value

    old = call.opset < FIRST_WITH_MODES
    return _Way(
        text("mode", "nearest"),
        "asymmetric" if old else text("coordinate_transformation_mode", "half_pixel"),
        "floor" if old else text("nearest_mode", "round_prefer_floor"),
        call.get("cubic_coeff_a", TORCH_CUBIC),
        bool(call.get("exclude_outside", 0)),
        bool(call.get("antialias", 0)),
    )


def _axes(call: NodeCall, shape: Sequence[int], inputs: Sequence[Tensor | None]) -> list[_Axis]:
    """What happens to each axis, from the roi, the scales or the sizes."""
    given: list[Tensor | None] = [*inputs, None, None, None]
    roi, scales, sizes = (None, given[0], None) if call.opset < FIRST_WITH_MODES else given[:3]
    along = [axis % len(shape) for axis in call.get("axes") or range(len(shape))]
    region = [] if roi is None else [float(each) for each in roi.tolist()]
    axes = [_Axis(size, size, 1.0) for size in shape]
    factors = call.get("scales") if scales is None or not scales.numel() else scales.tolist()
    wanted = None if sizes is None or not sizes.numel() else sizes.tolist()
    if wanted is not None:
        factors = [size / shape[axis] for axis, size in zip(along, wanted, strict=True)]
        policy = call.get("keep_aspect_ratio_policy", "stretch")
        policy = policy.decode() if isinstance(policy, bytes) else policy
        if policy != "stretch":
            one = min(factors) if policy == "not_larger" else max(factors)
            factors = [one] * len(along)
            wanted = [int(one * shape[axis] + 0.5) for axis in along]
    for place, axis in enumerate(along):
        start, end = (region[place], region[place + len(along)]) if region else (0.0, 1.0)
        cropped = call.get("coordinate_transformation_mode") in {"tf_crop_and_resize", b"tf_crop_and_resize"}
        if not cropped:
            start, end = 0.0, 1.0
        factor = float(factors[place])
        span = (end - start) * shape[axis]
        out = int(wanted[place]) if wanted is not None else int(np.floor(np.float32(span) * np.float32(factor)))
        axes[axis] = _Axis(shape[axis], out, factor, start, end)
    return axes


def _by_torch(way: _Way, x: Tensor, axes: Sequence[_Axis]) -> Tensor | None:
    """The interpolation of torch, where it does the same."""
    more = SAME_MODES.get((way.mode, way.coordinates))
    rank = x.ndim - 2
    if more is None or rank not in {1, 2, 3} or way.antialias or way.outside or not x.is_floating_point():
        return None
    if any(axis.size != axis.out for axis in axes[:2]) or (
        way.mode == "cubic" and (rank != 2 or way.cubic != TORCH_CUBIC)
    ):
        return None
    if any(axis.out == 1 or axis.size * axis.scale != axis.out for axis in axes[2:]):
        return None  # from other scales than those of the sizes, coordinates differ
    sizes = [axis.out for axis in axes[2:]]
    if way.mode == "nearest":
        whole = all(axis.scale == int(axis.scale) for axis in axes[2:])
        return F.interpolate(x, sizes, mode="nearest") if whole and way.nearest == "floor" else None
    mode = "bicubic" if way.mode == "cubic" else {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]
    return F.interpolate(x, sizes, mode=mode, **more)


def _resized(way: _Way, x: Tensor, index: int, axis: _Axis, extrapolation: float) -> Tensor:
    places = _coordinates(way.coordinates, axis)
    if way.mode == "nearest":
        chosen = np.clip(_rounded(places, way.nearest), 0, axis.size - 1).astype(np.int64)
        found = x.index_select(index, torch.from_numpy(chosen))
    else:
        weights = torch.from_numpy(_weights(way, axis)).to(x.dtype if x.is_floating_point() else torch.float64)
        found = torch.matmul(x.to(weights.dtype).movedim(index, -1), weights.T).movedim(-1, index)
        found = found if x.is_floating_point() else _whole(found, x.dtype)
    if way.coordinates == "tf_crop_and_resize":
        shape = [1] * x.ndim
        shape[index] = -1
        outside = torch.from_numpy((places < 0) | (places > axis.size - 1)).reshape(shape)
        found = torch.where(outside, torch.tensor(extrapolation, dtype=x.dtype), found)
    return found


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return x.clamp(limits.min, limits.max).to(dtype)


def _coordinates(mode: str, axis: _Axis) -> Array:
    """Where each place of the output lies in the input, in float32 as runtimes have it: the nearest depends on it."""
    scale = np.float32(axis.scale)
    out = np.arange(axis.out, dtype=np.float32)
    span = axis.out if mode == "half_pixel_symmetric" else 0
    if mode == "asymmetric":
        return out / scale
    if mode == "align_corners":
        return out * (axis.size - 1) / (axis.out - 1) if axis.out > 1 else np.zeros_like(out)
    if mode == "pytorch_half_pixel" and axis.out == 1:
        return np.full_like(out, -0.5)
    if mode == "tf_half_pixel_for_nn":
        return (out + 0.5) / scale
    if mode == "tf_crop_and_resize":
        first, last = axis.start * (axis.size - 1), axis.end * (axis.size - 1)
        return first + out * (last - first) / (axis.out - 1) if axis.out > 1 else np.full_like(out, (first + last) / 2)
    places = (out + 0.5) / scale - 0.5
    if span:
        places += axis.size / 2 * (1 - span / (scale * axis.size))
    return places


def _rounded(places: Array, mode: str) -> Array:
    if mode == "round_prefer_floor":
        return np.ceil(places - 0.5)
    if mode == "round_prefer_ceil":
        return np.floor(places + 0.5)
    return np.floor(places) if mode == "floor" else np.ceil(places)


@lru_cache(maxsize=256)
def _weights(way: _Way, axis: _Axis) -> Array:
    """The weight (out, in) of each place of the input for each of the output."""
    places = _coordinates(way.coordinates, axis)
    shrink = min(axis.scale, 1.0) if way.antialias else 1.0
    kernel, reach = (_triangle, 1.0) if way.mode == "linear" else (_cubic(way.cubic), 2.0)
    low = np.floor(places - reach / shrink).astype(np.int64)
    taps = low[:, None] + np.arange(int(np.ceil(2 * reach / shrink)) + 2)
    weights = kernel((taps - places[:, None]) * shrink)
    if way.outside:
        weights = np.where((taps >= 0) & (taps < axis.size), weights, 0)
    sums = weights.sum(1, keepdims=True)
    weights = weights / np.where(sums == 0, 1, sums)
    found = np.zeros((axis.out, axis.size))
    rows = np.broadcast_to(np.arange(axis.out)[:, None], taps.shape)
    np.add.at(found, (rows, np.clip(taps, 0, axis.size - 1)), weights)
    return found


def _triangle(distance: Array) -> Array:
    return np.asarray(np.maximum(1 - np.abs(distance), 0))


def _cubic(a: float) -> Callable[[Array], Array]:
    def kernel(distance: Array) -> Array:
        d = np.abs(distance)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0)))

    return kernel
