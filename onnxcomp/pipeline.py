"""`optimize`: run the stages of a recipe, keep what the judge finds worth keeping, and tell the whole story."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from onnxcomp import metrics, resume
from onnxcomp.budget import Budget
from onnxcomp.data import Dataset, ImageOptions, generate, input_specs, open_data
from onnxcomp.errors import DataError, ModelError, OptionError, RequirementError, RuntimeFailure
from onnxcomp.first_run import first_judge, written_file
from onnxcomp.fixed_shapes import made_static
from onnxcomp.judge import Judge
from onnxcomp.ledger import Report
from onnxcomp.lints import lint_model, mended_by
from onnxcomp.lints.quantization import CHANNEL_OPSET
from onnxcomp.metrics import Metric
from onnxcomp.model import Model, ModelSource
from onnxcomp.passes import Context, Pass
from onnxcomp.quality import Reference
from onnxcomp.reporting import build_report, file_facts, replayed_stages
from onnxcomp.run_options import Options
from onnxcomp.runtime import Runtime
from onnxcomp.stages import Stage, default_stages, joined
from onnxcomp.targets import Target, find_target, host_target
from onnxcomp.trial_runs import Trial
from onnxcomp.verdict import Kept, StageRunner
from onnxcomp.workfolder import work_folder

__all__ = ["Result", "Shared", "optimize"]

GENERATED_SAMPLES = 8


@dataclass
class Result:
    """What `optimize` returns: the model, and the proof."""

    model: Model
    report: Report

    def save(self, path: str | Path) -> None:
        """Write the model, whole or not at all, and note its hash and size in the report.

        Raises:
            OutputError: It cannot be written.
        """
        self.model.save(path)
        self.report.output = file_facts(Path(path))


@dataclass
class Shared:
    """What runs on one model and data for several targets have in common, so that it is measured once.

    Give the same object to each run. What does not depend on the target is taken over where model and data are equal:
    calibration, and the original's outputs.

    Attributes:
        activations: What float activations look like, by model, data, tensor and method.
        references: The original's outputs, by model, data, and how they are judged.

    Example:
        >>> from onnx import parser
        >>> graph = "g (float[N, 4] x) => (float[N, 4] y) { i = Identity(x)  y = Relu(i) }"
        >>> model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
        >>> shared = Shared()
        >>> results = {name: optimize(model, target=name, shared=shared) for name in ("arm64", "web")}
        >>> [(name, len(result.model.graph.nodes)) for name, result in results.items()]
        [('arm64', 1), ('web', 1)]
    """

    activations: dict[Any, Any] = field(default_factory=dict, repr=False)
    references: dict[Any, Reference] = field(default_factory=dict, repr=False)


def optimize(
    source: ModelSource,
    *,
    data: Any = None,
    passes: Sequence[Pass | Stage] | None = None,
    budget: Budget | None = None,
    metric: str | Callable[..., Any] | Metric | None = None,
    target: str | Target | None = None,
    shared: Shared | None = None,
    exclude: Sequence[str] = (),
    force: bool = False,
    time_limit: float | None = None,
    seed: int = 0,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    keep_debug: bool = False,
    timing: bool = True,
    replay: str | Path | None = None,
    allow_code: bool = False,
    image: ImageOptions | None = None,
    progress: Callable[[str], None] | None = None,
    resume: bool = True,
    layers: bool = False,
) -> Result:
    """Make a model smaller and faster, and never worse: every stage is measured, and kept only if it pays.

    Args:
        source: A path, a ModelProto or a Model. It is not changed.
        data: Samples for calibration and judgement: a path, arrays, an iterable, ...; see `onnxcomp.data.open_data`.
            Without data only rewrites that need none are tried.
        passes: What to try, in order: passes or stages. A pass is a stage by itself, but for those that pay only with a
            later one, such as `prune` with `pack`: those are joined. By default the recipe of `default_stages`.
        budget: What the result may cost.
        metric: "top1", "top5", "mse", "auc", "module:function" or a function of (outputs, labels). All need labels but
            "top1", which falls back to the original's own answers.
        target: What the model is for; this host by default.
        shared: What to share with runs for other targets.
        exclude: Patterns of node names that every pass leaves alone; a text is one pattern.
        force: Keep every stage whatever it costs; all is measured all the same.
        time_limit: Seconds after which no further stage is begun and choices by measurement end.
        seed: Of everything random.
        threads: Threads that ONNX Runtime runs and is timed with.
        shapes: Sizes of dynamic inputs, for generated inputs; for a target that wants static shapes the model's inputs
            get them too.
        keep_debug: Keep the exporter's traces.
        timing: False: decide without the clock, so that the same input gives the same file.
        replay: The JSON report of an earlier run, whose decisions are taken over.
        allow_code: Whether "module:function" may be imported and called.
        image: How to read a folder of images.
        progress: Called with a short line on what is going on.
        resume: Whether to take over the finished stages of an interrupted run.
        layers: Whether the report lists every layer with its weight, kernel and error; a few samples run for it.

    Returns:
        The model and the report.

    Raises:
        OnnxcompError: Something in the input is missing or wrong; see `onnxcomp.errors`.

    Example:
        >>> from onnx import parser
        >>> graph = "g (float[N, 4] x) => (float[N, 4] y) { i = Identity(x)  y = Relu(i) }"
        >>> model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
        >>> result = optimize(model)
        >>> [node.op for node in result.model.graph.nodes]
        ['Relu']
    """
    started = time.monotonic()
    options = Options(
        budget=Budget() if budget is None else budget,
        metric=metric,
        target=_target(target),
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        force=force,
        time_limit=time_limit,
        seed=seed,
        threads=threads,
        shapes={name: tuple(shape) for name, shape in (shapes or {}).items()},
        keep_debug=keep_debug,
        timing=timing and replay is None,
        allow_code=allow_code,
        resume=resume,
        layers=layers,
        **({"progress": progress} if progress else {}),
    )
    loaded = Model.load(source)
    readable = _readable(loaded, options.target)
    original = _with_static_shapes(readable, data, options, image)
    samples = _samples(original, data, options, image)
    stages = _stages(passes, replay, has_data=not samples.generated, fit=_needs_fit(original, options.target))
    _check_order(stages)
    _check_requirements(stages, samples)
    chosen_metric, classifier, notes = _metric(options, samples)
    if readable is not loaded:
        notes.append(f"ONNX Runtime does not load the model at opset {loaded.opset}: it is read as {readable.opset}")
    if original is not readable:
        fixed = "; ".join(f"{spec.name} {spec}" for spec in input_specs(original.proto()))
        notes.append(f"the inputs' axes are fixed, since {options.target.name} wants static shapes: {fixed}")
    config = {} if options.target.is_host else dict(options.target.session_config)
    # Sums of matrix products are cut into as many parts as there are threads, and round accordingly: the same choices
    # on machines with more cores. On a busy machine threads that wait for each other take several times as long.
    blas_threads = threads if options.timing else 1
    with (
        samples,
        work_folder() as workdir,
        threadpool_limits(blas_threads, user_api="blas"),
        Runtime(threads=threads, session_config=config, blas_threads=blas_threads) as runtime,
    ):
        options.progress("measuring the original")
        file = Path(source) if isinstance(source, str | Path) and original is loaded else None
        shared = shared or Shared()
        make = _judge_maker(original, options, runtime, workdir, chosen_metric, classifier, file, shared)
        written = partial(written_file, original, file, workdir)
        trial = Trial(original, written, runtime, seed, options.shapes)
        judge, samples, parts = first_judge(make, samples, trial, lambda: _check_loads(runtime, written()))
        context = _context(options, parts["calibrate"], judge, runtime, workdir, started)
        context.activations = shared.activations
        runner = StageRunner(original, judge, context, force=force, replay=replay is not None)
        kept, finished = _run_stages(runner, stages, options, samples)
        if file is not None:
            loaded.check_files()  # the original was run from there
        report = build_report(original, kept, judge, options, samples, parts, source, notes, started=started)
    finished.remove()
    return Result(kept.model, report)


def _run_stages(
    runner: StageRunner, stages: Sequence[Stage], options: Options, samples: Dataset
) -> tuple[Kept, resume.Finished]:
    """Run every stage on what the stages before it left, then confirm the whole on samples that no choice saw."""
    key = resume.run_key(runner.judge, options, samples, stages) if options.resume else None
    finished = resume.Finished(key)
    kept = Kept.start(runner.original)
    for index, stage in enumerate(stages):
        earlier = finished.load(index)
        if earlier is not None:
            model, entry = earlier
            if model is not None:
                model.path = runner.original.path  # what it really comes from, and must not overwrite
            kept = kept.after_resumed(model, entry, stage)
            continue
        kept = runner.run(stage, kept)
        finished.store(index, kept)
    return runner.confirm(kept, stages), finished


def _target(target: str | Target | None) -> Target:
    if target is None:
        return host_target()
    return find_target(target) if isinstance(target, str) else target


def _readable(model: Model, target: Target) -> Model:
    """The model at the opset that its scales for each channel need, without which it does not load; else itself."""
    if all(finding.id != "per-channel-opset" for finding in lint_model(model, target)):
        return model
    fork = model.fork()
    fork.raise_opset(CHANNEL_OPSET)
    return fork


def _with_static_shapes(model: Model, data: Any, options: Options, image: ImageOptions | None) -> Model:
    """The model with fixed inputs, where the target wants that; else the model itself.

    What --shape leaves open is taken from the data, where these can be read twice; a batch is 1.
    """

    def one_sample(fixed: Model) -> Mapping[str, Any] | None:
        if not isinstance(data, str | Path | Mapping | np.ndarray | list | tuple):
            return None
        with _samples(fixed, data, options, image) as samples:
            return next(samples.feeds(1)) if len(samples.groups()) == 1 else None

    return made_static(model, options.target, options.shapes, one_sample)


def _needs_fit(model: Model, target: Target) -> bool:
    """Whether a model has what its target does not take, and `fit-target` mends."""
    mended = mended_by("fit-target")
    return any(finding.id in mended for finding in lint_model(model, target))


def _samples(model: Model, data: Any, options: Options, image: ImageOptions | None) -> Dataset:
    """The user's samples, checked against the model's inputs, or generated ones."""
    proto = model.proto()
    if data is None:
        return generate(proto, count=GENERATED_SAMPLES, seed=options.seed, shapes=options.shapes)
    return open_data(data, input_specs(proto), shapes=options.shapes, image=image, allow_code=options.allow_code)


def _stages(
    passes: Sequence[Pass | Stage] | None, replay: str | Path | None, *, has_data: bool, fit: bool
) -> list[Stage]:
    if replay is not None:
        if passes is not None:
            message = "replay takes its passes from the report; leave out the passes"
            raise OptionError(message)
        return replayed_stages(Path(replay))
    if passes is None:
        return default_stages(data=has_data, fit=fit)
    return joined(passes)


def _check_order(stages: Sequence[Stage]) -> None:
    """Refuse a lossy pass after one that seals the weights, before any work starts."""
    sealed = None
    for step in (step for stage in stages for step in stage.passes):
        if step.seals:
            sealed = step.name
        elif step.grows:
            sealed = None
        elif sealed and not step.lossless:
            message = f"{step.name} cannot look into the weights that {sealed} has written; put {sealed} after it"
            raise OptionError(message)


def _check_requirements(stages: Sequence[Stage], samples: Dataset) -> None:
    """Refuse a pass that cannot run, before any work starts."""
    there = {"data": not samples.generated, "labels": samples.has_labels}
    for stage in stages:
        for wanted in stage.passes:
            if "torch" in wanted.requires and importlib.util.find_spec("torch") is None:
                message = f"the pass {wanted.name!r} needs torch: pip install 'onnxcomp[train]'"
                raise RequirementError(message)
            for need in sorted(wanted.requires):
                if not there.get(need, True):
                    message = f"the pass {wanted.name!r} needs {need}; give --data{' with labels' * (need == 'labels')}"
                    raise RequirementError(message)


def _metric(options: Options, samples: Dataset) -> tuple[Metric | None, bool | None, list[str]]:
    """The metric to use, whether the outputs are declared to be class scores, and what to tell the user."""
    asked = options.metric
    if samples.generated:
        return None, False, []
    if asked is None:
        found = metrics.metric_for_labels(samples.labels())
        if found is not None:
            return found, None, [f"the labels look like classes: judged by {found.name}"]
        unused = ["the data have labels, but no metric was given: they are not used"] if samples.has_labels else []
        return None, None, unused
    metric = metrics.get_metric(asked, allow_code=options.allow_code)
    if samples.has_labels:
        return metric, None, []
    if metric.name == "top1":
        return None, True, ["no labels: top1 is estimated from the original's own class probabilities"]
    message = f"metric {metric.name!r} needs labels; put them under 'label' in the data"
    raise DataError(message)


def _judge_maker(
    original: Model,
    options: Options,
    runtime: Runtime,
    workdir: Path,
    metric: Metric | None,
    classifier: bool | None,
    file: Path | None,
    shared: Shared,
) -> Callable[..., Judge]:
    """A judge that lacks only the samples."""
    return partial(
        Judge,
        original,
        metric=metric,
        budget=options.budget,
        runtime=runtime,
        target=options.target,
        workdir=workdir,
        seed=options.seed,
        timing=options.timing,
        classifier=classifier,
        original_file=file,
        references=shared.references,
    )


def _check_loads(runtime: Runtime, path: Path) -> None:
    """Refuse a model that no data and no shape help, since ONNX Runtime does not even load it."""
    try:
        runtime.check(path, optimize=False)
    except RuntimeFailure as error:
        message = f"the model: ONNX Runtime does not load it: {str(error).partition(': ')[2]}"
        raise ModelError(message) from error


def _context(options: Options, data: Dataset, judge: Judge, runtime: Runtime, workdir: Path, started: float) -> Context:
    return Context(
        data=None if data.generated else data,
        target=options.target,
        judge=judge,
        runtime=runtime,
        workdir=workdir,
        rng=np.random.default_rng(options.seed),
        exclude=options.exclude,
        keep_debug=options.keep_debug,
        progress=options.progress,
        deadline=started + options.time_limit if options.time_limit else None,
    )
