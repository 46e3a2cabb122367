"""Two models that are to be compared: whether they fit each other, and what both can be fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp import metrics
from onnxcomp.data import Dataset, InputSpec, input_specs
from onnxcomp.errors import DataError, ModelError
from onnxcomp.metrics import Metric
from onnxcomp.model import Model, ModelSource
from onnxcomp.runtime import Runtime

__all__ = [
    "as_tuples",
    "chosen_metric",
    "common_inputs",
    "common_outputs",
    "model_file",
    "narrowed",
    "source_name",
    "static_shapes",
]


def common_inputs(original: Model, new: Model) -> list[InputSpec]:
    """What both models can be fed: axes that either of them fixes are fixed."""
    return narrowed(input_specs(original.proto()), new)


def narrowed(specs: Iterable[InputSpec], new: Model) -> list[InputSpec]:
    """What a further model can be fed of what fits others, which are called the original in errors."""
    ours = {spec.name: spec for spec in specs}
    theirs = {spec.name: spec for spec in input_specs(new.proto())}
    if ours.keys() != theirs.keys():
        listed = [", ".join(specs) or "none" for specs in (ours, theirs)]
        message = f"the models must take the same inputs; the original has {listed[0]}, the new one {listed[1]}"
        raise ModelError(message)
    return [_common(spec, theirs[name]) for name, spec in ours.items()]


def _common(one: InputSpec, other: InputSpec) -> InputSpec:
    pairs = list(zip(one.shape, other.shape, strict=False))
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    if one.dtype != other.dtype or one.kind != other.kind or one.rank != other.rank or clash:
        message = f"input {one.name!r} is {one} in the original and {other} in the new model; they must fit"
        raise ModelError(message)
    return dataclasses.replace(one, shape=tuple(b if isinstance(b, int) else a for a, b in pairs))


def static_shapes(specs: Iterable[InputSpec]) -> dict[str, Sequence[int]] | None:
    """The shapes that are wholly fixed, for generated inputs."""
    fixed = {spec.name: spec.shape for spec in specs if spec.kind == "tensor"}
    return {name: [int(dim) for dim in dims if isinstance(dim, int)] for name, dims in fixed.items() if _known(dims)}


def _known(dims: Sequence[object]) -> bool:
    return all(isinstance(dim, int) for dim in dims)


def as_tuples(shapes: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Shapes as tuples; none is an empty mapping."""
    return {name: tuple(shape) for name, shape in (shapes or {}).items()}


def common_outputs(runtime: Runtime, paths: Sequence[Path]) -> list[list[str]]:
    """The outputs of each model, those that belong together at the same place."""
    ours, theirs = ([info.name for info in runtime.check(path).outputs] for path in paths)
    if sorted(ours) == sorted(theirs):
        return [ours, ours]
    if len(ours) != len(theirs):
        listed = [", ".join(names) for names in (ours, theirs)]
        message = f"the models must have the same outputs; the original has {listed[0]}, the new one {listed[1]}"
        raise ModelError(message)
    return [ours, theirs]


def model_file(source: ModelSource, model: Model, beside: Path) -> Path:
    """The user's file, or one made of the model: a Model may have changed since it was read from its file."""
    if isinstance(source, str | Path):
        return Path(source)
    model.save(beside)
    return beside


def source_name(source: ModelSource) -> str:
    """A model's file, or "model"."""
    if isinstance(source, str | Path):
        return str(source)
    return str(source.path) if isinstance(source, Model) and source.path else "model"


def chosen_metric(
    asked: str | Callable[..., Any] | Metric | None, samples: Dataset, *, allow_code: bool
) -> Metric | None:
    """The metric that was asked for, or that the labels suggest; None without labels."""
    labels = samples.labels() if samples.has_labels else None
    if asked is not None:
        metric = metrics.get_metric(asked, allow_code=allow_code)
        if labels is None:
            message = f"metric {metric.name!r} needs labels; give data that have them under 'label'"
            raise DataError(message)
        return metric
    return metrics.metric_for_labels(labels)
