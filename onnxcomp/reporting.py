"""Puts together the report of a finished run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.fixed_shapes import dynamic_inputs
from onnxcomp.graph_table import graph_table
from onnxcomp.judge import Judge, Score
from onnxcomp.layer_details import described_layers, kernel_times
from onnxcomp.ledger import Figures, Report, StageEntry
from onnxcomp.model import Model, ModelSource, model_files
from onnxcomp.model_figures import model_figures, with_timing
from onnxcomp.pass_options import make_pass
from onnxcomp.passes import registered_passes
from onnxcomp.quality import Quality
from onnxcomp.stages import Stage
from onnxcomp.targets import cpu_features

if TYPE_CHECKING:
    from onnxcomp.data import Dataset
    from onnxcomp.run_options import Options
    from onnxcomp.runtime import Timing
    from onnxcomp.verdict import Kept

__all__ = ["build_report", "environment", "file_facts", "model_facts", "replayed_stages"]

FINAL_TIMING_SECONDS = 2.0
HASH_CHUNK_BYTES = 1 << 22


def build_report(
    original: Model,
    kept: Kept,
    judge: Judge,
    options: Options,
    samples: Dataset,
    parts: Mapping[str, Dataset],
    source: ModelSource,
    notes: Sequence[str],
    *,
    started: float,
) -> Report:
    """Measure the result a last time, on samples that no choice saw, and write everything down.

    `started` is when the run began, by `time.monotonic`: this last part belongs to what it took.
    """
    quality = judge.confirm(kept.model)
    first, last = judge.score(original), judge.score(kept.model)
    timings: list[Timing | None] = [None, None]
    if judge.timed:
        paths = [judge.original_path, judge.path_of(kept.model)]
        timings = list(judge.time(paths, seconds=FINAL_TIMING_SECONDS))
    speed = _speed(last, timings)
    before = _figures(judge, original, first, timings[0], judge.confirm(original))
    after = _figures(judge, kept.model, last, timings[1], quality)
    met = judge.allows(quality)
    layers, missing = _layers(judge, original, kept.model, timings) if options.layers else ([], [])
    data = {
        "description": samples.description,
        "sha256": samples.digest,
        "samples": samples.size,
        "generated": samples.generated,
        "labels": samples.has_labels,
        "calibrate": parts["calibrate"].size,
        **judge.samples,
    }
    return Report(
        verdict=_verdict(last, speed, quality, met=met, changed=kept.model.digest != judge.original_digest),
        speed=speed,
        size=last.size,
        quality=judge.kind,
        budget_met=met,
        before=before,
        after=after,
        stages=list(kept.stages),
        model=model_facts(original, source),
        output=None,
        data=data,
        metric=_metric_facts(judge),
        budget={"max_drop": options.budget.max_drop, "max_error": options.budget.max_error},
        target=options.target.name,
        options=_option_facts(options),
        environment=environment(options.threads),
        seconds=time.monotonic() - started,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=_warnings(judge, quality, samples, kept.model),
        notes=[*notes, *_alone(kept.stages), *missing],
        layers=layers,
        graph={"before": graph_table(original), "after": graph_table(kept.model)} if options.layers else None,
    )


def environment(threads: int) -> dict[str, Any]:
    """What a figure depends on besides the model."""
    packages = ("onnxcomp", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_features": list(cpu_features()),
        "threads": threads,
        "versions": {package: version(package) for package in packages},
    }


def file_facts(path: Path) -> dict[str, Any]:
    """Name, hash and size of a saved model; external data count."""
    state = hashlib.sha256()
    size = 0
    for part in model_files(path):
        with part.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                state.update(chunk)
                size += len(chunk)
    return {"path": str(path), "sha256": state.hexdigest(), "size_bytes": size}


def replayed_stages(path: Path) -> list[Stage]:
    """The stages that an earlier run kept, with the decisions that it took.

    Raises:
        OptionError: The file is not a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        kept = [stage for stage in report["stages"] if stage["verdict"] in {"kept", "forced"}]
        forms = [stage["attempts"][-1]["passes"] for stage in kept]
        named = [[(step["name"], dict(step["options"])) for step in form] for form in forms]
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise OptionError(message) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        message = f"{path}: is not a report of this tool, as --json writes it"
        raise OptionError(message) from error
    try:
        return [Stage(passes=tuple(make_pass(name, options) for name, options in form)) for form in named]
    except (OptionError, TypeError) as error:
        message = f"{path}: the report has options that its passes do not have ({error})"
        raise OptionError(message) from error


def _figures(judge: Judge, model: Model, score: Score, timing: Timing | None, quality: Quality) -> Figures:
    path = judge.path_of(model)
    load_ms = judge.runtime.check(path).load_ms if judge.target.is_host else None
    macs = score.macs, score.int8_macs
    figures = model_figures(model, path, score.census, quality, macs, load_ms=load_ms)
    return with_timing(dataclasses.replace(figures, latency_evidence=score.evidence), timing)


