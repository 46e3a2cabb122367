"""Every candidate that was tried: what it lost against what it gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from onnxcomp.ledger import WHOLE_OUTPUT
from onnxcomp.report.rows import attempt_setting
from onnxcomp.report.text import error_range, error_text, printable, signed, times

if TYPE_CHECKING:
    from onnxcomp.ledger import Attempt, Report

__all__ = ["Candidate", "candidates", "chart_data", "charts", "front"]


class Judged(Protocol):
    """What the charts need to know of a report, or of a comparison."""

    @property
    def quality(self) -> str: ...
    @property
    def budget(self) -> Mapping[str, Any]: ...
    @property
    def data(self) -> Mapping[str, Any]: ...


TOP = 4.0
"""Losses of more than this many budgets are drawn at the chart's upper edge, so that the others can be told apart."""


@dataclass(frozen=True)
class Candidate:
    """One form of one stage, as measured. `loss` is the drop, or the relative error where there is none."""

    stage: str
    setting: str
    verdict: str
    reason: str
    evidence: str
    speed: float | None
    size: float | None
    loss: float | None
    interval: tuple[float, float] | None
    kept: bool

    @property
    def label(self) -> str:
        """The stage and its setting."""
        return f"{self.stage} ({self.setting})" if self.setting else self.stage

    def loss_text(self, *, relative: bool) -> str:
        """The loss in words, with its interval."""
        if self.loss is None:  # JSON has no infinity; what has a size was measured
            return "-" if self.size is None else "infinite"
        if relative:
            interval = error_range(self.interval)
            return f"{error_text(self.loss)} ({interval})" if interval else error_text(self.loss)
        if self.interval is None or None in self.interval:
            return signed(self.loss)
        return f"{signed(self.loss)} ({signed(self.interval[0])} to {signed(self.interval[1])})"

    @property
    def speed_text(self) -> str:
        """The ratio, or a dash."""
        return "-" if self.speed is None else times(self.speed)

    @property
    def size_text(self) -> str:
        """The ratio, or a dash."""
        return "-" if self.size is None else times(self.size)


def candidates(report: Report) -> list[Candidate]:
    """The attempts of all stages in the order in which they were made."""
    relative = report.quality == "relative-error"
    found = []
    for stage in report.stages:
        for number, attempt in enumerate(stage.attempts, start=1):
            kept = stage.verdict in {"kept", "forced"} and attempt.verdict in {"kept", "forced"}
            setting = attempt_setting(number, stage.attempts)
            if len(stage.attempts) > 1:
                setting = f"form {number}{': ' if setting else ''}{setting}"
            found.append(_candidate(printable(stage.name), printable(setting), attempt, kept=kept, relative=relative))
    return found


def _candidate(stage: str, setting: str, attempt: Attempt, *, kept: bool, relative: bool) -> Candidate:
    return Candidate(
        stage=stage,
        setting=setting,
        verdict=attempt.verdict,
        reason=printable(attempt.reason),
        evidence=printable(attempt.evidence),
        speed=attempt.speed,
        size=attempt.size,
        loss=attempt.error if relative else attempt.drop,
        interval=attempt.error_interval if relative else attempt.drop_interval,
        kept=kept,
    )


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (gain, loss) that no other beats in both, by rising gain.

    Example:
        >>> front([(1.0, 0.0), (2.0, 0.01), (1.5, 0.02), (3.0, 0.03)])
        [(1.0, 0.0), (2.0, 0.01), (3.0, 0.03)]
    """
    best: list[tuple[float, float]] = []
    for gain, loss in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not best or loss < best[-1][1]:
            best.append((gain, loss))
    return best[::-1]


def chart_data(report: Report, tried: Sequence[Candidate]) -> list[dict[str, Any]]:
    """A chart of loss against speed, and one against size; none where nothing was measured."""
    result = report.after.error if report.quality == "relative-error" else report.after.drop
    return charts(tried, report, {"speed": report.speed, "size": report.size}, result)


def charts(
    tried: Sequence[Candidate], judged: Judged, gains: Mapping[str, float | None], result: float | None
) -> list[dict[str, Any]]:
    """The charts of candidates, with the budget and, where `gains` and `result` tell of it, the result."""
    relative = judged.quality == "relative-error"
    limit = judged.budget.get("max_error" if relative else "max_drop")
    if relative and limit is not None and judged.data.get("generated"):
        # Reports without intervals are of a version that judged made-up inputs by a limit of their own.
        limit = limit * WHOLE_OUTPUT if any(each.interval for each in tried) else None
    loss = "relative error" if relative else "expected drop" if judged.quality == "expected-drop" else "drop"
    drawn = []
    for axis, name in (("speed", "times as fast as the original"), ("size", "times smaller than the original")):
        measured = [(getattr(each, axis), each.loss, each) for each in tried]
        points = [(x, y, each) for x, y, each in measured if x is not None and y is not None]
        if not points:
            continue
        gain = gains.get(axis)
        drawn.append(
            {
                "axis": axis,
                "title": f"{loss[0].upper()}{loss[1:]} against {axis}",
                "x": name,
                "y": f"{loss} (less is better)",
                "budget": limit,
                "top": limit * TOP if limit else None,
                "points": [
                    [x, y, each.label, f"{times(x)}, {loss} {each.loss_text(relative=relative)}", each.kept]
                    for x, y, each in points
                ],
                "front": front([(1.0, 0.0), *((x, y) for x, y, _ in points)]),
                "result": None if gain is None or result is None else [gain, result],
            }
        )
    return drawn
