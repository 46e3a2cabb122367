"""How much worse a candidate's outputs are than the original's, on the same samples.

Three ways, the best one that the data allow:

- `metric`: labels and a task metric; the drop is the difference of the metric.
- `expected-drop`: no labels, but an output holds class scores. What the original expects to lose by the candidate's
  choices: mean(p[own choice] - p[candidate's choice]), at each step of a sequence of them. (Counting
  disagreements would reject good models: near ties flip without any loss.)
  An output that mixes scores with other numbers, as detectors' do, likewise: how much average precision the candidate's
  ranking is expected to lose; see `onnxcomp.detection`.
- `relative-error`: anything else. The root mean square of the difference over that of the *part of the output that
  depends on the input* (the output minus its mean over the samples), the worst output counts. A large constant part, as
  in spectra in decibels or in box coordinates, would otherwise hide the damage: an anomaly detector that lost 4 points
  of AUC had 2.7% of plain relative error, but 27% of this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxcomp import metrics
from onnxcomp.data import Batch, Dataset
from onnxcomp.detection import MixedOutput, find_mixed
from onnxcomp.errors import DataError
from onnxcomp.metrics import Metric
from onnxcomp.relative_error import energies, relative_error
from onnxcomp.telling import are_constant, constant_drop, may_show_loss

__all__ = ["LOSSLESS_ERROR", "Quality", "Reference", "output_decibels"]

Array = np.ndarray[Any, Any]
Runs = list[list[Array]]

LOSSLESS_ERROR = 1e-4
"""Plain relative error below which float results are equal to rounding: fused float32 stays below 1e-5."""

CENTRED_FROM_SAMPLES = 8
"""With fewer samples the mean over samples says nothing."""

OUTPUT_BYTES = 256 << 20
"""Reference outputs kept in memory at most; of larger ones, fewer samples are compared."""


@dataclass(frozen=True)
class Quality:
    """What a candidate loses. `drop` is bigger-is-worse; None where `kind` is "relative-error".

    Attributes:
        kind: How the drop was measured.
        drop: The drop.
        interval: Its paired 95% interval.
        error: The relative error of the worst output; see the module. Of an output that is in part scores, that of the
            rest, counted by the scores beside it.
        error_interval: Its 95% interval (of a detector's boxes, just the error).
        plain_error: The same without taking the mean out: what "equal to rounding" is about.
        plain_interval: The 95% interval of that.
        sqnr_db: The signal-to-noise ratio of the worst output.
        agreement: How often the top class is the same.
        metric: The candidate's own metric value.
        samples: How many samples were compared.
        guessed: That the outputs are class scores was only guessed from confident logits: the relative error must be
            inside its budget too.
        score_error: Where an output holds other numbers beside its scores, the scores' relative error. The drop is
            theirs then, and `error` that of the others, which have a budget of their own.
        expected_drop: The expected drop, where an output holds class scores, whether or not there are labels as well.
        constant_drop: What one answer for all samples would lose, where the drop is that of class scores without
            labels: a budget that this is inside of proves nothing.
    """

    kind: Literal["metric", "expected-drop", "relative-error"]
    drop: float | None
    interval: tuple[float, float] | None
    error: float
    error_interval: tuple[float, float]
    plain_error: float
    plain_interval: tuple[float, float]
    sqnr_db: float
    agreement: float | None
    metric: float | None
    samples: int
    guessed: bool = False
    score_error: float | None = None
    expected_drop: float | None = None
    constant_drop: float | None = None

    @property
    def detection(self) -> bool:
        """Whether the drop is that of a detector's scores."""
        return self.score_error is not None and self.kind == "expected-drop"


Measured = tuple[float, float, float]
"""A relative error and the ends of its interval."""


class Reference:
    """The original's outputs on a set of samples, to compare candidates with.

    Args:
        data: The samples.
        outputs: The original's outputs, a list for each batch of `data.batches()`.
        metric: The task metric, where there are labels.
        classifier: Whether to treat two-axis outputs as class scores; None: decide by their looks.
        seed: Of the bootstrap.

    Attributes:
        batches: How many batches of the data the outputs are of.
        samples: How many samples that is.
        shows_loss: Whether a loss could show: by labels, or since some output is not empty, 0 or NaN throughout.
    """

    def __init__(
        self, data: Dataset, outputs: Iterable[list[Any]], metric: Metric | None, classifier: bool | None, seed: int
    ) -> None:
        self.batches = 0
        self._metric = metric
        self._seed = seed
        self._centred = not data.generated
        self._runs: Runs = []
        self._counts: list[int] = []
        labels = []
        kept_bytes = 0
        for batch, arrays in zip(data.batches(), outputs, strict=False):
            run = trim(flatten(arrays), batch)
            self._runs.append(run)
            self._counts.append(batch.count)
            self.batches += 1
            if batch.labels is not None:
                labels.append(batch.labels)
            kept_bytes += sum(array.nbytes for array in run)
            if kept_bytes > OUTPUT_BYTES:
                break
        self.samples = sum(len(part) for part in labels) if labels else _count(self._runs, data)
        self._labels = np.concatenate(labels) if labels and metric is not None else None
        self.shows_loss = self._labels is not None or any(may_show_loss(run) for run in self._runs)
        inputs = next(iter(data.batches())).inputs.values()
        elements = sum(array[:1].size if array.ndim else 1 for array in inputs)
        self._guessed = False
        self._classes = None if classifier is False or data.generated else self._class_output(elements, classifier)
        self._mixed = None if self._classes is not None or data.generated else self._mixed_output()
        self.constant = are_constant(self._runs, self._counts)
        """Whether the outputs are the same for all samples: then no loss can be seen."""
        self.constant_drop = self._constant_drop()
        """See `Quality`."""

    def _class_output(self, elements: int, declared: bool | None) -> int | None:
        """Which output holds class scores."""
        for index in range(_width(self._runs)):
            whole = _joined(self._runs, index)
            if whole is None or whole.dtype.kind != "f" or whole.shape[-1] < 2:
                continue
            if whole.ndim == 3 and metrics.looks_like_classifier(_rows(whole), elements) == "probabilities":
                return index
            if whole.ndim == 2:
                looks = metrics.looks_like_classifier(whole, elements)
                if declared or looks:
                    self._guessed = not declared and looks != "probabilities"
                    return index
        return None

    def _constant_drop(self) -> float | None:
        scores = None if self._classes is None or self._labels is not None else _joined(self._runs, self._classes)
        return None if scores is None else constant_drop(scores)

    def _mixed_output(self) -> tuple[int, MixedOutput] | None:
        """The first output that mixes scores with other numbers."""
        for index in range(_width(self._runs)):
            whole = _joined(self._runs, index)
            found = None if whole is None else find_mixed(whole)
            if found is not None:
                return index, found
        return None

    @property
    def kind(self) -> Literal["metric", "expected-drop", "relative-error"]:
        """How the drop of candidates is measured."""
        if self._labels is not None:
            return "metric"
        return "relative-error" if self._classes is None and self._mixed is None else "expected-drop"

    @property
    def classes(self) -> int | None:
        """Which output holds class scores, if any."""
        return self._classes

    def metric_value(self) -> float | None:
        """The original's own metric value."""
        if self._metric is None or self._labels is None:
            return None
        return self._metric(_whole(self._runs), self._labels)

    def compare(self, outputs: Iterable[list[Any]], data: Dataset) -> Quality:
        """Measure a candidate.

        Args:
            outputs: The candidate's outputs, a list for each batch of the same samples.
            data: The samples that the reference was made with.
        """
        runs = [
            trim(flatten(arrays), batch)
            for _, batch, arrays in zip(range(self.batches), data.batches(), outputs, strict=False)
        ]
        plain, centred = self._errors(runs)
        agreement = drop = value = interval = score_error = None
        if self._classes is not None:
            teacher, student = _joined(self._runs, self._classes), _joined(runs, self._classes)
            if teacher is not None and student is not None and teacher.shape == student.shape:
                places = metrics.expected_drop(_rows(teacher), _rows(student))
                lost = places.reshape(len(teacher), -1).mean(axis=1)
                agreement = float((teacher.argmax(axis=-1) == student.argmax(axis=-1)).mean())
                drop, interval = float(lost.mean()), _mean_interval(lost, self._seed)
            else:
                drop, interval = math.inf, (math.inf, math.inf)
        if self._mixed is not None:
            index, mixed = self._mixed
            teacher, student = _joined(self._runs, index), _joined(runs, index)
            if teacher is not None and student is not None and teacher.shape == student.shape:
                drop, interval = mixed.drop(teacher, student, self._seed)
                score_error = mixed.score_error(teacher, student)
            else:
                drop, interval, score_error = math.inf, (math.inf, math.inf), math.inf
        expected = drop
        if self._metric is not None and self._labels is not None:
            value, drop, interval = self._metric_drop(self._metric, runs, self._labels)
        return Quality(
            kind=self.kind,
            drop=drop,
            interval=interval,
            error=centred[0],
            error_interval=centred[1:],
            plain_error=plain[0],
            plain_interval=plain[1:],
            sqnr_db=to_decibels(plain[0]),
            agreement=agreement,
            metric=value,
            samples=self.samples,
            guessed=self._guessed and self.kind == "expected-drop",
            score_error=score_error,
            expected_drop=expected,
            constant_drop=self.constant_drop,
        )

    def _metric_drop(
        self, metric: Metric, runs: Runs, labels: Array
    ) -> tuple[float | None, float, tuple[float, float]]:
        """The candidate's metric value, its drop and the drop's interval."""
        before = _whole(self._runs)
        original = metric(before, labels)
        try:
            after = _whole(runs)
            value = metric(after, labels)
        except DataError:  # NaN or another shape, where the original's outputs were fine: that is the candidate's loss
            return None, math.inf, (math.inf, math.inf)
        interval = metrics.paired_interval(metric, before, after, labels, seed=self._seed)
        return value, metrics.drop(metric, original, value), interval

    def _errors(self, runs: Runs) -> tuple[Measured, Measured]:
        """The worst output's relative error, plain and centred."""
        plain = centred = (0.0, 0.0, 0.0)
        if [len(run) for run in self._runs] != [len(run) for run in runs]:
            return _exactly(math.inf), _exactly(math.inf)  # a sequence of another length
        for index in range(_width(runs)):
            present = [place for place, run in enumerate(self._runs) if index < len(run)]
            pairs = [(self._runs[place][index], runs[place][index]) for place in present]
            if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
                return _exactly(math.inf), _exactly(math.inf)
            one, other = self._error(index, pairs, [self._counts[place] for place in present])
            plain, centred = _worst(plain, one), _worst(centred, other)
        return plain, centred

    def _error(self, index: int, pairs: list[tuple[Array, Array]], counts: list[int]) -> tuple[Measured, Measured]:
        """One output's relative error, plain and centred."""
        if pairs[0][0].dtype.kind != "f":
            differing = sum(int(np.count_nonzero(a != b)) for a, b in pairs)
            share = _exactly(differing / max(1, sum(a.size for a, _ in pairs)))
            return share, share
        found = energies(pairs, counts)
        plain = found.error(centred=False), *found.interval(centred=False)
        if self._mixed is not None and self._mixed[0] == index:
            teacher, student = (np.concatenate(part) for part in zip(*pairs, strict=True))
            return plain, _exactly(self._mixed[1].error(teacher, student))
        if not self._centred or self.samples < CENTRED_FROM_SAMPLES:
            return plain, plain
        return plain, (found.error(centred=True), *found.interval(centred=True))


def _exactly(error: float) -> Measured:
    return error, error, error


def _worst(one: Measured, other: Measured) -> Measured:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])