def _layers(
    judge: Judge, original: Model, new: Model, timings: Sequence[Timing | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each layer, and what to say where there are none: a table must not cost the run."""
    try:
        table = judge.layer_table(original, new)
    except OnnxcompError as error:
        return [], [f"the layers are not listed: {error}"]
    paths = judge.path_of(original), judge.path_of(new)
    times, notes = kernel_times(judge.runtime, paths, judge.feed, timings)
    rows, told = described_layers(table, (original, new), judge.layer_macs(original), times)
    return rows, [*notes, *told]


def _speed(last: Score, timings: Sequence[Timing | None]) -> float | None:
    old, new = timings
    if last.evidence != "measured" or old is None or new is None:
        return last.speed
    return old.median_ms / new.median_ms


def _verdict(last: Score, speed: float | None, quality: Quality, *, met: bool, changed: bool) -> str:
    """The answer in one line."""
    if not changed:
        return "nothing helped: the model stays as it is"
    pace = "" if speed is None else ", at the same speed" if abs(speed - 1) < 0.02 else f", {speed:.2f} times as fast"
    loss = f"drop {quality.drop:.4f}" if quality.drop is not None else f"relative error {quality.error:.2%}"
    return f"{last.size:.2f} times smaller{pace}, {loss}{'' if met else ' (over the budget)'}"


def _alone(stages: Sequence[StageEntry]) -> list[str]:
    """What to say where a pass was kept without the one that it pays with."""
    passes = [
        step
        for stage in stages
        if stage.verdict in {"kept", "forced"}
        for step in stage.attempts[-1].passes
        if step.changed
    ]
    told: dict[str, list[str]] = {}
    for index, step in enumerate(passes):
        wanted = registered_passes()[step.name].pays_with if step.name in registered_passes() else ""
        if wanted and all(later.name != wanted for later in passes[index + 1 :]):
            told.setdefault(wanted, []).append(step.name)
    return [
        f"{' and '.join(dict.fromkeys(names))} without {wanted}: ONNX Runtime has no kernels for zeros or for few "
        f"values, so these alone change neither size nor speed; add -p {wanted}"
        for wanted, names in told.items()
    ]


def _warnings(judge: Judge, quality: Quality, samples: Dataset, model: Model) -> list[str]:
    warnings = []
    if samples.generated:
        warnings.append("no data: only rewrites that need none were tried, and the error is that of made-up inputs")
    elif quality.interval is not None and quality.interval[1] > judge.budget.max_drop >= (quality.drop or 0.0):
        warnings.append(
            f"{quality.samples} samples are too few to be sure of the budget: the drop may be {quality.interval[1]:.4f}"
        )
    if not judge.deterministic:
        warnings.append("the model's outputs are random: they differ from run to run, so no loss can be measured")
    elif judge.unmeasured:
        warnings.append(f"{judge.unmeasured}, so these cannot show a loss; give --data that moves the outputs")
    elif judge.untold_drop is not None:
        warnings.append(
            f"one answer for all samples would lose {judge.untold_drop:.4f} only, so the relative error counts too: "
            "give --data of more kinds"
        )
    if not judge.target.is_host:
        warnings.append(f"speed is estimated from the kernels: the target {judge.target.name} is not this machine")
    if judge.target.saturates_here and judge.score(model).int8_macs:
        warnings.append(
            f"this machine's int8 kernels saturate and those of {judge.target.name} do not: the loss may be less there"
        )
    if dynamic := dynamic_inputs(model, judge.target):
        told = ", ".join(f"{spec.name!r} {spec}" for spec in dynamic)
        warnings.append(f"{judge.target.name} wants static shapes, and axes are dynamic in {told}; give --shape")
    return warnings


def model_facts(model: Model, source: ModelSource) -> dict[str, Any]:
    """What tells a model from others."""
    named = {"path": str(source)} if isinstance(source, str | Path) else {"path": None}
    return {
        **named,
        "sha256": model.digest,
        "size_bytes": model.size_bytes,
        "opset": model.opset,
        "ir_version": model.ir_version,
    }


def _metric_facts(judge: Judge) -> dict[str, Any] | None:
    metric = judge.metric
    if metric is None:
        return None
    return {"name": metric.name, "higher_is_better": metric.higher_is_better}


def _option_facts(options: Options) -> dict[str, Any]:
    return {
        "exclude": list(options.exclude),
        "force": options.force,
        "time_limit": options.time_limit,
        "seed": options.seed,
        "shapes": {name: list(shape) for name, shape in options.shapes.items()},
        "keep_debug": options.keep_debug,
        "timing": options.timing,
    }
