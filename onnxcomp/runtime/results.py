"""What crosses between :class:`~onnxcomp.runtime.client.Runtime` and its worker, and comes back to the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Feed: TypeAlias = Mapping[str, Array]
"""One run's inputs: input name -> array."""


class Observer(Protocol):
    """Anything that looks at the values of one tensor, run by run. It must be picklable."""

    def update(self, array: Array, /) -> None:
        """Take in the tensor's value in one more run."""


class PairObserver(Protocol):
    """Anything that looks at the values of one tensor in two models, run by run. It must be picklable."""

    def update(self, reference: Array, candidate: Array, /) -> None:
        """Take in the values in one more run, of any two shapes."""


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output, as ONNX Runtime sees it.

    Attributes:
        name: The tensor's name.
        type: ONNX Runtime's spelling, such as ``tensor(float)`` or ``seq(tensor(int64))``.
        shape: One entry a dimension: a size, a symbol, or None where nothing is known. Empty for a scalar, and where
            ONNX Runtime knows no shape at all.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class SessionInfo:
    """A model that ONNX Runtime has loaded."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    load_ms: float


@dataclass(frozen=True)
class Timing:
    """How long a run takes, in milliseconds, over `runs` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


@dataclass(frozen=True)
class Request:
    """Asks the worker to do one thing: the operation's name and its arguments."""

    operation: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """The worker's answer."""

    value: Any


@dataclass(frozen=True)
class Alive:
    """A sign of life in a long request; `path` is the model that it is busy with."""

    path: str | None


@dataclass(frozen=True)
class Refusal:
    """The request failed and the worker lives on; `reason` is one line."""

    reason: str
    error: str = "RuntimeFailure"
    path: str | None = None
