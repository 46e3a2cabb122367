"""`verify`: run a model in every way that its target has, and tell which of them ran, held, or could not be tried."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcomp.comparing import GENERATED_SAMPLES
from onnxcomp.data import Dataset, ImageOptions, generate, input_specs, open_data
from onnxcomp.errors import OptionError, RuntimeFailure
from onnxcomp.lints import Finding, lint_file, lint_model
from onnxcomp.metrics import Metric
from onnxcomp.model import Model, ModelSource
from onnxcomp.ort_format import is_ort
from onnxcomp.pairs import (
    as_tuples,
    chosen_metric,
    common_inputs,
    common_outputs,
    model_file,
    source_name,
    static_shapes,
)
from onnxcomp.quality import Quality, Reference
from onnxcomp.runtime import Runtime
from onnxcomp.targets import Target, find_target, host_target
from onnxcomp.trial_runs import Trial
from onnxcomp.verification.always import Always, ort_runtime
from onnxcomp.verification.coverage import coverages
from onnxcomp.verification.elsewhere import run_elsewhere
from onnxcomp.verification.environments import ENVIRONMENTS, find_environment
from onnxcomp.verification.results import LayerResult, Verification
from onnxcomp.verification.samples import FewSamples
from onnxcomp.workfolder import work_folder

__all__ = ["ALWAYS", "LAYERS", "verify"]

ALWAYS = ("cpu", "ort")
"""The layers that need no installation."""

LAYERS = (*ALWAYS, *ENVIRONMENTS)

FEW = 8
"""Samples that a layer runs on: enough to see a difference, few enough for an emulated processor."""

SHARE = 0.25
"""Of the time that both models take over the data, what each further variant on this host may take: five of them and
the two models then stay below three times that, loading apart."""

UNVERIFIED = {
    "nnapi": "what NNAPI computes, and how fast, cannot be verified off the device: only which operators it has",
    "coreml": "what CoreML computes, and how fast, cannot be verified off the device: only which operators it has",
}
RANDOM = "the model's outputs are random: they differ from run to run, so nothing can be compared"
NO_LATENCY = "speed on the device cannot be verified here: measure it there"


def verify(
    original: ModelSource,
    new: ModelSource,
    *,
    data: Any = None,
    target: str | Target | None = None,
    layers: Sequence[str] | None = None,
    install: bool = False,
    samples: int = FEW,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    threads: int = 1,
    image: ImageOptions | None = None,
    allow_code: bool = False,
    metric: str | Callable[..., Any] | Metric | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Verify that a model does on its target what it does here, and here what the original does.

    Args:
        original: The model that it was made of: a path, a ModelProto or a Model.
        new: The model to verify: the same, or a file in ONNX Runtime's own format (.ort).
        data: Samples; see `onnxcomp.data.open_data`. Without data inputs are generated.
        target: What the model is for; this host by default.
        layers: Names of layers, of `LAYERS`; by default those of the target.
        install: Whether to install what a layer lacks into the user's cache folder.
        samples: How many samples each layer runs on. The model's loss is measured on all.
        shapes: Sizes of dynamic inputs, for generated inputs.
        seed: Of generated inputs and intervals.
        threads: Threads that ONNX Runtime runs with on this host.
        image: How to read a folder of images.
        allow_code: Whether "module:function" may be imported and called.
        metric: "top1", "top5", "mse", "auc", "module:function" or a function of (outputs, labels).
        progress: Called with a short line on what is going on.

    Returns:
        What each layer found. A layer that fell back to another provider says so, and one that could not run is
        skipped, with the reason.

    Raises:
        OnnxcompError: A model cannot be read or run, the models do not fit each other, or the data do not fit them.

    Example:
        >>> from onnx import parser
        >>> graph = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
        >>> model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
        >>> found = verify(model, model)
        >>> found.passed, [layer.status for layer in found.layers]
        (True, ['ran', 'ran', 'ran', 'ran'])
    """
    started = time.monotonic()
    chosen = find_target(target) if isinstance(target, str) else target or host_target()
    asked = _layers(layers, chosen)
    tell = progress or (lambda _: None)
    with work_folder() as folder:
        pair = _Pair.open(original, new, folder)
        with (
            _samples(pair, data, shapes, seed, image, allow_code=allow_code) as dataset,
            Runtime(threads=threads, session_config=_config(chosen)) as runtime,
        ):
            tell("running both models")
            outputs = common_outputs(runtime, pair.paths)
            before = time.monotonic()
            task = chosen_metric(metric, dataset, allow_code=allow_code)
            sizes = shapes or static_shapes(dataset.specs)
            quality, dataset = Trial(pair.original, lambda: pair.paths[0], runtime, seed, sizes).use(
                dataset, lambda fed: _quality(runtime, pair.paths, outputs, fed, task, seed)
            )
            seconds = SHARE * (time.monotonic() - before)
            few = FewSamples(dataset, samples, runtime, pair.paths, outputs)
            always = Always(runtime, few, pair.paths[1], chosen, seconds, folder)
            results = list(_run_layers(asked, always, pair, install=install, progress=tell))
            covered = coverages(runtime, pair.paths[1]) if pair.new is not None else ()
            tell("looking for traps")
            findings = _findings(pair, chosen, runtime)
            described = {"description": dataset.description, "samples": dataset.size, "generated": data is None}
    return Verification(
        original=source_name(original),
        new=source_name(new),
        target=chosen.name,
        data=described,
        quality=dataclasses.asdict(quality),
        layers=tuple(results),
        coverage=covered,
        findings=findings,
        unverified=tuple(_unverified(chosen)),
        warnings=tuple(_warnings(data)),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Pair:
    """The two models, and the files that hold them."""

    original: Model
    new: Model | None
    paths: tuple[Path, Path]

    @staticmethod
    def open(original: ModelSource, new: ModelSource, folder: Path) -> _Pair:
        """Load both; a file in ONNX Runtime's own format is only run."""
        first = Model.load(original)
        path = model_file(original, first, folder / "original.onnx")
        if isinstance(new, str | Path) and is_ort(Path(new)):
            named = Path(new)
            if named.suffix != ".ort":  # ONNX Runtime knows the format by the name
                (folder / "new.ort").symlink_to(named.absolute())
                named = folder / "new.ort"
            return _Pair(first, None, (path, named))
        second = Model.load(new)
        return _Pair(first, second, (path, model_file(new, second, folder / "new.onnx")))


def _config(target: Target) -> dict[str, str]:
    return {} if target.is_host else dict(target.session_config)


def _layers(asked: Sequence[str] | None, target: Target) -> tuple[str, ...]:
    for name in asked or ():
        if name not in LAYERS:
            message = f"no layer is called {name!r}; there are {', '.join(LAYERS)}"
            raise OptionError(message)
    return tuple(dict.fromkeys(asked if asked is not None else (*ALWAYS, *target.verify_layers)))


def _samples(
    pair: _Pair,
    data: Any,
    shapes: Mapping[str, Sequence[int]] | None,
    seed: int,
    image: ImageOptions | None,
    *,
    allow_code: bool,
) -> Dataset:
    specs = common_inputs(pair.original, pair.new) if pair.new else input_specs(pair.original.proto())
    if data is None:
        proto = pair.original.proto()
        return generate(proto, count=GENERATED_SAMPLES, seed=seed, shapes=shapes or static_shapes(specs))
    return open_data(data, specs, shapes=as_tuples(shapes), image=image, allow_code=allow_code)


def _quality(
    runtime: Runtime,
    paths: Sequence[Path],
    outputs: Sequence[list[str]],
    samples: Dataset,
    metric: Metric | None,
    seed: int,
) -> Quality:
    """What the model loses against the original on all samples."""
    reference = Reference(samples, runtime.run(paths[0], samples.feeds(), outputs=outputs[0]), metric, None, seed)
    return reference.compare(runtime.run(paths[1], samples.feeds(), outputs=outputs[1]), samples)


def _findings(pair: _Pair, target: Target, runtime: Runtime) -> tuple[Finding, ...]:
    if pair.new is None:
        return lint_file(pair.paths[1], target)
    return lint_model(pair.new, target, runtime.census(pair.paths[1]))


def _run_layers(
    asked: Sequence[str], always: Always, pair: _Pair, *, install: bool, progress: Callable[[str], None]
) -> Iterator[LayerResult]:
    if always.few.is_random():
        yield from (LayerResult(name, "not compared", "skipped", RANDOM) for name in asked)
        return
    for name in asked:
        progress(f"verifying: {name}")
        if name == "cpu":
            yield from always.cpu()
        elif name == "ort":
            yield from always.ort()
        else:
            try:
                artifact = _artifact(always, pair)
            except RuntimeFailure as error:
                yield LayerResult(name, "the file that is shipped cannot be written", "failed", str(error))
                continue
            yield run_elsewhere(
                find_environment(name),
                artifact,
                pair.new,
                always.few,
                always.runtime,
                plain=is_ort(artifact),
                config=dict(always.target.session_config),
                install=install,
                folder=always.folder,
                progress=progress,
            )


def _artifact(always: Always, pair: _Pair) -> Path:
    """The file that other environments get: what is shipped to the target."""
    if pair.new is None or always.target.artifact != "ort":
        return always.path
    written = always.folder / "shipped.ort"
    if not written.exists():
        with ort_runtime() as runtime:
            runtime.convert(always.path, written)
    return written


def _unverified(target: Target) -> Iterator[str]:
    if target.name in UNVERIFIED:
        yield UNVERIFIED[target.name]
    if not target.is_host:
        yield NO_LATENCY


def _warnings(data: Any) -> Iterator[str]:
    if data is None:
        yield "no data: inputs are made up, and say little of what real ones do"
