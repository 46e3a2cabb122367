"""What a report says, line by line, before it is laid out: the table of figures and the ledger."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from onnxcomp.report.text import (
    bytes_text,
    count_text,
    decibels_text,
    duration_text,
    error_range,
    error_text,
    milliseconds,
    percent,
    printable,
    shortened,
    signed,
    times,
)

if TYPE_CHECKING:
    from onnxcomp.ledger import Attempt, Figures, PassEntry, Report


class Figured(Protocol):
    """What the table of figures is made from: a report, or a comparison."""

    @property
    def before(self) -> Figures: ...
    @property
    def after(self) -> Figures: ...
    @property
    def speed(self) -> float | None: ...
    @property
    def quality(self) -> str: ...
    @property
    def metric(self) -> Mapping[str, Any] | None: ...
    @property
    def budget(self) -> Mapping[str, Any]: ...
    @property
    def budget_met(self) -> bool | None: ...
    @property
    def data(self) -> Mapping[str, Any]: ...


__all__ = [
    "Line",
    "Row",
    "attempt_setting",
    "figure_rows",
    "fits_drop",
    "interval_text",
    "kernel_changes",
    "latency_text",
    "ledger_lines",
    "options_text",
    "outcome",
    "summary_lines",
    "tables",
    "title",
]

ALIKE_SHOWN = 3
"""Places that share one reason are named up to this many; the rest are counted."""

TABLE_ROWS = 24
"""Rows of a table that are shown without -v: the first, and the last one, which may be a sum."""

OPTIONS_SHOWN = 60
"""Characters of an option's value that are shown; the JSON holds all of it."""

SAME_SPEED = 0.02


@dataclass(frozen=True)
class Row:
    """One line of the table of figures.

    Attributes:
        label: What it is.
        before: Of the original.
        after: Of the new model.
        change: How they differ.
        good: Whether the change is one for the better, for the worse, or neither.
        left: What part of the original's is left, for a bar; None where that means nothing.
    """

    label: str
    before: str = ""
    after: str = ""
    change: str = ""
    good: bool | None = None
    left: float | None = None


@dataclass(frozen=True)
class Line:
    """One line of the ledger.

    Attributes:
        depth: 0 for a stage, 1 for one of its attempts, 2 for a pass, 3 for a place.
        verdict: Of a stage or an attempt; empty below.
        label: The name of the stage or the pass, or the place.
        text: The reason, or what was changed.
        seconds: How long it took, in words.
    """

    depth: int
    verdict: str
    label: str
    text: str
    seconds: str = ""


def title(report: Report) -> str:
    """The model's path, and the result's once there is one."""
    before = printable(report.model.get("path") or "model")
    after = printable((report.output or {}).get("path") or "")
    return f"{before} -> {after}" if after else before


def outcome(report: Report) -> str:
    """The verdict in a word: "better", "over" (the budget) or "same"."""
    if not report.budget_met:
        return "over"
    changed = any(stage.verdict in {"kept", "forced"} for stage in report.stages)
    return "better" if changed else "same"


def summary_lines(report: Report) -> list[str]:
    """On what the figures rest: target, data, budget."""
    data = report.data
    samples = printable(data.get("description", ""))
    parts = [f"target {printable(report.target)}", samples]
    if not data.get("generated") and data.get("confirm"):
        parts.append(f"figures from {data['confirm']} of them")
    threads = report.environment.get("threads")
    if threads:
        parts.append(f"{threads} thread{'s' * (threads != 1)}")
    parts.append(duration_text(report.seconds))
    return [", ".join(part for part in parts if part)]


# --- figures ----------------------------------------------------------------------------------------------------------


def figure_rows(report: Figured) -> list[Row]:
    """The table: what was measured before and after; a figure that is in neither has no line."""
    old, new = report.before, report.after
    rows = [
        _ratio_row("size", old.size_bytes, new.size_bytes, bytes_text),
        _ratio_row("deflated", old.deflated_bytes, new.deflated_bytes, bytes_text),
        _ratio_row("resident", old.resident_bytes, new.resident_bytes, bytes_text),
        _ratio_row("parameters", old.parameters, new.parameters, count_text),
        _ratio_row("non-zeros", old.nonzeros, new.nonzeros, count_text),
        _ratio_row("MACs", old.macs, new.macs, count_text),
        _int8_row(old, new),
        *_latency_rows(report),
        *_quality_rows(report),
    ]
    return [row for row in rows if row is not None]


