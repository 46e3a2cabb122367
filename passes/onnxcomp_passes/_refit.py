"""Weights fitted anew by least squares, layer by layer, to what the layers computed before anything was taken away."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcomp.model import Model, value_of
from onnxcomp.passes import Context
from onnxcomp.weights import Spool
from onnxcomp_passes._behind import Behind, find_behind
from onnxcomp_passes._behind_fit import Kept, Rows, fit_behind, read_rows, rows_to_keep
from onnxcomp_passes._channel_scores import MAX_INPUTS
from onnxcomp_passes._dead import shift_bias, takes_shift
from onnxcomp_passes._fits import Fit, Sums, Together
from onnxcomp_passes._pruning import as_matrices, from_matrices
from onnxcomp_passes._views import WeightView, find_views
from onnxcomp_passes._windows import Window, inputs_of

__all__ = ["refit"]

Array = np.ndarray[Any, Any]

RIDGES = tuple(10.0**power for power in np.arange(-4, 2.1, 0.5))
"""What ties weights to where they are, as shares of the mean energy of the inputs: which suits is measured."""

BEHIND_RIDGES = tuple(10.0**power for power in range(-3, 2))
"""The same for fits behind activations, which take more time."""

MAX_LAYERS = 64
"""Each is a pass over the calibration data; of more layers the first are fitted."""


def refit(
    model: Model,
    original: Model,
    shifts: Mapping[str, Array],
    context: Context,
    spool: Spool,
    most: int = MAX_LAYERS,
    *,
    activations: bool = True,
) -> int:
    """Fit layers, in the order of the graph, on what the layers before them give now (in place).

    He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168, section 3.1, where
    the inputs are those of the pruned network and the targets those of the original. Where a shortcut's Add or an
    activation alone reads a layer's result, the targets may be what comes out behind them (`fit_behind`).

    Args:
        model: The model; its weights have the names and shapes that they have in the original.
        original: What to reproduce.
        shifts: What was added to biases of layers whose weights were changed, by weight. The first of these in the
            graph and all layers after it are fitted.
        context: Its data and runtime are used.
        spool: Where weights go.
        most: Layers that are fitted at the most.
        activations: Fit to what comes out behind a layer's activation and shortcut, where that is better: many times
            slower.

    Returns:
        How many layers were fitted.
    """
    assert context.runtime is not None
    assert context.workdir is not None
    assert context.data is not None
    shifted = dict(shifts)
    targets = {view.name: str(view.node.outputs[0].name) for view in find_views(original)}
    reference, candidate = context.workdir / "reference.onnx", context.workdir / "candidate.onnx"
    original.save(reference, durable=False)
    done = 0
    try:
        for view in _layers(model, shifts)[:most]:
            if context.out_of_time():
                break
            context.progress(f"fitting {view.label}")
            model.save(candidate, durable=False)
            behind = _behind(model, view) if activations else None
            watch = _watch(view, targets[view.name], behind)
            seen = context.runtime.observe_pair(reference, candidate, context.data.feeds, watch)
            found = [each for together in seen.values() for each in together.observers]
            done += _fit(model, view, behind, found, shifted, spool)
    finally:
        for path in (reference, candidate):
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
    return done


def _layers(model: Model, first: Collection[str]) -> list[WeightView]:
    """The layers that can be fitted, from the first one with a named weight on."""
    views = find_views(model)
    seen = inputs_of(model, views)
    found: list[WeightView] = []
    for view in views:
        node = view.node
        if not found and view.name not in first:
            continue
        plain = int(node.attrs.get("group", 1)) == 1 and takes_shift(node) and _bias(view, {}) is not None
        if plain and _inputs(view) <= MAX_INPUTS and view.form in {"float", "float16"} and view.name in seen:
            found.append(view)
    return found


def _inputs(view: WeightView) -> int:
    """How many numbers go into one output."""
    if view.node.op == "Conv" or view.node.attrs.get("transB", 0):
        return int(np.prod(view.shape[1:]))
    return view.shape[0]


def _sizes(view: WeightView) -> tuple[int, int]:
    """Inputs and outputs."""
    return _inputs(view), int(np.prod(view.shape)) // _inputs(view)


def _bias(view: WeightView, shifted: Mapping[str, Array]) -> Array | None:
    """What a layer adds to its products, shape (outputs,); None where that is no constant of each output."""
    node = view.node
    outputs = view.shape[0] if node.op == "Conv" or node.attrs.get("transB", 0) else view.shape[1]
    if node.op == "MatMul":
        return shifted.get(view.name, np.zeros(outputs))
    if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return None
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return np.zeros(outputs)
    bias = value_of(node.inputs[2])
    return bias.astype(np.float64) if bias.shape == (outputs,) else None


def _behind(model: Model, view: WeightView) -> Behind | None:
    """What comes behind a layer; None also for one so large that fewer rows are kept than a fit needs."""
    return find_behind(model, view.node) if rows_to_keep(_sizes(view)) > _inputs(view) else None


def _watch(view: WeightView, target: str, behind: Behind | None) -> dict[tuple[str, str], Together]:
    """What is observed of a layer, in this order: a Fit, and Kept for its input and for the shortcut behind it."""
    window, read = Window.of(view.node, view.shape), str(view.node.inputs[0].name)
    watch: dict[tuple[str, str], list[Fit | Kept]] = {(target, read): [Fit(window)]}
    if behind is not None:
        most = rows_to_keep(_sizes(view))
        watch.setdefault((behind.result, read), []).append(Kept(window, most))
        if behind.shortcut:
            watch.setdefault((behind.result, behind.shortcut), []).append(Kept(window, most, shortcut=True))
    return {names: Together(observers) for names, observers in watch.items()}


def _fit(
    model: Model,
    view: WeightView,
    behind: Behind | None,
    found: Sequence[Any],
    shifted: dict[str, Array],
    spool: Spool,
) -> int:
    """Write one layer's fitted weights; whether there were any."""
    bias, sums = _bias(view, shifted), found[0].halves
    if bias is None or not all(half.count for half in sums):
        return 0
    matrix = as_matrices(view, view.read())[0].astype(np.float64)
    alive = np.append(np.any(matrix != 0, axis=1), True)
    now = np.concatenate([matrix, bias[None]])
    rows: list[Rows] = []
    if behind is not None:
        offset = np.asarray(behind.offset - shifted.get(view.name, 0.0)) if view.node.op == "MatMul" else 0.0
        rows = read_rows(found[1], found[2] if behind.shortcut else None, offset, (behind.low, behind.high))
    is_same_size = bool(rows) and rows[0].targets.shape[1] == matrix.shape[1]  # an Add may stretch it
    step = _fitted_behind(now, alive, sums, rows) if is_same_size else _fitted(now, alive, *sums)
    if step is None:
        return 0
    view.write(from_matrices(view, (now + step)[None, :-1].astype(np.float32)), spool)
    shift_bias(model, view.node, step[-1])
    shifted[view.name] = shifted.get(view.name, 0.0) + step[-1]
    return 1


