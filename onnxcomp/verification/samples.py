"""A few samples, and what models give on them: computed when they are asked for, and kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from onnxcomp.data import Dataset
from onnxcomp.errors import RuntimeFailure
from onnxcomp.runtime import Feed, Runtime
from onnxcomp.verification.differences import difference

__all__ = ["FewSamples"]


class FewSamples:
    """The first samples of the data one by one, and the outputs of two models on them.

    Args:
        data: The samples.
        count: How many of them.
        runtime: This host's CPU provider, set to fuse as the target does.
        paths: The original and the model to verify.
        names: The outputs of each, those that belong together at the same place.
    """

    def __init__(
        self, data: Dataset, count: int, runtime: Runtime, paths: Sequence[Path], names: Sequence[list[str]]
    ) -> None:
        few = data.subset(range(min(count, data.size)))
        batches = list(few.batches(1))
        self.feeds: list[Feed] = [batch.inputs for batch in batches]
        self._counts = [batch.count for batch in batches]
        self._runtime, self._paths, self._names = runtime, paths, names
        self._known: tuple[list[list[Any]], list[list[Any]]] = ([], [])

    @property
    def names(self) -> list[str]:
        """The outputs of the model that is verified."""
        return self._names[1]

    def original(self, count: int) -> list[list[Any]]:
        """The original's outputs on the first samples."""
        return self._outputs(0, count)

    def new(self, count: int) -> list[list[Any]]:
        """What this host's CPU provider gives of the model that is verified."""
        return self._outputs(1, count)

    @cached_property
    def rounding(self) -> float:
        """How far the original's outputs are from its own with optimizations off, on the first two runs."""
        try:
            plain = list(self._runtime.run(self._paths[0], self.feeds[:2], outputs=self._names[0], optimize=False))
        except RuntimeFailure:
            return 0.0
        error = difference(self.original(len(plain)), plain).error
        return error if math.isfinite(error) else 0.0

    def count(self, runs: int) -> int:
        """How many samples the first runs are: a model with a fixed batch takes several in each."""
        return sum(self._counts[:runs])

    def is_random(self) -> bool:
        """Whether a model gives other outputs when it is run again."""
        runs = ((self._outputs(which, 1), list(self._again(which))) for which in (0, 1))
        return any(not difference(first, again).equal for first, again in runs)

    def _again(self, which: int) -> Iterator[list[Any]]:
        return self._runtime.run(self._paths[which], self.feeds[:1], outputs=self._names[which])

    def _outputs(self, which: int, count: int) -> list[list[Any]]:
        known = self._known[which]
        known += self._runtime.run(self._paths[which], self.feeds[len(known) : count], outputs=self._names[which])
        return known[:count]

    def run(self, runtime: Runtime, path: Path, seconds: float, *, optimize: bool = True) -> list[list[Any]]:
        """Run a model on samples until the time is up, but on one at least."""
        return list(_until(runtime.run(path, self.feeds, outputs=self.names, optimize=optimize), seconds))


def _until(runs: Iterator[list[Any]], seconds: float) -> Iterator[list[Any]]:
    started = time.monotonic()
    for run in runs:
        yield run
        if time.monotonic() - started > seconds:
            return
