"""The judge: what a candidate model costs and gains, measured against the original. Every verdict rests on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp import analysis
from onnxcomp.budget import Budget
from onnxcomp.data import Dataset
from onnxcomp.layer_table import LayerComparison, ModelLayers, compared_layers
from onnxcomp.metrics import Metric
from onnxcomp.model import Model
from onnxcomp.model_figures import work
from onnxcomp.quality import LOSSLESS_ERROR, Quality, Reference
from onnxcomp.runtime import Census, Feed, Runtime, Timing
from onnxcomp.targets import Target
from onnxcomp.trial_runs import agrees_with_itself

__all__ = ["Judge", "Score"]

NOT_SLOWER = 0.97
"""A candidate at least this fast, relative to the original, is not slower: what is left is the clock's noise."""

SAME_KERNELS = "same kernels"

DOUBTFUL = (0.9, 1.1)
"""A speed in here is measured again."""

TIMINGS = 3

FEW_SAMPLES = 16
"""Enough to rank layers by their error."""

ROUNDING_MARGIN = 4.0
"""Rewritten arithmetic rounds elsewhere: errors up to this many times the original's own rounding are rounding too. It
matters where outputs are next to nothing, such as the 1e-7 of a text detector that sees no text."""


@dataclass(frozen=True)
class Score:
    """What the judge found out about one model. Ratios are original over new: above 1 is better.

    Attributes:
        quality: The loss.
        size_bytes: The size of the saved file and its external data.
        size: Original bytes over these.
        speed: Original latency over this one's.
        evidence: How the speed is known: "measured" (in turn with the original), "same kernels" (ONNX Runtime makes the
            original's program of it) or "estimated" (from the kernels, for a target that is not this host).
        census: ONNX Runtime's optimized graph.
        macs: Multiply-accumulates of one run.
        int8_macs: Those in int8 kernels.
    """

    quality: Quality
    size_bytes: int
    size: float
    speed: float
    evidence: str
    census: Census
    macs: int
    int8_macs: int

    @property
    def drop(self) -> float | None:
        """The drop; bigger is worse."""
        return self.quality.drop

    @property
    def value(self) -> float:
        """What stages compete for: times faster by times smaller."""
        return self.speed * self.size


