"""The ledger as the page shows it: a time line, what was decided and why, and what was measured on the way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from onnxcomp.report.rows import attempt_setting, options_text
from onnxcomp.report.text import duration_text, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxcomp.ledger import Attempt, Report, StageEntry

__all__ = ["Form", "Measured", "StageView", "curves", "measured", "stages", "time_line"]

ROWS = 40
"""Rows of a pass's table that the page shows; the JSON has all."""

LINES = 10
"""Lines of one chart: more cannot be told apart."""

_POINT = re.compile(r"(.+) at ([\d.]+)%")
"""A column that holds a curve's value at some share, such as "error at 75%"."""


@dataclass(frozen=True)
class Form:
    """One form of a stage: its number and setting, the verdict with the reason, and the passes with their options."""

    setting: str
    verdict: str
    reason: str
    took: str
    passes: list[tuple[str, str]]
    notes: list[str]


@dataclass(frozen=True)
class StageView:
    """A stage of the ledger."""

    name: str
    verdict: str
    reason: str
    took: str
    forms: list[Form]


@dataclass(frozen=True)
class Measured:
    """A table of a pass, as text; the first column is a name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    more: int


def stages(report: Report) -> list[StageView]:
    """Every stage with every form of it that was tried."""
    views = []
    for stage in report.stages:
        reason = printable(stage.reason) + (" (taken over from the interrupted run)" if stage.resumed else "")
        forms = [_form(number, stage.attempts) for number in range(1, len(stage.attempts) + 1)]
        views.append(StageView(printable(stage.name), stage.verdict, reason, _took(stage.seconds), forms))
    return views


def _form(number: int, attempts: Sequence[Attempt]) -> Form:
    attempt = attempts[number - 1]
    setting = attempt_setting(number, attempts)
    return Form(
        setting=printable(f"form {number}{': ' if setting else ''}{setting}"),
        verdict=attempt.verdict,
        reason=printable(attempt.reason),
        took=_took(attempt.seconds),
        passes=[(printable(entry.name), options_text(entry)) for entry in attempt.passes],
        notes=[printable(note) for entry in attempt.passes for note in entry.notes],
    )


def _took(seconds: float) -> str:
    return duration_text(seconds) if seconds else ""


def time_line(report: Report) -> list[dict[str, Any]]:
    """A bar for each attempt, one stage behind the other: stage, what it was, verdict, start and end in seconds."""
    bars, clock = [], 0.0
    for stage in report.stages:
        inside = clock
        for number, attempt in enumerate(stage.attempts, start=1):
            label = f"form {number} of {len(stage.attempts)}: " if len(stage.attempts) > 1 else ""
            end = inside + attempt.seconds
            text = f"{label}{attempt.verdict}, {duration_text(attempt.seconds)}"
            bars.append({"stage": printable(stage.name), "text": text, "verdict": attempt.verdict,
                         "start": round(inside, 3), "end": round(end, 3)})  # fmt: skip
            inside = end
        clock = max(clock + stage.seconds, inside)
    return bars


# --- what passes measured ---------------------------------------------------------------------------------------------


def _tables(report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables of the form of each stage that was tried last among those that have any."""
    for stage in report.stages:
        for entry in _last_with_tables(stage):
            for table in entry.tables:
                verdict = "" if stage.verdict in {"kept", "forced"} else f" ({stage.verdict})"
                yield printable(f"{entry.name}{verdict}: {table['title']}"), table


def _last_with_tables(stage: StageEntry) -> Sequence[Any]:
    forms = [attempt.passes for attempt in stage.attempts if any(entry.tables for entry in attempt.passes)]
    return forms[-1] if forms else ()


def measured(report: Report) -> list[Measured]:
    """The tables of the passes, cut to as many rows as a reader looks at."""
    found = []
    for title, table in _tables(report):
        rows = [[_cell(value) for value in row] for row in table["rows"][:ROWS]]
        more = len(table["rows"]) - len(rows)
        found.append(Measured(title, [printable(name) for name in table["columns"]], rows, more))
    return found


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return printable(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def curves(report: Report) -> list[dict[str, Any]]:
    """The tables that hold curves: columns such as "error at 75%", or a first column of rising numbers."""
    found = (_points(title, table) or _series(title, table) for title, table in _tables(report))
    return [chart for chart in found if chart]


def _points(title: str, table: dict[str, Any]) -> dict[str, Any] | None:
    """A line for each row, over the columns that hold its value at some share."""
    matches = [(index, match) for index, name in enumerate(table["columns"]) if (match := _POINT.fullmatch(name))]
    if len(matches) < 2:
        return None
    lines = [
        {"name": printable(row[0]), "points": [[float(match[2]), row[index]] for index, match in matches
                                               if index < len(row) and isinstance(row[index], int | float)]}
        for row in table["rows"] if row
    ]  # fmt: skip
    steepest = sorted((line for line in lines if line["points"]), key=lambda line: -line["points"][-1][1])
    return _chart(title, "percent", printable(matches[0][1][1]), steepest)


def _series(title: str, table: dict[str, Any]) -> dict[str, Any] | None:
    """A line for each column of numbers, over the first column."""
    rows = table["rows"]
    steps = [row[0] if row else None for row in rows]
    numbers = [step for step in steps if isinstance(step, int | float)]
    if len(rows) < 3 or len(numbers) < len(rows) or any(b <= a for a, b in pairwise(numbers)):
        return None
    lines = []
    for index, name in enumerate(table["columns"][1:], start=1):
        points = [[step, row[index]] for step, row in zip(numbers, rows, strict=True)
                  if index < len(row) and isinstance(row[index], int | float)]  # fmt: skip
        if len(points) > 1:
            lines.append({"name": printable(name), "points": points})
    return _chart(title, printable(table["columns"][0]), "", lines)


def _chart(title: str, x: str, y: str, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not lines:
        return None
    hidden = max(0, len(lines) - LINES)
    return {"title": title, "x": x, "y": y, "lines": lines[:LINES], "hidden": hidden}
