"""What layers are multiplied with: X^T X of the inputs of MatMul and Gemm, and of a Conv's windows.

Gathered from calibration data in the worker, in memory that does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes._views import WeightView

__all__ = ["Products", "Window", "gather_products", "products_bytes"]

Array = np.ndarray[Any, Any]

PRODUCTS = frozenset({"MatMul", "MatMulInteger"})

MAX_ROWS = 4096
"""Windows of one run that are looked at, spread evenly: neighbours see nearly the same."""


@dataclass(frozen=True)
class Window:
    """How a layer reads its input; for a MatMul or Gemm all is empty and there is one group.

    Attributes:
        kernel: Sizes of the window.
        strides: Steps between windows.
        dilations: Steps inside a window.
        pads: Zeros before and after, by axis; None: as many as keep ceil(size / stride) windows.
        low: Where an odd number of such zeros has the greater part: before, as SAME_LOWER says.
        groups: Of channels that are read apart.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] | None = ()
    low: bool = False
    groups: int = 1

    @staticmethod
    def of(node: gs.Node, shape: Sequence[int]) -> Window:
        """The window of a node with a weight of this shape."""
        if node.op != "Conv":
            return Window()
        kernel = tuple(int(size) for size in shape[2:])
        ones, mode = [1] * len(kernel), node.attrs.get("auto_pad", "NOTSET")
        pads = node.attrs.get("pads", [0] * (2 * len(kernel))) if mode == "NOTSET" else [0] * (2 * len(kernel))
        return Window(
            kernel,
            tuple(map(int, node.attrs.get("strides", ones))),
            tuple(map(int, node.attrs.get("dilations", ones))),
            None if mode.startswith("SAME") else tuple(map(int, pads)),
            mode == "SAME_LOWER",
            int(node.attrs.get("group", 1)),
        )

    def rows(self, array: Array) -> Array:
        """The vectors that the weight is multiplied with, shape (groups, rows, inputs of a group)."""
        if not self.kernel:
            return np.asarray(array, np.float32).reshape(1, -1, array.shape[-1])
        values = np.pad(np.asarray(array, np.float32), ((0, 0), (0, 0), *self._padding(array.shape[2:])))
        spans = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        axes = tuple(range(2, values.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(values, spans, axes)
        steps = (slice(None, None, step) for step in (1, 1, *self.strides, *self.dilations))
        windows = windows[tuple(steps)]
        places = windows.shape[2 : 2 + len(axes)]  # (samples, channels, *places, *kernel)
        flat = np.moveaxis(windows, 1, 1 + len(axes))
        chosen = np.unravel_index(_spread(flat.shape[0] * int(np.prod(places))), (flat.shape[0], *places))
        rows = flat[chosen].reshape(len(chosen[0]), self.groups, -1)
        return np.moveaxis(rows, 1, 0)

    def _padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        if self.pads is not None:
            half = len(self.pads) // 2
            return list(zip(self.pads[:half], self.pads[half:], strict=True))
        padding = []
        for size, kernel, step, dilation in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max(0, (-(-size // step) - 1) * step + (kernel - 1) * dilation + 1 - size)
            less, more = total // 2, total - total // 2
            padding.append((more, less) if self.low else (less, more))
        return padding


def _spread(count: int) -> Array:
    """So many places of a list that are looked at; a step prime to common widths falls on every column."""
    if count <= MAX_ROWS:
        return np.arange(count)
    return np.random.default_rng(count).choice(count, MAX_ROWS, replace=False)


class Products:
    """Sums X^T X for each way that layers read one tensor. Runs in the worker.

    Args:
        windows: The ways.

    Attributes:
        totals: For each way the sum, float64 of shape (groups, inputs, inputs); empty before the first run.
        counts: For each way, rows seen.

    Example:
        >>> watch = Products([Window()])
        >>> watch.update(np.array([[1.0, 2.0], [3.0, 0.0]], np.float32))
        >>> watch.totals[0].tolist(), watch.counts
        ([[[10.0, 2.0], [2.0, 4.0]]], [2])
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = tuple(windows)
        self.totals: list[Array] = [np.zeros((0, 0, 0))] * len(self.windows)
        self.counts = [0] * len(self.windows)

    def update(self, array: Array) -> None:
        """Take in one run's values; rows with NaN or infinity are left out."""
        for index, window in enumerate(self.windows):
            rows = window.rows(array)
            finite = np.isfinite(rows).all(axis=(0, 2))
            rows = rows if finite.all() else rows[:, finite]
            total = np.einsum("gri,grj->gij", rows, rows, optimize=True).astype(np.float64)
            self.totals[index] = self.totals[index] + total if self.totals[index].size else total
            self.counts[index] += rows.shape[1]


def _read_tensor(view: WeightView, main: set[int]) -> gs.Tensor | None:
    """The tensor that a layer multiplies its weight with, where that is observable and all that is done with it."""
    node = view.node
    if node.op not in {"Conv", "Gemm", *PRODUCTS} or view.index != 1 or node.attrs.get("transA", 0):
        return None
    if node.op in PRODUCTS and len(view.shape) != 2:
        return None
    used, data = node.inputs[view.index], node.inputs[0]
    if len(used.outputs) != 1 or id(node) not in main or isinstance(data, gs.Constant):
        return None
    if node.op == "MatMulInteger":
        maker = data.inputs[0] if data.inputs else None
        return maker.inputs[0] if maker is not None and maker.op == "DynamicQuantizeLinear" else None
    return data


def products_bytes(view: WeightView) -> int:
    """What the products of a layer take in memory."""
    groups = int(view.node.attrs.get("group", 1)) if view.node.op == "Conv" else 1
    inputs = int(np.prod(view.shape[1:])) if view.node.op == "Conv" else max(view.shape)
    return 8 * groups * inputs**2


def gather_products(model: Model, views: Sequence[WeightView], context: Context) -> dict[str, Array]:
    """X^T X of the inputs of layers, divided by the number of rows.

    Args:
        model: The model that the views are of.
        views: The layers' weights; those whose input cannot be observed are left out.
        context: Its data and runtime are used.

    Returns:
        Weight name -> float64 of shape (groups, inputs, inputs).
    """
    assert context.runtime is not None
    assert context.workdir is not None
    assert context.data is not None
    main = {id(node) for node in model.graph.nodes}
    wanted: dict[str, list[Window]] = {}
    places: dict[str, tuple[str, int]] = {}
    for view in views:
        tensor = _read_tensor(view, main)
        if tensor is None:
            continue
        window = Window.of(view.node, view.shape)
        ways = wanted.setdefault(str(tensor.name), [])
        if window not in ways:
            ways.append(window)
        places[view.name] = str(tensor.name), ways.index(window)
    path = context.workdir / "products.onnx"
    model.save(path)
    context.progress(f"gathering what {len(places)} layers are multiplied with")
    observers = {name: Products(ways) for name, ways in wanted.items()}
    seen = context.runtime.observe(path, context.data.feeds, observers)
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    found = {}
    for name, (tensor_name, index) in places.items():
        total, count = seen[tensor_name].totals[index], seen[tensor_name].counts[index]
        if count and np.any(total):
            found[name] = total / count
    return found
