"""Measures models against one original: the same samples, one reference, timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from onnxcomp.analysis import mac_counts
from onnxcomp.data import Dataset, ImageOptions, InputSpec, generate, input_specs, open_data
from onnxcomp.errors import ModelError, OnnxcompError, RuntimeFailure
from onnxcomp.layer_details import described_layers, kernel_times
from onnxcomp.layer_table import LayerRow, ModelLayers, compared_layers
from onnxcomp.ledger import Figures
from onnxcomp.metrics import Metric
from onnxcomp.model import Model, ModelSource
from onnxcomp.model_figures import model_figures, with_timing, work
from onnxcomp.pairs import (
    as_tuples,
    chosen_metric,
    common_inputs,
    common_outputs,
    model_file,
    narrowed,
    source_name,
    static_shapes,
)
from onnxcomp.quality import Quality, Reference, output_decibels
from onnxcomp.runtime import Census, Runtime, Timing
from onnxcomp.targets import Target, find_target, host_target
from onnxcomp.trial_runs import Trial, agrees_with_itself
from onnxcomp.workfolder import work_folder

__all__ = ["Asked", "Measured", "Outcome", "measure"]

GENERATED_SAMPLES = 8
TIMING_SECONDS = 2.0
"""Spent on the timing of each model."""


@dataclass(frozen=True)
class Asked:
    """How to compare; see `onnxcomp.comparison.compare`."""

    data: Any = None
    metric: str | Callable[..., Any] | Metric | None = None
    threads: int = 1
    target: str | Target | None = None
    shapes: Mapping[str, Sequence[int]] | None = None
    seed: int = 0
    image: ImageOptions | None = None
    allow_code: bool = False
    timing: bool = True
    layers: bool = False
    sharing: int = 0
    """How many models share what is told of layers in detail; 0: nothing is."""
    hashes: bool = False
    """Whether the data are hashed, which reads all of them."""
    progress: Callable[[str], None] | None = None


@dataclass
class Measured:
    """A model that is compared, and what was found of it so far. `error` says why nothing more will be."""

    name: str
    source: ModelSource
    model: Model | None = None
    path: Path = Path()
    error: OnnxcompError | None = None
    before: Figures = field(default_factory=Figures)
    after: Figures = field(default_factory=Figures)
    quality: Quality | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    layers: list[LayerRow] | None = None
    details: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def speed(self) -> float | None:
        """Original latency over this one's."""
        old, new = self.before.latency_ms, self.after.latency_ms
        return old / new if old and new else None


@dataclass(frozen=True)
class Outcome:
    """What was found of the original and of each model that was compared with it."""

    model: Model
    before: Figures
    found: list[Measured]
    quality: str
    metric: dict[str, Any] | None
    data: dict[str, Any]
    target: Target
    warnings: list[str]


@dataclass(frozen=True)
class _Ran:
    """The original on some samples: its outputs, and its own loss."""

    samples: Dataset
    outputs: list[list[Any]]
    reference: Reference
    itself: Quality

    @property
    def feed(self) -> dict[str, Any]:
        """The first sample, which is timed."""
        return dict(next(iter(self.samples.subset([0]).batches(1))).inputs)


def measure(original: ModelSource, models: Sequence[ModelSource], asked: Asked, *, strict: bool) -> Outcome:
    """Compare models with an original.

    Args:
        original: What all are measured against.
        models: What is measured.
        asked: How.
        strict: Raise the first failure of a model; otherwise it is noted there, and the others go on.

    Raises:
        OnnxcompError: The original cannot be read or run, the data do not fit, or with `strict` anything else failed.
    """
    base = Model.load(original)
    found = [Measured(source_name(source), source) for source in models]
    specs = _load(base, found, strict=strict)
    target = find_target(asked.target) if isinstance(asked.target, str) else asked.target or host_target()
    config = {} if target.is_host else dict(target.session_config)
    with (
        _samples(base, specs, asked) as samples,
        work_folder() as folder,
        Runtime(threads=asked.threads, session_config=config) as runtime,
    ):
        bench = _Bench(runtime, base, model_file(original, base, folder / "0.onnx"), asked, target, strict=strict)
        for number, one in enumerate(found, start=1):
            if one.model is not None:
                one.path = model_file(one.source, one.model, folder / f"{number}.onnx")
        return bench.run(found, samples, asked.shapes or static_shapes(specs))


def _load(base: Model, found: Sequence[Measured], *, strict: bool) -> list[InputSpec]:
    """Read the models that fit the original; what all of them can be fed."""
    specs = input_specs(base.proto())
    for one in found:
        try:
            model = Model.load(one.source)
            common_inputs(base, model)
            specs = _shared_specs(specs, model)
            one.model = model
        except OnnxcompError as error:
            if strict:
                raise
            one.error = error
    return specs


