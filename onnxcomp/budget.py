"""The budget: what a result may lose, and whether what was measured is inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxcomp.errors import OptionError
from onnxcomp.ledger import WHOLE_OUTPUT
from onnxcomp.quality import Quality

__all__ = ["Budget"]

RANKING = 0.5
"""The share of a detector's drop that the ranking of its scores may use up: boxes that moved cost precision as well."""


FEW_SAMPLES = 32
"""Outputs that look like class scores on fewer samples may be other numbers, such as ratings, and are judged so too."""


@dataclass(frozen=True)
class Budget:
    """What a result may cost.

    Attributes:
        max_drop: Absolute points of the metric (0.005 is half a point), or of the expected drop without labels; of a
            detector, half of it for the ranking of its scores.
        max_error: Relative error of the worst output, where there is neither a metric nor class scores, of the part
            that depends on the input; half of it, where there is no metric, for the whole output (by default 10%, a
            signal-to-noise ratio of 20 dB) and for the boxes of a detector. A rule of thumb, not a bound: on one
            anomaly detector 16% went with no loss of its metric and 27% with 4 points of AUC, and the default was
            chosen between the two.
    """

    max_drop: float = 0.005
    max_error: float = 0.2

    def __post_init__(self) -> None:
        """Refuse limits that nothing is below, or everything.

        Raises:
            OptionError: One is negative or not a number.
        """
        for name, limit in (("max_drop", self.max_drop), ("max_error", self.max_error)):
            if not limit >= 0:
                message = f"{name} must be at least 0, got {limit:g}"
                raise OptionError(message)

    def allows(self, quality: Quality, *, share: float = 1.0, rounding: float = 0.0) -> bool:
        """Whether a measured loss is inside the budget.

        Where a relative error is all that there is to judge by, the upper end of its 95% interval counts. Of class
        scores the error counts beside the drop where they were guessed, or where the samples do not tell them apart;
        where they were guessed from few samples, its upper end.

        Args:
            quality: The loss.
            share: The part of the budget that may be used.
            rounding: An error that float rounding alone makes; it is never held against a candidate.
        """
        if not math.isfinite(quality.error):
            return False
        drop = self.max_drop * share * (RANKING if quality.detection else 1.0)
        if quality.drop is not None and quality.drop > drop:
            return False
        if quality.kind == "metric":
            return True
        whole, rest = (max(self.max_error * part * share, rounding) for part in (WHOLE_OUTPUT, 1.0))
        guessed_of_few = quality.guessed and quality.samples < FEW_SAMPLES
        if quality.kind == "relative-error" or guessed_of_few:
            return quality.plain_interval[1] <= whole and quality.error_interval[1] <= rest
        if quality.plain_error > whole:
            return False
        if quality.detection:
            return quality.error <= whole
        return not (quality.guessed or self.proves_nothing(quality.constant_drop)) or quality.error <= rest

    def proves_nothing(self, constant_drop: float | None) -> bool:
        """Whether one answer for all samples would be inside the drop: then the relative error has to tell."""
        return constant_drop is not None and constant_drop <= self.max_drop

    def excess(self, quality: Quality, share: float = 1.0) -> float:
        """How many times larger than allowed a loss is, where it is a relative error; else 1."""
        if quality.kind != "relative-error":
            return 1.0
        allowed = self.max_error * share
        error = max(quality.plain_interval[1] / WHOLE_OUTPUT, quality.error_interval[1])
        return error / allowed if allowed > 0 else math.inf
