"""What `compare` and `compare_all` found: models against one original, on the same data. Plain data, JSON-ready."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxcomp.ledger import Figures

if TYPE_CHECKING:
    from onnxcomp.layer_table import LayerRow
    from onnxcomp.report.frames import Rows

__all__ = ["COMPARISON_VERSION", "Candidate", "Comparison", "Comparisons"]

COMPARISON_VERSION = "1.0"
"""Of the comparison's JSON. The first number changes when a reader of the old form would break."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Ratios are original over new: above 1 is better.

    Attributes:
        original: The file of the one model, or "model".
        new: The file of the other.
        before: The figures of the original.
        after: The figures of the new model; its losses are relative to the original.
        speed: Original latency over new latency; None where it was not measured.
        size: Original bytes over new bytes.
        quality: How `after.drop` was measured: "metric", "expected-drop" or "relative-error".
        sqnr_db: Output -> signal-to-noise ratio in dB; infinite where the outputs are equal.
        metric: {name, higher_is_better}, or None without labels or metric.
        data: {description, samples, generated, labels}.
        target: What the models are for.
        threads: Threads of one operator.
        warnings: What to know before trusting a figure.
        layers: The layers side by side, the largest error first; None where they were not asked for.
        budget: {max_drop, max_error}; empty where none was asked for.
        budget_met: Whether the new model is inside it; None where none was asked for.
    """

    original: str
    new: str
    before: Figures
    after: Figures
    speed: float | None
    size: float
    quality: str
    sqnr_db: dict[str, float]
    metric: dict[str, Any] | None
    data: dict[str, Any]
    target: str
    threads: int
    warnings: list[str] = field(default_factory=list)
    layers: list[LayerRow] | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    budget_met: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return dataclasses.asdict(self)

    def to_frame(self) -> Rows:
        """A row for each of the two models, for `pandas.DataFrame` and `polars.DataFrame`."""
        from onnxcomp.report.frames import pair_frame

        return pair_frame(self)

    def _repr_html_(self) -> str:
        """The comparison as a notebook shows it."""
        from onnxcomp.report.html import pair_html

        return pair_html(self)


@dataclass
class Candidate:
    """One model that was compared with the original. Ratios are original over this one: above 1 is better.

    Attributes:
        model: {path, sha256, size_bytes, opset, ir_version}; all but the path are None where it could not be read.
        verdict: "better" (inside the budget, smaller or faster, and neither larger nor slower), "no gain" (inside, but
            not that), "over" (it loses more than the budget) or "failed" (it could not be compared).
        reason: What it gains and loses, or why it failed, in one line.
        after: Its figures; None where it failed. Losses are relative to the original.
        speed: Original latency over this one's; None where it was not measured.
        size: Original bytes over these; None where it failed.
        sqnr_db: Output -> signal-to-noise ratio in dB; infinite where the outputs are equal, None where JSON had no
            number for it.
        warnings: What to know of this one before trusting its figures.
        shortfalls: A line for each limit that it does not reach.
        layers: Its layers beside the original's, as in a `Report`; empty where they were not asked for.
    """

    model: dict[str, Any]
    verdict: str
    reason: str
    after: Figures | None = None
    speed: float | None = None
    size: float | None = None
    sqnr_db: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    shortfalls: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Comparisons:
    """Several models against one original: one reference, the same samples, timed in turn.

    Attributes:
        model: The original: {path, sha256, size_bytes, opset, ir_version}.
        before: Its figures.
        candidates: What was compared with it, in the order in which they were given.
        quality: How a drop was measured: "metric", "expected-drop" or "relative-error".
        metric: {name, higher_is_better}, or None without labels or metric.
        budget: {max_drop, max_error}: what verdicts go by.
        limits: Name -> the least that will do; see `shortfalls`.
        data: {description, sha256, samples, generated, labels}.
        target: What the models are for.
        options: {seed, timing, layers, shapes}, and from the command line the command.
        environment: Versions, platform, CPU features, threads.
        seconds: What it took.
        created: When, in ISO 8601.
        warnings: What to know before trusting a figure.
        kind: Tells this JSON from a run's report.
    """

    model: dict[str, Any]
    before: Figures
    candidates: list[Candidate]
    quality: str
    metric: dict[str, Any] | None
    budget: dict[str, Any]
    limits: dict[str, float]
    data: dict[str, Any]
    target: str
    options: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    created: str
    warnings: list[str] = field(default_factory=list)
    kind: str = "comparison"
    schema_version: str = COMPARISON_VERSION

    @property
    def name(self) -> str:
        """What the original is called: its path, where it has one."""
        return str(self.model["path"] or "original")

    @property
    def named(self) -> list[tuple[str, Candidate]]:
        """The candidates, each with its path, or its number where it has none."""
        numbered = enumerate(self.candidates, start=1)
        return [(str(one.model["path"] or f"candidate {number}"), one) for number, one in numbered]

    @property
    def measured(self) -> list[Candidate]:
        """The candidates that did not fail."""
        return [candidate for candidate in self.candidates if candidate.after is not None]

    def pair(self, candidate: Candidate) -> Comparison:
        """The original and one candidate that did not fail, without layers; what JSON had no number for is NaN."""
        if candidate.after is None:
            message = f"{candidate.model['path']} was not measured: {candidate.reason}"
            raise ValueError(message)
        return Comparison(
            original=self.name,
            new=str(candidate.model["path"] or "model"),
            before=self.before,
            after=candidate.after,
            speed=candidate.speed,
            size=math.nan if candidate.size is None else candidate.size,
            quality=self.quality,
            sqnr_db={name: math.nan if value is None else value for name, value in candidate.sqnr_db.items()},
            metric=self.metric,
            data=self.data,
            target=self.target,
            threads=int(self.environment.get("threads", 1)),
            warnings=[*self.warnings, *candidate.warnings],
            budget=self.budget,
            budget_met=candidate.verdict != "over",
        )

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready data, as the shipped schema describes it."""
        return dataclasses.asdict(self)

    def to_frame(self, rows: str = "models") -> Rows:
        """Rows that `pandas.DataFrame` and `polars.DataFrame` take; see `onnxcomp.report.frames`.

        Args:
            rows: "models" (the original first) or "layers".

        Raises:
            OptionError: There are no such rows.
        """
        from onnxcomp.report.frames import comparison_frame

        return comparison_frame(self, rows)

    def __str__(self) -> str:
        """The comparison as plain text."""
        from onnxcomp.report.compared import comparisons_text

        return comparisons_text(self)

    def _repr_html_(self) -> str:
        """The comparison as a notebook shows it."""
        from onnxcomp.report.compared import comparisons_html

        return comparisons_html(self)
