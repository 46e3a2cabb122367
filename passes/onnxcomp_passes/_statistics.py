"""What calibration data show of a model's tensors, remembered: several targets then share one calibration."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from onnxcomp.errors import RequirementError
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.runtime.results import Observer

__all__ = ["observe"]

O = TypeVar("O", bound=Observer)  # noqa: E741 - the type of an observer

OBSERVED_ROWS = 8
"""Samples that are run together to see their activations, at most: more need more memory and are no faster."""


def observe(model: Model, observers: Mapping[str, O], context: Context) -> dict[str, O]:
    """Show the calibration data's activations to observers, or give what the same observers saw before.

    What float activations look like does not depend on the target, so `context.activations`, which runs for several
    targets share, spares all but the first the passes over the data.

    Args:
        model: The float model.
        observers: Fresh ones, by the name of the tensor to watch.
        context: Its data, runtime and statistics are used.

    Returns:
        The observers with what they saw. Do not change them: others may get them too.

    Raises:
        RequirementError: There are no data, or nothing to run them with.
    """
    if context.data is None or context.runtime is None or context.workdir is None:
        message = "calibration needs data; give --data"
        raise RequirementError(message)
    where = model.digest, context.data.digest
    seen = {name: (*where, name, _method(watch)) for name, watch in observers.items()}
    missing = {name: observers[name] for name, key in seen.items() if key not in context.activations}
    if missing:
        context.progress(f"calibrating {len(missing)} tensors on {context.data.size} samples")
        path = context.judge.path_of(model) if context.judge else context.workdir / "calibration.onnx"
        if context.judge is None:
            model.save(path, durable=False)
        feeds = partial(context.data.feeds, min(OBSERVED_ROWS, context.data.batch_size))
        for name, watch in context.runtime.observe(path, feeds, missing).items():
            context.activations[seen[name]] = watch
    return {name: context.activations[key] for name, key in seen.items()}


def _method(observer: Observer) -> str:
    """What tells fresh observers apart: their class and settings."""
    return hashlib.sha256(pickle.dumps(observer)).hexdigest()