def _fitted_behind(now: Array, alive: Array, sums: Sequence[Sums], rows: Sequence[Rows]) -> Array | None:
    """As `_fitted`, with errors behind the activation, and with fits of these beside those of the results."""
    methods = [(ridge, False) for ridge in RIDGES] + [(ridge, True) for ridge in BEHIND_RIDGES]
    errors = np.zeros(len(methods))
    for half, other in ((0, 1), (1, 0)):
        for index, (ridge, is_behind) in enumerate(methods):
            weights = now + _step(now, alive, sums[half], ridge)
            if is_behind:
                weights = fit_behind(now, alive, rows[half], ridge, weights)
            errors[index] += rows[other].error(weights)
    best = int(np.argmin(errors))
    base = rows[0].error(now) + rows[1].error(now)
    if errors[best] >= base:
        return None
    ridge, is_behind = methods[best]
    step = _step(now, alive, sums[0].joined(sums[1]), ridge)
    return fit_behind(now, alive, rows[0].joined(rows[1]), ridge, now + step) - now if is_behind else step


def _fitted(now: Array, alive: Array, one: Sums, other: Sums) -> Array | None:
    """The change of weights with least error, tied to 0 as strongly as suits samples that the fit has not seen.

    Args:
        now: Weights with the bias as last row, shape (inputs + 1, outputs).
        alive: The rows that may change.
        one: What half of the samples say.
        other: What the other half says.

    Returns:
        The change, shape of `now`; None where none helps on the samples that it was not fitted on.
    """
    errors = [
        _step_error(now, alive, one, other, ridge) + _step_error(now, alive, other, one, ridge) for ridge in RIDGES
    ]
    best = int(np.argmin(errors))
    if errors[best] >= one.error(now) + other.error(now):
        return None
    return _step(now, alive, one.joined(other), RIDGES[best])


def _step_error(now: Array, alive: Array, fitted: Sums, judged: Sums, ridge: float) -> float:
    return judged.error(now + _step(now, alive, fitted, ridge))


def _step(now: Array, alive: Array, sums: Sums, ridge: float) -> Array:
    """The ridge regression of what is left on the inputs; the bias is not tied."""
    tied = np.full(len(now), ridge * max(float(np.mean(np.diag(sums.inputs)[:-1])), 1e-300))
    tied[-1] = 1e-6 * sums.count
    left = (sums.results - sums.inputs @ now)[alive]
    step = np.zeros_like(now)
    step[alive] = np.linalg.solve((sums.inputs + np.diag(tied))[alive][:, alive], left)
    return step
