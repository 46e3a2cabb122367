"""Metrics of accuracy, what a rewritten model loses of them, and how far its outputs are from the original's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.data.specs import suggestion
from onnxcomp.data.user_code import is_reference, load_function
from onnxcomp.errors import DataError, OnnxcompError, OptionError

__all__ = [
    "Metric",
    "drop",
    "expected_drop",
    "get_metric",
    "looks_like_classifier",
    "metric_for_labels",
    "paired_interval",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_DISTRIBUTION_ERROR = 1e-3  # float16 sums of a thousand classes are off by less
_CONFIDENT = 0.5
_MOST_CLASSES = 100_000
_INDEX_ENTRIES = 4_000_000
_GENERIC_RESAMPLES = 200
_GENERIC_SECONDS = 2.0


@dataclass(frozen=True)
class Metric:
    """A figure of accuracy, computed from a model's outputs and the labels.

    Attributes:
        name: What it is called in reports.
        higher_is_better: Its direction.
        function: Takes all outputs of the model, in its order and with all samples along the first axis, and the
            labels.
        samples: Takes the same and returns one value a sample, float64 (N,), whose mean is the metric; None for a
            metric that is not a mean over samples.
    """

    name: str
    higher_is_better: bool
    function: Callable[[list[Array], Array], float]
    samples: Callable[[list[Array], Array], Floats] | None = None

    def __call__(self, outputs: Sequence[Array], labels: Array) -> float:
        """Return the metric.

        Raises:
            DataError: Outputs and labels do not fit the metric or each other, or the result is not finite.
        """
        try:
            value = float(self.function(list(outputs), labels))
        except OnnxcompError:
            raise
        except Exception as error:  # a user's function may raise anything
            message = f"metric {self.name!r} failed: {type(error).__name__}: {error}"
            raise DataError(message) from error
        if not math.isfinite(value):
            message = f"metric {self.name!r} is {value}; expected a finite number: check the outputs and the labels"
            raise DataError(message)
        return value

    def per_sample(self, outputs: Sequence[Array], labels: Array) -> Floats | None:
        """Return one value a sample, float64 (N,), whose mean is the metric, or None if it is no such mean."""
        return None if self.samples is None else self.samples(list(outputs), labels)


def get_metric(spec: str | Callable[..., Any] | Metric, allow_code: bool = True) -> Metric:
    """Return a metric by name.

    - "top1", "top5": the share of samples whose class is the first, or among the first five, of an output (N, C).
    - "mse": the mean squared difference between an output and labels of its shape; lower is better.
    - "auc": the area under the ROC curve of an output (N,), (N, 1), or (N, 2) whose second column is the positive
      class.
    - "module:function", or a function: called with the list of outputs and the labels, returns a number. Higher is
      better unless it has an attribute `higher_is_better` that is False.

    Of several outputs, the named metrics take the first that fits.

    Args:
        spec: One of the above; a Metric is returned as it is.
        allow_code: Whether "module:function" may be imported.
    """
    if isinstance(spec, Metric):
        return spec
    if isinstance(spec, str):
        if spec in _METRICS:
            return _METRICS[spec]
        if not is_reference(spec):
            message = (
                f"no metric is called {spec!r}{suggestion(spec, _METRICS)}; "
                f"expected one of {', '.join(_METRICS)}, or module:function"
            )
            raise OptionError(message)
        function, name = load_function(spec, allow_code), spec
    else:
        function, name = spec, str(getattr(spec, "__name__", type(spec).__name__))
    if not callable(function):
        message = f"a metric must be a name or a function, got {type(function).__name__}"
        raise OptionError(message)
    higher = getattr(function, "higher_is_better", True)
    if not isinstance(higher, bool):
        message = f"metric {name!r}: its attribute higher_is_better must be True or False, got {higher!r}"
        raise OptionError(message)
    return Metric(name, higher, function)


def metric_for_labels(labels: Array | None) -> Metric | None:
    """Return the metric that labels speak for by themselves: top1 for class indices, None for anything else."""
    classes = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" and bool((labels >= 0).all())
    return _METRICS["top1"] if classes else None


def drop(metric: Metric, original: float, new: float) -> float:
    """Return what the new model loses: above 0 is worse, in points of the metric."""
    return original - new if metric.higher_is_better else new - original


# The named metrics


def _fitting(name: str, outputs: list[Array], labels: Array, fits: Callable[[Array], bool], wanted: str) -> Array:
    for output in outputs:
        if output.ndim and len(output) == len(labels) and output.dtype.kind in "biuf" and fits(output):
            return output
    got = ", ".join(f"{output.dtype.name} {output.shape}" for output in outputs) or "none"
    message = (
        f"metric {name!r} wants an output {wanted} for {labels.dtype.name} {labels.shape} labels; the outputs are {got}"
    )
    raise DataError(message)


def _in_top(count: int) -> Callable[[list[Array], Array], Floats]:
    def samples(outputs: list[Array], labels: Array) -> Floats:
        name = f"top{count}"
        _check_labels(name, labels)
        scores = _fitting(name, outputs, labels, _is_class_scores, "(N, C)")
        scores = scores.reshape(len(scores), -1)
        classes = _classes(name, labels, scores.shape[1])
        rows = np.arange(len(scores))
        own = scores[rows, classes][:, None]
        # Ties go to the lower class, as in argmax; scores with a NaN are always wrong.
        before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < classes[:, None]))
        return np.asarray((before.sum(axis=1) < count) & ~np.isnan(scores).any(axis=1), np.float64)

    return samples


def _is_class_scores(output: Array) -> bool:
    return output.ndim >= 2 and output.shape[1] > 1 and all(size == 1 for size in output.shape[2:])


def _check_labels(name: str, labels: Array) -> None:
    if not labels.ndim or not len(labels) or labels.dtype.kind not in "biuf":
        message = f"metric {name!r} wants numbers as labels, one a sample; got {labels.dtype.name} {labels.shape}"
        raise DataError(message)


def _classes(name: str, labels: Array, count: int) -> npt.NDArray[np.int64]:
    """Return labels (N,), (N, 1) or one-hot (N, C) as classes, int64 (N,)."""
    if labels.ndim == 2 and labels.shape[1] == count > 1:
        return np.asarray(labels.argmax(axis=1), np.int64)
    if labels.size != len(labels):
        message = f"metric {name!r} wants one class a sample as labels; got {labels.dtype.name} {labels.shape}"
        raise DataError(message)
    flat = labels.reshape(-1)
    with np.errstate(invalid="ignore"):
        classes: npt.NDArray[np.int64] = flat.astype(np.int64)
    if (classes != flat).any() or classes.min() < 0 or classes.max() >= count:
        message = f"metric {name!r} wants classes from 0 to {count - 1} as labels; got {flat.min()} to {flat.max()}"
        raise DataError(message)
    return classes


def _squared_error(outputs: list[Array], labels: Array) -> Floats:
    _check_labels("mse", labels)
    output = _fitting("mse", outputs, labels, lambda o: _squeezed(o) == _squeezed(labels), "of the labels' shape")
    difference = output.reshape(len(labels), -1).astype(np.float64) - labels.reshape(len(labels), -1)
    return np.asarray(np.square(difference).mean(axis=1), np.float64)


def _squeezed(array: Array) -> tuple[int, ...]:
    return tuple(size for size in array.shape[1:] if size != 1)


def _auc(outputs: list[Array], labels: Array) -> float:
    _check_labels("auc", labels)
    scores = _fitting(
        "auc",
        outputs,
        labels,
        lambda o: o.ndim == 1 or (o.ndim == 2 and o.shape[1] in (1, 2)),
        "(N,), (N, 1) or (N, 2)",
    )
    scores = scores if scores.ndim == 1 else scores[:, -1]
    found = np.unique(labels)
    if labels.size != len(labels) or len(found) != 2 or not np.isin(found, (0, 1)).all():
        message = f"metric 'auc' wants labels of 0 and 1, both present; got {', '.join(map(str, found[:5]))}"
        raise DataError(message)
    if np.isnan(scores).any():
        message = "metric 'auc' cannot rank outputs that are NaN; check the model"
        raise DataError(message)
    positive = labels.reshape(-1) == 1
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of tied scores
    total = int(positive.sum())
    above = float(ranks[group.reshape(-1)[positive]].sum()) - total * (total + 1) / 2
    return above / (total * (len(positive) - total))


def _mean(samples: Callable[[list[Array], Array], Floats]) -> Callable[[list[Array], Array], float]:
    return lambda outputs, labels: float(samples(outputs, labels).mean())


_METRICS = {
    "top1": Metric("top1", True, _mean(_in_top(1)), _in_top(1)),
    "top5": Metric("top5", True, _mean(_in_top(5)), _in_top(5)),
    "mse": Metric("mse", False, _mean(_squared_error), _squared_error),
    "auc": Metric("auc", True, _auc),
}


# What is lost


def paired_interval(
    metric: Metric,
    original_outputs: Sequence[Array],
    new_outputs: Sequence[Array],
    labels: Array,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float]:
    """Return an interval for the drop, by a paired bootstrap over samples.

    Both models see the same resampled samples, so that what is hard for both cancels out. Where no sample differs
    the interval is (0, 0), however few the samples are: whether they can resolve a budget is for the caller to say.

    A metric that is no mean over samples is resampled less often: at most 200 times, for at most about 2 seconds.
    If that cannot be done at all, because outputs and labels do not count the same samples or no resample has a
    defined metric, the interval is (-inf, inf).

    Args:
        metric: The metric.
        original_outputs: All outputs of the original model, first axis = sample.
        new_outputs: The same of the new model.
        labels: The labels, first axis = sample.
        seed: The same seed gives the same interval, unless the 2 seconds run out.
        confidence: The share of resamples inside.
        resamples: How often to resample.
    """
    if not 0 < confidence < 1 or resamples < 1:
        message = f"confidence must be in (0, 1) and resamples at least 1, got {confidence} and {resamples}"
        raise OptionError(message)
    generator = np.random.default_rng(seed)
    before, after = metric.per_sample(original_outputs, labels), metric.per_sample(new_outputs, labels)
    if before is not None and after is not None:
        drops = _resampled_means(before - after if metric.higher_is_better else after - before, generator, resamples)
    else:
        drops = _resampled_drops(metric, original_outputs, new_outputs, labels, generator, resamples)
    if not len(drops):
        return -math.inf, math.inf
    tail = (1 - confidence) / 2
    low, high = np.quantile(drops, (tail, 1 - tail))
    return float(low), float(high)


def _resampled_means(values: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    size = len(values)
    step = max(1, _INDEX_ENTRIES // size)
    means = [
        values[generator.integers(0, size, (min(step, resamples - start), size))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(means)


def _resampled_drops(
    metric: Metric,
    original_outputs: Sequence[Array],
    new_outputs: Sequence[Array],
    labels: Array,
    generator: np.random.Generator,
    resamples: int,
) -> Floats:
    size = len(labels)
    if any(not output.ndim or len(output) != size for output in (*original_outputs, *new_outputs)):
        return np.empty(0)
    drops: list[float] = []
    end = time.monotonic() + _GENERIC_SECONDS
    for _ in range(min(resamples, _GENERIC_RESAMPLES)):
        rows = generator.integers(0, size, size)
        try:
            before, after = (
                metric([output[rows] for output in outputs], labels[rows])
                for outputs in (original_outputs, new_outputs)
            )
        except DataError:
            continue  # such as an AUC over samples that are all of one class
        drops.append(drop(metric, before, after))
        if time.monotonic() > end:
            break
    return np.asarray(drops, np.float64)


def expected_drop(teacher: Array, student: Array) -> Floats:
    """Return what the original model expects to lose by the new one's choice of class, a sample.

    It is p_T[argmax T] - p_T[argmax S], in [0, 1]: choosing a class that the teacher finds nearly as likely costs
    next to nothing. A student whose scores hold a NaN gets no credit for its choice.

    Args:
        teacher: Logits or probabilities of the original model, (N, C).
        student: The same of the new model.

    Returns:
        float64 (N,).
    """
    if teacher.shape != student.shape or teacher.ndim != 2 or not teacher.size:
        message = f"class scores must be of one shape (N, C), got {teacher.shape} and {student.shape}"
        raise DataError(message)
    scores = teacher.astype(np.float64)
    likely = scores if _are_distributions(scores) else _softmax(scores)
    rows = np.arange(len(likely))
    chosen = np.where(np.isnan(student).any(axis=1), 0.0, likely[rows, student.argmax(axis=1)])
    result: Floats = likely[rows, scores.argmax(axis=1)] - chosen
    return result


def _are_distributions(rows: Array) -> bool:
    return bool((rows >= 0).all() and (np.abs(rows.sum(axis=1, dtype=np.float64) - 1) <= _DISTRIBUTION_ERROR).all())


def _softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: Floats = weights / weights.sum(axis=1, keepdims=True)
    return result


def looks_like_classifier(outputs: Array, input_elements: int) -> str | None:
    """Return why an output looks like class scores, or None.

    "probabilities": rows are not negative and add up to 1. "confident logits": few values next to the input, and
    their softmax gives the first class one half or more in half of the samples; embeddings and features do not.

    Args:
        outputs: One output over all samples, (N, C).
        input_elements: The number of elements of all inputs of one sample.
    """
    if outputs.ndim != 2 or outputs.dtype.kind != "f" or not len(outputs) or not np.isfinite(outputs).all():
        return None
    classes = outputs.shape[1]
    if not 2 <= classes <= _MOST_CLASSES:
        return None
    if _are_distributions(outputs):
        return "probabilities"
    if classes * 4 > input_elements:
        return None
    surest = _softmax(outputs.astype(np.float64)).max(axis=1)
    return "confident logits" if float(np.median(surest)) >= _CONFIDENT else None
