"""What layers are multiplied with: X^T X of the inputs of MatMul and Gemm, and of a Conv's windows.

Gathered from calibration data in the worker, in memory that does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes._views import WeightView

__all__ = ["Moments", "Products", "Window", "affordable", "gather_products", "inputs_of", "products_bytes"]

Array = np.ndarray[Any, Any]

PRODUCTS = frozenset({"MatMul", "MatMulInteger"})

MOST_BYTES = 1 << 30
"""Of products that are held at a time."""

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
        samples, channels, *sizes = array.shape
        padding, steps = self._padding(sizes), zip(self.kernel, self.dilations, strict=True)
        spans = [(size - 1) * step + 1 for size, step in steps]
        ends = zip(sizes, padding, spans, self.strides, strict=True)
        counts = [(size + sum(pads) - span) // step + 1 for size, pads, span, step in ends]
        shape = (samples, *counts)
        sample, *places = np.unravel_index(_spread(int(np.prod(shape))), shape)
        firsts = [place * step - pads[0] for place, step, pads in zip(places, self.strides, padding, strict=True)]
        index, inside = self._inner(firsts, sizes)
        # Only what is looked at is copied: with its pads, the input of a large convolution would be as large again.
        found = array.reshape(samples, channels, -1)[sample[:, None], :, index]  # (rows, places of a window, channels)
        found = np.where(inside[:, :, None], found, 0).astype(np.float32, copy=False)
        rows = found.swapaxes(1, 2).reshape(len(sample), self.groups, index.shape[1] * channels // self.groups)
        return np.moveaxis(rows, 1, 0)

    def _inner(self, firsts: Sequence[Array], sizes: Sequence[int]) -> tuple[Array, Array]:
        """The places that windows read, flat, and whether they are inside the input; shape (windows, places)."""
        rank, count = len(sizes), len(firsts[0])
        index, inside = np.zeros((count, *[1] * rank), np.intp), np.ones((count, *[1] * rank), bool)
        for axis, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            steps = (np.arange(self.kernel[axis]) * self.dilations[axis]).reshape(-1, *[1] * (rank - axis - 1))
            along = first.reshape(-1, *[1] * rank) + steps
            inside = inside & (along >= 0) & (along < size)
            index = index * size + np.clip(along, 0, size - 1)
        return index.reshape(count, -1), inside.reshape(count, -1)

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
    return np.sort(np.random.default_rng(count).choice(count, MAX_ROWS, replace=False))


@dataclass(frozen=True)
class Moments:
    """Second and first moments of what a layer is multiplied with; all are means over rows, float64.

    Attributes:
        products: X'^T X' of the inputs that it gets, shape (groups, inputs, inputs).
        cross: X'^T X with those of the original model; the same array where they are the same.
        means: Of X', shape (groups, inputs).
        original_means: Of X.
        count: Rows that the means are over.
    """

    products: Array
    cross: Array
    means: Array
    original_means: Array
    count: int

    def centred(self) -> Moments:
        """What is left of the products where a bias takes care of the means."""
        products = self.products - self.means[:, :, None] * self.means[:, None, :]
        same = self.cross is self.products
        cross = products if same else self.cross - self.means[:, :, None] * self.original_means[:, None, :]
        return Moments(products, cross, self.means, self.original_means, self.count)


class Products:
    """Sums over many runs for each way that layers read one tensor. Runs in the worker.

    Args:
        windows: The ways.

    Example:
        >>> watch = Products([Window()])
        >>> watch.update(np.array([[1.0, 2.0], [3.0, 0.0]], np.float32))
        >>> watch.moments(0).products.tolist()
        [[[5.0, 1.0], [1.0, 2.0]]]
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = tuple(windows)
        self._sums: list[tuple[Array, ...] | None] = [None] * len(self.windows)
        self._shifts: list[tuple[Array, ...]] = [()] * len(self.windows)
        self._counts = [0] * len(self.windows)

    def update(self, original: Array, now: Array | None = None) -> None:
        """Take in one run's values; rows with NaN or infinity are left out, and a run whose lengths differ.

        Args:
            original: The tensor in the original model.
            now: That in the model which is pruned; None: the same.
        """
        for index, window in enumerate(self.windows):
            rows = [window.rows(array) for array in (original, now) if array is not None]
            if rows[0].shape[1] != rows[-1].shape[1]:
                continue  # a model may round to other lengths, such as those of sounds; no row has its like then
            finite = np.logical_and.reduce([np.isfinite(each).all(axis=(0, 2)) for each in rows])
            rows = rows if finite.all() else [each[:, finite] for each in rows]
            if not rows[0].shape[1]:
                continue
            # Sums about the first run's mean: float32 sums about zero lose the variance of inputs that hardly vary.
            if self._sums[index] is None:
                self._shifts[index] = tuple(each.mean(axis=1, keepdims=True) for each in rows)
            rows = [each - shift for each, shift in zip(rows, self._shifts[index], strict=True)]
            last = rows[-1].swapaxes(1, 2)
            parts = [part for each in rows for part in (last @ each, each.sum(axis=1))]
            sums, known = [part.astype(np.float64) for part in parts], self._sums[index]
            self._sums[index] = tuple(sums if known is None else map(np.add, known, sums))
            self._counts[index] += rows[0].shape[1]

    def moments(self, way: int) -> Moments | None:
        """The means for one of the ways; None before the first row, and where all are zero."""
        sums, count = self._sums[way], self._counts[way]
        if sums is None:
            return None
        parts = [part / count for part in sums]
        shifts = [shift[:, 0].astype(np.float64) for shift in self._shifts[way]]
        off, last = parts[-1], shifts[-1]
        means = [own + shift for own, shift in zip(parts[1::2], shifts, strict=True)]
        products = [
            part + off[:, :, None] * shift[:, None, :] + last[:, :, None] * mean[:, None, :]
            for part, shift, mean in zip(parts[::2], shifts, means, strict=True)
        ]  # the first are those with the original's, the last its own: one and the same without another model
        found = Moments(products[-1], products[0], means[-1], means[0], count)
        return found if found.products.any() else None


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