def _ratio_row(label: str, old: int | None, new: int | None, text: Callable[[float], str]) -> Row | None:
    if old is None and new is None:
        return None
    before, after = ("-" if value is None else text(value) for value in (old, new))
    if old is None or new is None:
        return Row(label, before, after)
    ratio = 1.0 if old == new else old / new if new else math.inf
    left = new / old if old else None
    if times(ratio) == times(1.0):
        return Row(label, before, after, "same", left=left)
    return Row(label, before, after, times(ratio), ratio > 1, left)


def _int8_row(old: Figures, new: Figures) -> Row | None:
    if not old.macs or not new.macs or old.int8_macs is None or new.int8_macs is None:
        return None
    before, after = old.int8_macs / old.macs, new.int8_macs / new.macs
    return Row("MACs in int8", percent(before), percent(after), "", True if after > before else None)


def _latency_rows(report: Figured) -> Iterator[Row]:
    old, new = report.before, report.after
    evidence = printable(new.latency_evidence)
    label = f"latency, {evidence}" if evidence != "not measured" else "latency"
    change, good = "", None
    left = 1 / report.speed if report.speed else None
    if report.speed is not None:
        same = abs(report.speed - 1) < SAME_SPEED
        change, good = ("same", None) if same else (times(report.speed), report.speed > 1)
    if change or old.latency_ms is not None or new.latency_ms is not None:
        yield Row(label, latency_text(old), latency_text(new), change, good, left)
    if old.load_ms is not None and new.load_ms is not None:
        yield Row("load", f"{milliseconds(old.load_ms)} ms", f"{milliseconds(new.load_ms)} ms")


def latency_text(figures: Figures) -> str:
    """The median, and half the distance between the 10th and the 90th percentile around it."""
    if figures.latency_ms is None:
        return "-"
    text = f"{milliseconds(figures.latency_ms)} ms"
    if figures.latency_p10_ms is None or figures.latency_p90_ms is None or not figures.latency_ms:
        return text
    spread = (figures.latency_p90_ms - figures.latency_p10_ms) / 2 / figures.latency_ms
    return f"{text} +-{spread:.0%}"


def _quality_rows(report: Figured) -> Iterator[Row]:
    old, new = report.before, report.after
    if new.metric is not None:
        name = printable((report.metric or {}).get("name", "metric"))
        yield Row(name, "-" if old.metric is None else f"{old.metric:.4f}", f"{new.metric:.4f}")
    if new.drop is not None:
        label = "drop, expected" if report.quality == "expected-drop" else "drop"
        yield Row(label, "", signed(new.drop), interval_text(new), fits_drop(report))
    if new.agreement is not None:
        yield Row("agreement", "", percent(new.agreement))
    if new.error is not None:
        yield Row("relative error", "", error_text(new.error), error_range(new.error_interval), _fits_error(report))
    if new.sqnr_db is not None:
        yield Row("SQNR", "", decibels_text(new.sqnr_db))


def interval_text(figures: Figures) -> str:
    """The 95% interval of the drop."""
    if figures.drop_interval is None or None in figures.drop_interval:  # an infinite end is null in the JSON
        return ""
    low, high = figures.drop_interval
    return f"{signed(low)} to {signed(high)}"


def kernel_changes(old: Figures, new: Figures) -> Iterator[tuple[str, int, int]]:
    """The kernels that two models do not run equally often, and how often each does."""
    for name in dict.fromkeys([*old.kernels, *new.kernels]):
        before, after = old.kernels.get(name, 0), new.kernels.get(name, 0)
        if before != after:
            yield printable(name), before, after


def fits_drop(report: Figured) -> bool | None:
    """Whether the drop is inside its limit; None without one."""
    drop, limit = report.after.drop, report.budget.get("max_drop")
    return drop <= limit if drop is not None and isinstance(limit, int | float) else None


