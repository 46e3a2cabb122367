"""`compare`: how a model differs from another on the same data: accuracy, outputs, bytes, speed, kernels."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.analysis import count_parameters, deflated_bytes, mac_counts
from onnxcomp.data import Dataset, ImageOptions, generate, open_data
from onnxcomp.errors import OptionError
from onnxcomp.layer_table import LayerRow, ModelLayers, layer_rows
from onnxcomp.layers import layer_errors, tensor_pairs
from onnxcomp.ledger import Figures
from onnxcomp.metrics import Metric
from onnxcomp.model import Model, ModelSource
from onnxcomp.pairs import (
    as_tuples,
    chosen_metric,
    common_inputs,
    common_outputs,
    model_file,
    source_name,
    static_shapes,
)
from onnxcomp.quality import Array, Quality, Reference, flatten, to_decibels, trim
from onnxcomp.relative_error import relative_error
from onnxcomp.runtime import Runtime, Timing, explain
from onnxcomp.targets import Target, find_target, host_target
from onnxcomp.trial_runs import Trial, agrees_with_itself

__all__ = ["Comparison", "compare", "shortfalls"]

GENERATED_SAMPLES = 8
TIMING_SECONDS = 2.0
FIXED_LIMITS = ("sqnr", "agreement", "size", "speed")


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Ratios are original over new: above 1 is better.

    Attributes:
        original: The file of the one model, or "model".
        new: The file of the other.
        before: The figures of the original.
        after: The figures of the new model; its losses are relative to the original.
        speed: Original latency over new latency; None where it was not measured.
        size: Original bytes over new bytes.
        quality: How `after.drop` was measured: "metric", "expected-drop" or "relative-error".
        sqnr_db: Output -> signal-to-noise ratio in dB; infinite where the outputs are equal.
        metric: {name, higher_is_better}, or None without labels or metric.
        data: {description, samples, generated, labels}.
        target: What the models are for.
        threads: Threads of one operator.
        warnings: What to know before trusting a figure.
        layers: The layers side by side, the largest error first; None where they were not asked for.
    """

    original: str
    new: str
    before: Figures
    after: Figures
    speed: float | None
    size: float
    quality: str
    sqnr_db: dict[str, float]
    metric: dict[str, Any] | None
    data: dict[str, Any]
    target: str
    threads: int
    warnings: list[str] = field(default_factory=list)
    layers: list[LayerRow] | None = None

    @property
    def budget(self) -> dict[str, Any]:
        """None: a comparison asks for nothing."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return dataclasses.asdict(self)


def compare(
    original: ModelSource,
    new: ModelSource,
    *,
    data: Any = None,
    metric: str | Callable[..., Any] | Metric | None = None,
    threads: int = 1,
    target: str | Target | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    image: ImageOptions | None = None,
    allow_code: bool = False,
    timing: bool = True,
    layers: bool = False,
) -> Comparison:
    """Compare a model with another that takes the same inputs.

    Args:
        original: A path, a ModelProto or a Model.
        new: The same, to be measured against it.
        data: Samples, labelled ones for a metric; see `onnxcomp.data.open_data`. Without data inputs are generated.
        metric: "top1", "top5", "mse", "auc", "module:function" or a function of (outputs, labels).
        threads: Threads that ONNX Runtime runs and is timed with.
        target: What the models are for; this host by default. Only this host's clock is evidence of speed.
        shapes: Sizes of dynamic inputs, for generated inputs.
        seed: Of generated inputs and intervals.
        image: How to read a folder of images.
        allow_code: Whether "module:function" may be imported and called.
        timing: Whether to time the models.
        layers: Whether to measure the error of each layer too, on all of the data.

    Raises:
        OnnxcompError: A model cannot be read or run, the models do not fit each other, or the data do not fit them.
    """
    models = Model.load(original), Model.load(new)
    chosen = find_target(target) if isinstance(target, str) else target or host_target()
    specs = common_inputs(*models)
    if data is None:
        samples = generate(models[0].proto(), count=GENERATED_SAMPLES, seed=seed, shapes=shapes or static_shapes(specs))
    else:
        samples = open_data(data, specs, shapes=as_tuples(shapes), image=image, allow_code=allow_code)
    config = {} if chosen.is_host else dict(chosen.session_config)
    with (
        samples,
        tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder,
        Runtime(threads=threads, session_config=config) as runtime,
    ):
        task = chosen_metric(metric, samples, allow_code=allow_code)
        given = zip((original, new), models, strict=True)
        paths = [model_file(source, model, Path(folder) / f"{i}.onnx") for i, (source, model) in enumerate(given)]
        names = common_outputs(runtime, paths)
        trial = Trial(models[0], lambda: paths[0], runtime, seed, shapes or static_shapes(specs))
        (reference, losses, sqnr_db), samples = trial.use(
            samples, lambda fed: _qualities(runtime, paths, names, fed, task, seed)
        )
        feed = next(iter(samples.subset([0]).batches(1))).inputs
        random = losses[1].plain_error > 0 and not agrees_with_itself(runtime, paths[0], feed)
        timings: Sequence[Timing | None] = (None, None)
        if timing and chosen.is_host:
            timings = runtime.time(paths, feed, seconds=TIMING_SECONDS)
        shapes_run = {name: array.shape for name, array in feed.items()}
        wide = chosen.rules.wide if chosen.rules else None
        before, after = (
            _figures(runtime, model, path, timed, loss, shapes_run, wide)
            for model, path, timed, loss in zip(models, paths, timings, losses, strict=True)
        )
        rows = _layers(runtime, models, paths, samples, shapes_run, wide) if layers else None
        description, digest_facts = samples.description, {"samples": samples.size, "labels": samples.has_labels}
    return Comparison(
        original=source_name(original),
        new=source_name(new),
        before=before,
        after=after,
        speed=before.latency_ms / after.latency_ms if before.latency_ms and after.latency_ms else None,
        size=before.size_bytes / after.size_bytes,
        quality=reference.kind,
        sqnr_db=sqnr_db,
        metric={"name": task.name, "higher_is_better": task.higher_is_better} if task else None,
        data={"description": description, "generated": data is None, **digest_facts},
        target=chosen.name,
        threads=threads,
        warnings=_warnings(samples, reference, chosen, random=random),
        layers=rows,
    )


def shortfalls(comparison: Comparison, limits: Mapping[str, float]) -> list[str]:
    """Say which limits a comparison does not reach.

    Args:
        comparison: What `compare` found.
        limits: Name -> the least that will do. "sqnr" (dB, the worst output), "agreement", "size" and "speed"
            (ratios), or the name of the metric; where lower is better, a metric above its limit falls short.

    Returns:
        A line for each limit that is not reached.

    Raises:
        OptionError: A limit is on something that was not measured.
    """
    return [line for name, limit in limits.items() if (line := _shortfall(comparison, name, limit))]


def _shortfall(comparison: Comparison, name: str, limit: float) -> str | None:
    after, metric = comparison.after, comparison.metric
    values = {
        "sqnr": after.sqnr_db,
        "agreement": after.agreement,
        "size": comparison.size,
        "speed": comparison.speed,
    }
    if metric is not None:
        values[str(metric["name"])] = after.metric
    value = values.get(name)
    if value is None:
        measured = ", ".join(key for key, known in values.items() if known is not None)
        message = f"{name!r} was not measured, so it has no limit to keep; measured were {measured}"
        raise OptionError(message)
    lower = metric is not None and name == metric["name"] and not metric["higher_is_better"]
    if lower:
        return f"{name} is {value:.6g}, above the limit of {limit:g}" if value > limit else None
    return None if value >= limit else f"{name} is {value:.6g}, under the limit of {limit:g}"


# --- measuring --------------------------------------------------------------------------------------------------------


def _qualities(
    runtime: Runtime,
    paths: Sequence[Path],
    names: Sequence[list[str]],
    samples: Dataset,
    metric: Metric | None,
    seed: int,
) -> tuple[Reference, list[Quality], dict[str, float]]:
    """Run both models on the samples: the losses of each, and the signal-to-noise ratio of each output."""
    ours: list[list[Any]] = []
    theirs: list[list[Any]] = []
    first = _kept(runtime.run(paths[0], samples.feeds(), outputs=names[0]), ours)
    reference = Reference(samples, first, metric, None, seed)
    second = _kept(runtime.run(paths[1], samples.feeds(), outputs=names[1]), theirs)
    quality = reference.compare(second, samples)
    itself = reference.compare(ours, samples)
    decibels: dict[str, float] = {}
    for index, name in enumerate(names[0]):
        pairs: list[tuple[Array, Array]] = []
        for batch, a, b in zip(samples.batches(), ours, theirs, strict=False):
            one, other = (trim(flatten([run[index]]), batch) for run in (a, b))
            pairs += zip(one, other, strict=False) if len(one) == len(other) else [(np.zeros(1), np.zeros(0))]
        if pairs and pairs[0][0].dtype.kind == "f":
            fit = all(a.shape == b.shape for a, b in pairs)
            decibels[name] = to_decibels(relative_error(pairs)) if fit else -math.inf
    return reference, [itself, quality], decibels


def _kept(runs: Iterable[list[Any]], kept: list[list[Any]]) -> Iterator[list[Any]]:
    for run in runs:
        kept.append(run)
        yield run


def _figures(
    runtime: Runtime,
    model: Model,
    path: Path,
    timing: Timing | None,
    quality: Quality,
    shapes: Mapping[str, Sequence[int]],
    wide: str | None,
) -> Figures:
    census = runtime.census(path)
    macs = mac_counts(model, shapes)
    int8 = set(explain(model.proto(), census, wide=wide).int8)
    parameters, nonzeros = count_parameters(model)
    return Figures(
        size_bytes=model.size_bytes,
        deflated_bytes=deflated_bytes(path),
        resident_bytes=census.initializer_bytes,
        parameters=parameters,
        nonzeros=nonzeros,
        macs=sum(macs.values()),
        int8_macs=sum(count for name, count in macs.items() if name in int8),
        latency_ms=timing.median_ms if timing else None,
        latency_p10_ms=timing.p10_ms if timing else None,
        latency_p90_ms=timing.p90_ms if timing else None,
        load_ms=runtime.check(path).load_ms,
        latency_evidence="measured" if timing else "not measured",
        metric=quality.metric,
        drop=quality.drop,
        drop_interval=quality.interval,
        error=quality.error,
        error_interval=quality.error_interval,
        sqnr_db=quality.sqnr_db,
        agreement=quality.agreement,
        kernels=census.counts(),
    )


def _layers(
    runtime: Runtime,
    models: Sequence[Model],
    paths: Sequence[Path],
    samples: Dataset,
    shapes: Mapping[str, Sequence[int]],
    wide: str | None,
) -> list[LayerRow]:
    original, new = (
        ModelLayers(model, runtime.census(path), shapes, wide=wide) for model, path in zip(models, paths, strict=True)
    )
    tensors = original.results(tensor_pairs(models[0].proto(), models[1].proto()))
    return layer_rows(original, new, layer_errors(runtime, paths[0], paths[1], samples.feeds, tensors))


def _warnings(samples: Dataset, reference: Reference, target: Target, *, random: bool) -> list[str]:
    warnings = []
    if random:
        warnings.append("the original's outputs are random: they differ from run to run, so no loss can be measured")
    if samples.generated:
        warnings.append("no data: the error is that of made-up inputs, and says nothing of accuracy")
    elif reference.samples < samples.size:
        warnings.append(f"the outputs are large: {reference.samples} of {samples.size} samples were compared")
    if not target.is_host:
        warnings.append(f"speed was not measured: the target {target.name} is not this machine")
    return warnings
