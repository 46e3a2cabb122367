"""Samples that a model runs with, where it refuses those that its declared shapes allow.

A graph does not say all that it asks of its inputs. A batch that is declared dynamic may have to be 1, since an inner
shape is fixed; a window may be longer than the usual made-up sequence, or a height may have to shrink to 1. So what
fails is tried again otherwise, before it is called a failure. A model that runs at once costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from onnxcomp.data import Dataset, generate
from onnxcomp.errors import RuntimeFailure
from onnxcomp.model import Model
from onnxcomp.quality import flatten
from onnxcomp.runtime import Runtime

__all__ = ["SIZES", "Trial", "agrees_with_itself"]

SIZES = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
"""What is tried in turn: powers of two, since layers halve sizes; the largest first, since it tests most."""

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """Uses samples, and others where the model refuses them.

    Attributes:
        model: The model.
        file: Gives its file; asked only where something was refused.
        runtime: What runs it.
        seed: Of samples that are made up, as for `generate`.
        shapes: What is asked of their shapes, as for `generate`.
    """

    model: Model
    file: Callable[[], Path]
    runtime: Runtime
    seed: int
    shapes: Mapping[str, Sequence[int]] | None

    def use(self, samples: Dataset, action: Callable[[Dataset], T]) -> tuple[T, Dataset]:
        """Do something with samples; with others where the model refuses these and takes those.

        Args:
            samples: The user's, which are only cut into runs otherwise, or generated ones, which get other sizes too.
            action: What is done; it runs the model.

        Returns:
            What `action` returned, and the samples that it was given.

        Raises:
            RuntimeFailure: The model refuses all of them; it is what `action` raised at first.
        """
        try:
            return action(samples), samples
        except RuntimeFailure:
            path = self.file()
            other = next((other for other in self._others(samples) if self._runs(other, path)), None)
            if other is None:
                raise
        return action(other), other

    def _others(self, samples: Dataset) -> Iterator[Dataset]:
        """Yield what else the model may take, the closest first."""
        if samples.batch_size > 1:
            yield samples.one_by_one()
        if not samples.generated:
            return
        tried = [_shapes(samples)]
        for size in SIZES:
            other = generate(self.model.proto(), count=samples.size, seed=self.seed, shapes=self.shapes, size=size)
            if _shapes(other) not in tried:
                tried.append(_shapes(other))
                yield from (other, other.one_by_one()) if other.batch_size > 1 else (other,)

    def _runs(self, samples: Dataset, path: Path) -> bool:
        """Whether the model takes the first batch."""
        try:
            for _ in self.runtime.run(path, [next(samples.feeds())]):
                pass
        except RuntimeFailure:
            return False
        return True


def agrees_with_itself(runtime: Runtime, path: Path, feed: Mapping[str, Any]) -> bool:
    """Return whether two runs of a model on one feed agree; random operators make them differ."""
    first, second = (flatten(run) for run in runtime.run(path, [feed, feed]))
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(first, second, strict=True))


def _shapes(samples: Dataset) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in next(samples.feeds(1)).items()}
