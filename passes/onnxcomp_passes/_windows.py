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

__all__ = ["Fit", "Products", "Sums", "Window", "gather_products", "products_bytes", "read_tensor", "with_ones"]

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
        rows = _chosen(windows, len(axes))  # of (samples, channels, *places, *kernel)
        return np.moveaxis(rows.reshape(len(rows), self.groups, -1), 1, 0)

    def results(self, array: Array) -> Array:
        """What came out of the layer for each of the `rows`, shape (rows, outputs)."""
        values = np.asarray(array, np.float32)
        return _chosen(values, len(self.kernel)) if self.kernel else values.reshape(-1, values.shape[-1])

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


def _chosen(values: Array, axes: int) -> Array:
    """The places of (samples, channels, *places, ...) that are looked at, shape (rows, channels, ...)."""
    flat = np.moveaxis(values, 1, 1 + axes)
    places = flat.shape[: 1 + axes]
    return np.asarray(flat[np.unravel_index(_spread(int(np.prod(places))), places)])


def _spread(count: int) -> Array:
    """So many places of a list that are looked at; a step prime to common widths falls on every column."""
    if count <= MAX_ROWS:
        return np.arange(count)
    return np.random.default_rng(count).choice(count, MAX_ROWS, replace=False)


def with_ones(rows: Array) -> Array:
    """Rows with a 1 behind each, for what a bias does."""
    return np.concatenate([rows, np.ones((*rows.shape[:-1], 1), rows.dtype)], axis=-1)


class Products:
    """Sums X^T X for each way that layers read one tensor. Runs in the worker.

    Args:
        windows: The ways.
        ones: Whether X has a last column of ones, for means.

    Attributes:
        totals: For each way the sum, float64 of shape (groups, inputs, inputs); empty before the first run.
        counts: For each way, rows seen.

    Example:
        >>> watch = Products([Window()])
        >>> watch.update(np.array([[1.0, 2.0], [3.0, 0.0]], np.float32))
        >>> watch.totals[0].tolist(), watch.counts
        ([[[10.0, 2.0], [2.0, 4.0]]], [2])
    """

    def __init__(self, windows: Sequence[Window], *, ones: bool = False) -> None:
        self.windows = tuple(windows)
        self.ones = ones
        self.totals: list[Array] = [np.zeros((0, 0, 0))] * len(self.windows)
        self.counts = [0] * len(self.windows)

    def update(self, array: Array) -> None:
        """Take in one run's values; rows with NaN or infinity are left out."""
        for index, window in enumerate(self.windows):
            rows = window.rows(array)
            finite = np.isfinite(rows).all(axis=(0, 2))
            rows = rows if finite.all() else rows[:, finite]
            rows = with_ones(rows) if self.ones else rows
            total = np.einsum("gri,grj->gij", rows, rows, optimize=True).astype(np.float64)
            self.totals[index] = self.totals[index] + total if self.totals[index].size else total
            self.counts[index] += rows.shape[1]


class Fit:
    """Sums what a least-squares fit of one layer needs: its inputs in one model, its results in another.

    Samples go to two halves in turn, so that what is fitted on the one can be judged on the other. Runs in the worker.

    Args:
        window: How the layer reads its input; without groups.

    Attributes:
        halves: The sums of each half.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.halves = (Sums(), Sums())
        self._samples = 0

    def update(self, reference: Array, candidate: Array) -> None:
        """Take in what the layer gives in the one model and reads in the other; samples lie along the first axis."""
        for half in range(2):
            part = slice((half + self._samples) % 2, None, 2)
            if len(candidate[part]):
                rows, results = self.window.rows(candidate[part])[0], self.window.results(reference[part])
                self.halves[half].add(with_ones(rows), results)
        self._samples += len(candidate)


class Sums:
    """What least squares needs of rows x and results y.

    Attributes:
        inputs: Sum of x x^T, float64 of shape (inputs, inputs).
        results: Sum of x y^T, shape (inputs, outputs).
        energy: Sum of y^2 of each output.
        count: Rows seen.

    Example:
        >>> sums = Sums()
        >>> sums.add(np.array([[2.0], [4.0]]), np.array([[1.0], [2.0]]))
        >>> (sums.results / sums.inputs).tolist(), sums.error(np.array([[0.5]]))
        ([[0.5]], 0.0)
    """

    def __init__(self) -> None:
        self.inputs = np.zeros((0, 0))
        self.results = np.zeros((0, 0))
        self.energy = np.zeros(0)
        self.count = 0

    def add(self, rows: Array, results: Array) -> None:
        """Take in more rows; those with NaN or infinity are left out."""
        finite = np.isfinite(rows).all(axis=1) & np.isfinite(results).all(axis=1)
        rows, results = rows[finite].astype(np.float64), results[finite].astype(np.float64)
        found = rows.T @ rows, rows.T @ results, np.square(results).sum(axis=0)
        if self.inputs.size:
            found = self.inputs + found[0], self.results + found[1], self.energy + found[2]
        self.inputs, self.results, self.energy = found
        self.count += len(rows)

    def error(self, weights: Array) -> float:
        """The sum of squared errors of y = x @ weights."""
        both = np.sum(weights * (self.inputs @ weights - 2 * self.results))
        return float(both + self.energy.sum())


def read_tensor(view: WeightView, main: set[int]) -> gs.Tensor | None:
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


def gather_products(
    model: Model, views: Sequence[WeightView], context: Context, *, ones: bool = False
) -> dict[str, Array]:
    """X^T X of the inputs of layers, divided by the number of rows.

    Args:
        model: The model that the views are of.
        views: The layers' weights; those whose input cannot be observed are left out.
        context: Its data and runtime are used.
        ones: Whether X has a last column of ones.

    Returns:
        Weight name -> float64 of shape (groups, inputs, inputs), or one more of each with ones.
    """
    assert context.runtime is not None
    assert context.workdir is not None
    assert context.data is not None
    main = {id(node) for node in model.graph.nodes}
    wanted: dict[str, list[Window]] = {}
    places: dict[str, tuple[str, int]] = {}
    for view in views:
        tensor = read_tensor(view, main)
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
    observers = {name: Products(ways, ones=ones) for name, ways in wanted.items()}
    seen = context.runtime.observe(path, context.data.feeds, observers)
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    found = {}
    for name, (tensor_name, index) in places.items():
        total, count = seen[tensor_name].totals[index], seen[tensor_name].counts[index]
        if count and np.any(total):
            found[name] = total / count
    return found