def _fits_error(report: Figured) -> bool | None:
    """Whether the relative error is inside the budget, where that hangs on it; made-up inputs speak against it only."""
    if report.budget_met and (report.quality != "relative-error" or report.data.get("generated")):
        return None
    if report.quality != "relative-error" and not fits_drop(report):
        return None
    return report.budget_met


# --- tables of passes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of a pass, as text; the first column is a name, numbers are aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    more: str


def tables(report: Report, *, verbose: bool) -> Iterator[Table]:
    """The tables of the passes that changed the model, in the form that was kept."""
    for stage in report.stages:
        if stage.verdict not in {"kept", "forced"}:
            continue
        for entry in stage.attempts[-1].passes:
            for table in entry.tables:
                rows = table["rows"]
                shown = rows if verbose or len(rows) <= TABLE_ROWS else [*rows[: TABLE_ROWS - 1], rows[-1]]
                more = f"and {len(rows) - len(shown)} more rows (-v shows them)" if len(shown) < len(rows) else ""
                cells = [tuple(_cell(value) for value in row) for row in shown]
                columns = tuple(map(printable, table["columns"]))
                yield Table(f"{printable(entry.name)}: {printable(table['title'])}", columns, cells, more)


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return shortened(printable(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# --- the ledger -------------------------------------------------------------------------------------------------------


def ledger_lines(report: Report, *, verbose: bool) -> Iterator[Line]:
    """Every stage with its verdict, the attempts where there were several, and with `verbose` every place."""
    for stage in report.stages:
        took = duration_text(stage.seconds) if stage.seconds else ""
        reason = printable(stage.reason) + (" (taken over from the interrupted run)" if stage.resumed else "")
        yield Line(0, stage.verdict, printable(stage.name), reason, took)
        several = len(stage.attempts) > 1
        for number, attempt in enumerate(stage.attempts, start=1):
            if several:
                yield _attempt_line(number, stage.attempts)
            for entry in attempt.passes:
                yield from _pass_lines(entry, depth=2 if several else 1, verbose=verbose)


def attempt_setting(number: int, attempts: Sequence[Attempt]) -> str:
    """The options that tell an attempt, counted from 1, from the first one."""
    first = {(entry.name, key): value for entry in attempts[0].passes for key, value in entry.options.items()}
    differing = [
        f"{key}={_value_text(value)}"
        for entry in attempts[number - 1].passes
        for key, value in entry.options.items()
        if number > 1 and first.get((entry.name, key)) != value
    ]
    return _short(", ".join(differing))


def _attempt_line(number: int, attempts: Sequence[Attempt]) -> Line:
    attempt, setting = attempts[number - 1], attempt_setting(number, attempts)
    label = f"form {number}" + (f": {setting}" if setting else "")
    return Line(1, attempt.verdict, printable(label), printable(attempt.reason), duration_text(attempt.seconds))


def _pass_lines(entry: PassEntry, *, depth: int, verbose: bool) -> Iterator[Line]:
    for note in entry.notes:
        yield Line(depth, "", "note", printable(note))
    if not verbose:
        return
    yield Line(depth, "", printable(entry.name), options_text(entry), duration_text(entry.seconds))
    yield from _places(entry.changed, "what", "changed", depth + 1)
    yield from _places(entry.left, "why", "left", depth + 1)


def options_text(entry: PassEntry) -> str:
    """The options of a pass as `-p NAME:option=value` takes them, long values cut."""
    options = ", ".join(f"{key}={_short(_value_text(value))}" for key, value in entry.options.items())
    return printable(options)


def _value_text(value: object) -> str:
    """A value as `-p NAME:option=value` takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "|".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _short(text: str) -> str:
    return text if len(text) <= OPTIONS_SHOWN else f"{text[:OPTIONS_SHOWN]}..."


def _places(places: Sequence[dict[str, str]], key: str, label: str, depth: int) -> Iterator[Line]:
    """Places, those with one reason together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for place in places:
        groups[place[key]].append(place["where"])
    for text, where in groups.items():
        named = ", ".join(printable(place) for place in where[:ALIKE_SHOWN])
        more = f" and {len(where) - ALIKE_SHOWN} more" if len(where) > ALIKE_SHOWN else ""
        yield Line(depth, "", label, f"{named}{more}: {printable(text)}")