def to_decibels(error: float) -> float:
    if not error:
        return math.inf
    return -20 * math.log10(error) if math.isfinite(error) else -math.inf


def output_decibels(
    names: Sequence[str], data: Dataset, ours: Sequence[list[Any]], theirs: Sequence[list[Any]]
) -> Iterator[tuple[str, float]]:
    """The signal-to-noise ratio of each output of floats.

    Args:
        names: What the outputs are called.
        data: The samples.
        ours: The original's outputs, a list for each batch.
        theirs: The candidate's.
    """
    for index, name in enumerate(names):
        pairs: list[tuple[Array, Array]] = []
        for batch, a, b in zip(data.batches(), ours, theirs, strict=False):
            one, other = (trim(flatten([run[index]]), batch) for run in (a, b))
            pairs += zip(one, other, strict=False) if len(one) == len(other) else [(np.zeros(1), np.zeros(0))]
        if pairs and pairs[0][0].dtype.kind == "f":
            fit = all(a.shape == b.shape for a, b in pairs)
            yield name, to_decibels(relative_error(pairs)) if fit else -math.inf


def flatten(outputs: list[Any]) -> list[Array]:
    """A run's outputs as arrays: sequences and maps are spread out, an empty optional becomes an empty array."""
    flat: list[Array] = []
    for output in outputs:
        if output is None:
            flat.append(np.zeros(0, np.float32))
        elif isinstance(output, dict):
            values = list(output.values())
            scalars = all(np.ndim(value) == 0 for value in values)
            flat += flatten([np.asarray(list(output)), np.asarray(values) if scalars else values])
        elif isinstance(output, list | tuple):
            flat += flatten(list(output))
        else:
            flat.append(np.asarray(output))
    return flat