def _shared_specs(specs: Sequence[InputSpec], model: Model) -> list[InputSpec]:
    try:
        return narrowed(specs, model)
    except ModelError as error:
        message = (
            "it fixes sizes of its inputs that an earlier candidate fixes otherwise; compare it in a run of its own"
        )
        raise ModelError(message) from error


def _samples(base: Model, specs: Sequence[InputSpec], asked: Asked) -> Dataset:
    if asked.data is None:
        shapes = asked.shapes or static_shapes(specs)
        return generate(base.proto(), count=GENERATED_SAMPLES, seed=asked.seed, shapes=shapes)
    return open_data(
        asked.data, specs, shapes=as_tuples(asked.shapes), image=asked.image, allow_code=asked.allow_code
    )  # fmt: skip


_Groups: TypeAlias = dict[int, tuple[_Ran, list[Measured]]]
"""What ran on the same samples, by the identity of the original's run."""


class _Bench:
    """Runs the original and what is compared with it."""

    def __init__(
        self, runtime: Runtime, base: Model, path: Path, asked: Asked, target: Target, *, strict: bool
    ) -> None:
        self.runtime, self.base, self.path = runtime, base, path
        self.asked, self.target, self.strict = asked, target, strict
        self.metric: Metric | None = None
        self.census = runtime.census(path)
        self.wide = target.rules.wide if target.rules else None

    def run(self, found: list[Measured], samples: Dataset, shapes: Mapping[str, Sequence[int]] | None) -> Outcome:
        """Measure all of it."""
        self.metric = chosen_metric(self.asked.metric, samples, allow_code=self.asked.allow_code)
        self._tell("running the original")
        trial = Trial(self.base, lambda: self.path, self.runtime, self.asked.seed, shapes)
        shared, _ = trial.use(samples, self._reference)
        groups: _Groups = {id(shared): (shared, [])}
        for one in found:
            with _noted(one, strict=self.strict) as go:
                if go:
                    ran = self._compare(one, shared, trial)
                    groups.setdefault(id(ran), (ran, []))[1].append(one)
        shared, groups = self._shared(shared, groups)
        before = self._figures(self.base, self.path, self.census, shared.itself, shared.feed)
        for ran, members in groups.values():
            before = self._measure(ran, members, before, first=ran is shared)
        feed = shared.feed
        return Outcome(
            model=self.base,
            before=before,
            found=found,
            quality=shared.reference.kind,
            metric={"name": self.metric.name, "higher_is_better": self.metric.higher_is_better}
            if self.metric
            else None,
            data=self._data(shared.samples),
            target=self.target,
            warnings=self._warnings(shared, found, feed),
        )

    def _tell(self, text: str) -> None:
        if self.asked.progress:
            self.asked.progress(text)

    def _reference(self, samples: Dataset) -> _Ran:
        """Run the original on the samples."""
        names = [info.name for info in self.runtime.check(self.path).outputs]
        kept: list[list[Any]] = []
        runs = _kept(self.runtime.run(self.path, samples.feeds(), outputs=names), kept)
        reference = Reference(samples, runs, self.metric, None, self.asked.seed)
        return _Ran(samples, kept, reference, reference.compare(kept, samples))

    def _compare(self, one: Measured, shared: _Ran, trial: Trial) -> _Ran:
        """Measure what a model loses: on the shared samples, or where it refuses these on others that it takes."""
        self._tell(f"running {one.name}")
        try:
            one.quality, one.sqnr_db = self._loss(one, shared)
        except RuntimeFailure:

            def both(samples: Dataset) -> _Ran:
                ran = self._reference(samples)
                one.quality, one.sqnr_db = self._loss(one, ran)
                return ran

            return trial.use(shared.samples, both)[0]
        return shared

    @staticmethod
    def _shared(shared: _Ran, groups: _Groups) -> tuple[_Ran, _Groups]:
        """What the figures of the original are of: what a model ran on, where there is such a thing."""
        if not groups[id(shared)][1]:
            groups = {key: group for key, group in groups.items() if key != id(shared)} or groups
            shared = next(iter(groups.values()))[0]
        for ran, members in groups.values():
            if ran is not shared:
                how = "other made-up inputs" if ran.samples.generated else "the samples one by one"
                for one in members:
                    one.warnings.append(f"compared on {how}: it refuses the batches that the others take")
        return shared, groups

    def _loss(self, one: Measured, ran: _Ran) -> tuple[Quality, dict[str, float]]:
        """The loss on the samples, and the signal-to-noise ratio of each output."""
        names, theirs = common_outputs(self.runtime, [self.path, one.path])
        kept: list[list[Any]] = []
        runs = _kept(self.runtime.run(one.path, ran.samples.feeds(), outputs=theirs), kept)
        quality = ran.reference.compare(runs, ran.samples)
        return quality, dict(output_decibels(names, ran.samples, ran.outputs, kept))

    def _measure(self, ran: _Ran, members: list[Measured], before: Figures, *, first: bool) -> Figures:
        """Time what ran on the same samples, and measure the rest of it; the figures of the original."""
        alive = [one for one in members if one.error is None]
        times = self._time(ran, alive)
        if first and times:
            before = with_timing(before, next(iter(times.values()))[0])
        elif first and self._times_here and not alive:
            before = with_timing(before, self.runtime.time([self.path], ran.feed, seconds=TIMING_SECONDS)[0])
        for one in alive:
            with _noted(one, strict=self.strict) as go:
                if go and one.model is not None and one.quality is not None:
                    census = self.runtime.census(one.path)
                    figures = self._figures(one.model, one.path, census, one.quality, ran.feed)
                    old, new = times.get(id(one), (None, None))
                    one.before, one.after = with_timing(before, old), with_timing(figures, new)
                    if self.asked.layers:
                        self._layers(one, one.model, census, ran, (old, new))
        return before

    @property
    def _times_here(self) -> bool:
        return self.asked.timing and self.target.is_host

    def _time(self, ran: _Ran, members: list[Measured]) -> dict[int, tuple[Timing, Timing]]:
        """The times of the original and of each model: all in turn, or pair by pair where one of them fails so."""
        if not members or not self._times_here:
            return {}
        self._tell("timing all in turn")
        try:
            old, *rest = self.runtime.time(
                [self.path, *(one.path for one in members)], ran.feed, seconds=TIMING_SECONDS
            )  # fmt: skip
            return {id(one): (old, new) for one, new in zip(members, rest, strict=True)}
        except RuntimeFailure:
            if self.strict:
                raise
        times: dict[int, tuple[Timing, Timing]] = {}
        for one in members:
            with _noted(one, strict=False):
                old, new = self.runtime.time([self.path, one.path], ran.feed, seconds=TIMING_SECONDS)
                times[id(one)] = (old, new)
        return times

    def _figures(self, model: Model, path: Path, census: Census, quality: Quality, feed: Mapping[str, Any]) -> Figures:
        shapes = {name: array.shape for name, array in feed.items()}
        load_ms = self.runtime.check(path).load_ms if self.target.is_host else None
        macs = work(model, census, shapes, self.target)
        return model_figures(model, path, census, quality, macs, load_ms=load_ms)

    def _layers(self, one: Measured, model: Model, census: Census, ran: _Ran, timings: Sequence[Timing | None]) -> None:
        """Put the layers side by side; where they cannot be had, it costs a model no more than these."""
        shapes = {name: array.shape for name, array in ran.feed.items()}
        models, paths = (self.base, model), (self.path, one.path)
        one.layers = []
        try:
            original = ModelLayers(self.base, self.census, shapes, wide=self.wide)
            new = ModelLayers(model, census, shapes, wide=self.wide)
            table = compared_layers(self.runtime, (original, new), models, paths, ran.samples.feeds)
        except OnnxcompError as error:
            if self.strict:
                raise
            one.warnings.append(f"its layers are not listed: {error}")
            return
        one.layers = table.rows
        if self.asked.sharing:
            times, notes = kernel_times(self.runtime, paths, ran.feed, timings)
            macs = mac_counts(self.base, shapes)
            one.details, _ = described_layers(table, models, macs, times, among=self.asked.sharing)
            one.warnings += notes

    def _data(self, samples: Dataset) -> dict[str, Any]:
        hashed = {"sha256": samples.digest} if self.asked.hashes else {}
        return {
            "description": samples.description,
            "generated": samples.generated,
            "samples": samples.size,
            "labels": samples.has_labels,
            **hashed,
        }

    def _warnings(self, ran: _Ran, found: Iterable[Measured], feed: Mapping[str, Any]) -> list[str]:
        warnings = []
        differing = any(one.quality is not None and one.quality.plain_error > 0 for one in found)
        if differing and not agrees_with_itself(self.runtime, self.path, feed):
            warnings.append(
                "the original's outputs are random: they differ from run to run, so no loss can be measured"
            )
        if not ran.reference.shows_loss:
            warnings.append("the original's outputs are empty, all 0 or not numbers, so no loss can show")
        if ran.samples.generated:
            warnings.append("no data: the error is that of made-up inputs, and says nothing of accuracy")
        elif ran.reference.samples < ran.samples.size:
            warnings.append(
                f"the outputs are large: {ran.reference.samples} of {ran.samples.size} samples were compared"
            )
        if not self.target.is_host:
            warnings.append(f"speed was not measured: the target {self.target.name} is not this machine")
        return warnings


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _noted(one: Measured, *, strict: bool) -> Iterator[bool]:
    """Whether there is anything to do with a model; what fails then is its own failure and not that of the others."""
    if one.error is not None:
        yield False
        return
    try:
        yield True
    except OnnxcompError as error:
        if strict:
            raise
        one.error = error


def _kept(runs: Iterable[list[Any]], kept: list[list[Any]]) -> Iterator[list[Any]]:
    for run in runs:
        kept.append(run)
        yield run