def affordable(views: Sequence[WeightView]) -> list[WeightView]:
    """The layers whose products fit into memory together, the small ones first."""
    found, total = [], 0
    for view in sorted(views, key=products_bytes):
        total += products_bytes(view)
        if total <= MOST_BYTES:
            found.append(view)
    return found


def gather_products(
    model: Model, views: Sequence[WeightView], context: Context, original: Model | None = None
) -> dict[str, Moments]:
    """Moments of the inputs of layers; once time is up, of the samples that were run by then, one batch at least.

    Args:
        model: The model that the views are of.
        views: The layers' weights; those whose input cannot be observed are left out.
        context: Its data and runtime are used.
        original: The same graph with the weights that outputs are right with; None: the model itself.

    Returns:
        By the names of the weights.
    """
    assert context.runtime is not None
    assert context.workdir is not None
    assert context.data is not None
    wanted: dict[str, list[Window]] = {}
    places: dict[str, tuple[str, int]] = {}
    read, by_name = inputs_of(model, views), {view.name: view for view in views}
    for name, tensor in read.items():
        window = Window.of(by_name[name].node, by_name[name].shape)
        ways = wanted.setdefault(tensor, [])
        if window not in ways:
            ways.append(window)
        places[name] = tensor, ways.index(window)
    context.progress(f"gathering what {len(places)} layers are multiplied with")
    seen = _observed(model, {name: Products(ways) for name, ways in wanted.items()}, context, original)
    found = {name: seen[tensor].moments(way) for name, (tensor, way) in places.items()}
    return {name: moments for name, moments in found.items() if moments is not None and _is_sound(moments)}


LARGEST_PRODUCT = 1e30
"""Sums of products above it overflow the single precision that weights are fitted in."""


def _is_sound(moments: Moments) -> bool:
    """Whether inputs hold neither NaN nor infinity, nor what leads to them."""
    largest = np.max(np.abs(moments.products), initial=0.0)
    return bool(largest < LARGEST_PRODUCT)  # NaN is not


def inputs_of(model: Model, views: Sequence[WeightView]) -> dict[str, str]:
    """The tensor that each layer multiplies its weight with, by the weight's name, where that can be observed."""
    main = {id(node) for node in model.graph.nodes}
    tensors = {view.name: _read_tensor(view, main) for view in views}
    return {name: str(tensor.name) for name, tensor in tensors.items() if tensor is not None}


def _observed(
    model: Model, observers: dict[str, Products], context: Context, original: Model | None
) -> dict[str, Products]:
    assert context.runtime is not None
    assert context.workdir is not None
    assert context.data is not None
    path, other = context.workdir / "products.onnx", context.workdir / "products_original.onnx"
    model.save(path, durable=False)
    feeds = _in_time(context)
    try:
        if original is None:
            return context.runtime.observe(path, feeds, observers)
        original.save(other, durable=False)
        pairs = {(name, name): observer for name, observer in observers.items()}
        seen = context.runtime.observe_pair(other, path, feeds, pairs)
        return {name: observer for (name, _), observer in seen.items()}
    finally:
        for file in [*path.parent.glob(f"{path.name}*"), *other.parent.glob(f"{other.name}*")]:
            file.unlink()


def _in_time(context: Context) -> Callable[[], Iterator[dict[str, Array]]]:
    """The context's feeds, each time from the first, until time is up."""

    def feeds() -> Iterator[dict[str, Array]]:
        assert context.data is not None
        for number, feed in enumerate(context.data.feeds()):
            if number and context.out_of_time():
                break
            yield feed

    return feeds
