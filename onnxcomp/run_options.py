"""The options of one run of `optimize`, checked before any work starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from onnxcomp.budget import Budget
from onnxcomp.errors import OptionError
from onnxcomp.targets import Target

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Every option of one run; see `onnxcomp.optimize`.

    Raises:
        OptionError: One of them makes no sense.
    """

    budget: Budget
    metric: Any
    target: Target
    exclude: tuple[str, ...]
    force: bool
    time_limit: float | None
    seed: int
    threads: int
    shapes: dict[str, tuple[int, ...]]
    keep_debug: bool
    timing: bool
    allow_code: bool
    resume: bool
    layers: bool = field(repr=False, default=False)
    progress: Callable[[str], None] = field(repr=False, compare=False, default=lambda _: None)

    def __post_init__(self) -> None:
        """Refuse what would be taken for something else, or fail late."""
        if not isinstance(self.budget, Budget):
            message = f"budget must be a Budget, such as Budget(max_drop=0.01), got {self.budget!r}"
        elif not all(isinstance(pattern, str) for pattern in self.exclude):
            message = f"exclude must be a list of patterns of node names, got {list(self.exclude)!r}"
        elif self.time_limit is not None and not 0 < self.time_limit <= math.inf:
            message = f"time_limit must be a number of seconds above 0, got {self.time_limit!r}"
        elif self.seed < 0:
            message = f"seed must be a whole number of at least 0, got {self.seed!r}"
        else:
            return
        raise OptionError(message)