def trim(run: list[Array], batch: Batch) -> list[Array]:
    """Cut off the samples that only fill up a fixed batch."""
    arrays = [array for array in batch.inputs.values() if array.ndim]
    rows = max(map(len, arrays), default=0)
    if not all(_is_filled_up(array, batch.count, rows) for array in arrays):
        return run
    return [array[: batch.count] if array.ndim and len(array) == rows else array for array in run]


def _is_filled_up(array: Array, count: int, rows: int) -> bool:
    """Whether a batch's input repeats its last sample; where a run is one sample, its first axis counts none."""
    return len(array) == rows > count and all(np.array_equal(row, array[count - 1]) for row in array[count:])


def _count(runs: Runs, data: Dataset) -> int:
    """How many samples the runs cover."""
    return sum(batch.count for batch, _ in zip(data.batches(), runs, strict=False))


def _width(runs: Runs) -> int:
    """The largest number of outputs of a run: sequences may be longer in one than in another."""
    return max(map(len, runs), default=0)


def _rows(scores: Array) -> Array:
    """Class scores as one row a decision: a sequence model takes one at each step."""
    return scores.reshape(-1, scores.shape[-1])


def _joined(runs: Runs, index: int) -> Array | None:
    """One output over all samples, or None where its shape changes from run to run."""
    parts = [run[index] for run in runs if index < len(run)]
    if len(parts) < len(runs) or any(not part.ndim for part in parts) or len({part.shape[1:] for part in parts}) != 1:
        return None
    return np.concatenate(parts)


def _whole(runs: Runs) -> list[Array]:
    """All outputs over all samples.

    Raises:
        DataError: An output changes its shape from run to run, so no metric can take it.
    """
    whole = [_joined(runs, index) for index in range(_width(runs))]
    kept = [array for array in whole if array is not None]
    if len(kept) < len(whole):
        message = "a metric needs outputs of one shape for all samples; the model's outputs change their shape"
        raise DataError(message)
    return kept


def _mean_interval(values: Array, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