class Judge:
    """Scores candidates against the original; remembers what it measured by the candidate's digest.

    Args:
        original: The model to compare with.
        select: The samples that choices are made on.
        confirm: The samples that only the final figures are measured on.
        metric: The task metric, or None.
        budget: What may be lost.
        runtime: ONNX Runtime in its worker.
        target: What the model is for.
        workdir: A folder for candidates; it must exist.
        seed: Of the intervals.
        timing: False: clocks are not asked (for reproducible decisions); the kernels decide.
        classifier: Whether outputs are declared to be class scores; None: decide by their looks.
        original_file: The file that the original was read from, to be run as it is.
        references: The original's outputs that earlier judges, for other targets, have found; more are added.
    """

    def __init__(
        self,
        original: Model,
        *,
        select: Dataset,
        confirm: Dataset,
        metric: Metric | None,
        budget: Budget,
        runtime: Runtime,
        target: Target,
        workdir: Path,
        seed: int = 0,
        timing: bool = True,
        classifier: bool | None = None,
        original_file: Path | None = None,
        references: dict[Any, Reference] | None = None,
    ) -> None:
        self.budget = budget
        self.metric = metric
        self.runtime = runtime
        self.target = target
        self.generated = select.generated
        self.cautious = False
        """Whether the expected drop must be inside the budget too. On a few hundred labels the metric takes coarse
        steps, and what it calls free may not be; the expected drop, which needs no labels, has far less noise."""
        self._select, self._confirm = select, confirm
        self._workdir = workdir
        self.timed = timing and target.is_host
        self._scores: dict[str, Score] = {}
        self._original = original
        self._cost: float | None = None
        self.original_digest = original.digest
        self._paths = {self.original_digest: original_file} if original_file else {}
        self.original_path = self.path_of(original)
        self.original_bytes = original.size_bytes
        self.feed: dict[str, Any] = next(iter(select.subset([0]).batches(1))).inputs
        self._shapes = {name: list(np.shape(value)) for name, value in self.feed.items()}
        self._references = {} if references is None else references
        self._computed_for = target.name if analysis.is_quantized(original) else None
        self.deterministic = agrees_with_itself(runtime, self.original_path, self.feed)
        self._few = select.subset(range(min(FEW_SAMPLES, select.size)))
        self._few_reference = self._refer(self._few, None, False, seed)
        self.rounding = ROUNDING_MARGIN * self._rounding()
        self._reference = self._refer(select, metric, classifier, seed)
        self._final = self._refer(confirm, metric, classifier, seed)
        self._speeds = [(runtime.census(self.original_path), 1.0, SAME_KERNELS)]

    def _refer(self, data: Dataset, metric: Metric | None, classifier: bool | None, seed: int) -> Reference:
        """The original's outputs on some samples: a float model gives the same for every target."""
        how = None if metric is None else id(metric.function)  # the Reference keeps it alive
        key = self.original_digest, self._computed_for, data.digest, how, classifier, seed
        if key not in self._references:
            self._references[key] = Reference(data, self._run(self.original_path, data), metric, classifier, seed)
        return self._references[key]

    def _rounding(self) -> float:
        """The original's own relative error between ONNX Runtime's optimized and unoptimized graphs: float rounding."""
        plain = self.runtime.run(self.original_path, self._few.feeds(), optimize=False)
        error = self._few_reference.compare(plain, self._few).plain_error
        return error if math.isfinite(error) else 0.0

    @property
    def kind(self) -> str:
        """How the drop is measured."""
        return self._final.kind

    @property
    def unmeasured(self) -> str | None:
        """Why no loss can be measured; None: it can."""
        if not self.deterministic:
            return "the model's outputs are random"
        if not (self._reference.shows_loss and self._final.shows_loss):
            return "the model's outputs are empty, all 0 or not numbers on these samples"
        return "the model's outputs are the same for all samples" if self._reference.constant else None

    @property
    def untold_drop(self) -> float | None:
        """What one answer for all samples would lose, where that is inside the budget."""
        drop = self._reference.constant_drop
        return drop if self.budget.proves_nothing(drop) else None

    @property
    def samples(self) -> dict[str, int]:
        """How many samples choices and final figures rest on."""
        return {"select": self._reference.samples, "confirm": self._final.samples}

    def original_metric(self) -> float | None:
        """The original's own metric value, on the samples of the final figures."""
        return self._final.metric_value()

    # --- candidates -----------------------------------------------------------------------------------------------

    def path_of(self, model: Model) -> Path:
        """A file of the model, written once."""
        digest = model.digest
        if digest not in self._paths:
            folder = self._workdir / digest[:16]
            folder.mkdir(exist_ok=True)
            path = folder / "model.onnx"
            model.save(path, durable=False)
            self._paths[digest] = path
        return self._paths[digest]

    def forget(self, model: Model) -> None:
        """Delete the model's file; its score stays."""
        path = self._paths.get(model.digest)
        if path is not None and path != self.original_path:
            del self._paths[model.digest]
            for file in path.parent.iterdir():
                file.unlink()

    def quality(self, model: Model) -> Quality:
        """What the model loses on the samples that choices are made on."""
        return self._reference.compare(self._run(self.path_of(model), self._select), self._select)

    def rough_error(self, model: Model) -> float:
        """The relative error on a few samples: cheap, to rank candidates by.

        Of a detector, the scores' or the boxes', whichever is larger: its drop rests on few places.
        """
        quality = self._few_reference.compare(self._run(self.path_of(model), self._few), self._few)
        return max(quality.error, quality.score_error or 0.0)

    def few_feeds(self) -> list[Feed]:
        """A few samples, as they are fed to a model."""
        return list(self._few.feeds())

    def layer_table(self, original: Model, new: Model) -> LayerComparison:
        """The layers of two models side by side, with the errors of their inputs and results on a few samples.

        Raises:
            OnnxcompError: ONNX Runtime cannot show the tensors between the layers.
        """
        wide = self.target.rules.wide if self.target.rules else None
        first, second = self.path_of(original), self.path_of(new)
        ours = ModelLayers(original, self.runtime.census(first), self._shapes, wide=wide)
        theirs = ModelLayers(new, self.runtime.census(second), self._shapes, wide=wide)
        return compared_layers(self.runtime, (ours, theirs), (original, new), (first, second), self._few.feeds)

    def confirm(self, model: Model) -> Quality:
        """What the model loses on the samples kept for the final figures."""
        return self._final.compare(self._run(self.path_of(model), self._confirm), self._confirm)

    def allows(self, quality: Quality, share: float = 1.0) -> bool:
        """Whether a measured loss is inside the budget."""
        if self.cautious and quality.expected_drop is not None and quality.expected_drop > self.budget.max_drop * share:
            return False
        return self.budget.allows(quality, share=share, rounding=self.rounding)

    def used(self, model: Model) -> float:
        """The part of the budget that a model's loss has used up, to within 1 %; 1 where it is all."""
        quality = self.score(model).quality
        parts = (percent / 100 for percent in range(100))
        return next((part for part in parts if self.allows(quality, part)), 1.0)

    def is_lossless(self, quality: Quality) -> bool:
        """Whether the outputs equal the original's to float rounding (always, for a model with random outputs)."""
        return not self.deterministic or quality.plain_error <= max(LOSSLESS_ERROR, self.rounding)

    def score(self, model: Model, *, quality: Quality | None = None) -> Score:
        """Measure a model: loss, size, speed and kernels.

        Raises:
            RuntimeFailure: ONNX Runtime cannot run it.
        """
        digest = model.digest
        if digest not in self._scores:
            self._scores[digest] = self._score(model, quality)
        return self._scores[digest]

    def _score(self, model: Model, quality: Quality | None) -> Score:
        path = self.path_of(model)
        census = self.runtime.census(path)
        macs, int8_macs = self.macs(model, census)
        speed, evidence = self._speed(path, census, macs, int8_macs)
        return Score(
            quality=quality or self.quality(model),
            size_bytes=model.size_bytes,
            size=self.original_bytes / model.size_bytes,
            speed=speed,
            evidence=evidence,
            census=census,
            macs=macs,
            int8_macs=int8_macs,
        )

    def _speed(self, path: Path, census: Census, macs: int, int8_macs: int) -> tuple[float, str]:
        """How many times faster than the original, and how that is known."""
        for known, speed, evidence in self._speeds:
            if self.same_kernels(census, known):
                return speed, evidence  # the same program: whatever clocks differ by is noise
        if self.timed:
            found = self._measured_speed(path), "measured"
        else:
            found = self._original_cost() / _cost(macs, int8_macs), "estimated"
        self._speeds.append((census, *found))
        return found

    def _original_cost(self) -> float:
        if self._cost is None:
            self._cost = _cost(*self.macs(self._original, self.runtime.census(self.original_path)))
        return self._cost

    def _measured_speed(self, path: Path) -> float:
        """Original over new latency, timed in turn; the median of three where one run could be misled by noise."""
        speeds: list[float] = []
        while len(speeds) < TIMINGS:
            original, candidate = self.time([self.original_path, path])
            speeds.append(original.median_ms / candidate.median_ms)
            if len(speeds) == 1 and not DOUBTFUL[0] < speeds[0] < DOUBTFUL[1]:
                break
        return float(np.median(speeds))

    def time(self, paths: list[Path], seconds: float = 1.0) -> list[Timing]:
        """Time models in turn on one sample."""
        return self.runtime.time(paths, self.feed, min_rounds=30, max_rounds=1000, seconds=seconds)

    @staticmethod
    def same_kernels(one: Census, other: Census) -> bool:
        """Whether ONNX Runtime runs the same operators on weights of the same size."""
        bytes_alike = math.isclose(one.initializer_bytes, other.initializer_bytes, rel_tol=0.001, abs_tol=256)
        return bytes_alike and one.counts() == other.counts()

    @staticmethod
    def no_more_kernels(one: Census, other: Census) -> bool:
        """Whether ONNX Runtime runs a part of the other's operators, on weights that are no larger."""
        ours, theirs = one.counts(), other.counts()
        within = all(count <= theirs.get(op, 0) for op, count in ours.items())
        return within and one.initializer_bytes <= other.initializer_bytes + 256

    def layer_macs(self, model: Model) -> dict[str, int]:
        """Multiply-accumulates of one run, by node."""
        return analysis.mac_counts(model, self._shapes)

    def macs(self, model: Model, census: Census) -> tuple[int, int]:
        """Multiply-accumulates of one run, and how many run in int8 kernels."""
        return work(model, census, self._shapes, self.target)

    def _run(self, path: Path, data: Dataset) -> Iterator[list[Any]]:
        return self.runtime.run(path, data.feeds())


def _cost(macs: int, int8_macs: int) -> float:
    """What a run costs where it is not timed: a MAC in an int8 kernel counts half, and nothing else is claimed."""
    return 1.0 - 0.5 * int8_macs / macs if macs else 1.0
