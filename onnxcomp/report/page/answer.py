"""What stands on top of the page: the figures before and after, and the commands that come next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

from onnxcomp.ledger import WHOLE_OUTPUT
from onnxcomp.report.rows import Figured, Row, figure_rows, fits_drop
from onnxcomp.report.text import bytes_text, count_text, error_range, error_text, printable, signed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxcomp.ledger import Report

__all__ = ["Card", "Step", "cards", "command_line", "evidence_text", "next_steps"]

PLACEHOLDER = "DATA"
"""Stands for the path of the samples where a report does not tell it."""

LOST = "the outputs are no numbers, have another shape, or differ where the original's are nothing but zeros"
"""What makes a loss infinite."""

SHARED = frozenset({
    *("--data", "--metric", "--shape", "--seed", "--threads"),
    *("--image-size", "--image-layout", "--image-mean", "--image-std", "--image-scale", "--image-color"),
})  # fmt: skip
"""What `optimize` and `verify` both take, with a value."""

_EVIDENCE = {
    "measured": "timed in turn with the original on the machine below, which is the target",
    "same kernels": "not timed: ONNX Runtime makes the same program of both",
    "executed": "run on the target, but timed by no clock that can be trusted",
    "estimated": "an estimate from the kernels that ONNX Runtime chooses; nothing was timed",
    "not measured": "nothing was timed",
}


@dataclass(frozen=True)
class Card:
    """One figure before and after. `tone`: "good", "bad" or "" for how the change is to be seen."""

    title: str
    before: str
    after: str
    change: str
    tone: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A command that the reader may want to run, and what for."""

    what: str
    command: str
    note: str = ""


def evidence_text(label: str) -> str:
    """How a speed is known, in words."""
    return _EVIDENCE.get(label, printable(label))


def cards(report: Figured) -> list[Card]:
    """The four figures: size, latency, accuracy, share of the work in int8."""
    rows = {row.label.partition(",")[0]: row for row in figure_rows(report)}
    return [_size(rows), _latency(report, rows), _accuracy(report), _int8(report, rows)]


def _size(rows: dict[str, Row]) -> Card:
    row = rows.get("size", Row("size"))
    details = []
    if deflated := rows.get("deflated"):
        details.append(f"deflated {deflated.before} \N{RIGHTWARDS ARROW} {deflated.after}, {deflated.change}")
    return Card("Size", row.before, row.after, row.change, _tone(row.good), details)


def _latency(report: Figured, rows: dict[str, Row]) -> Card:
    row = rows.get("latency", Row("latency", "-", "-"))
    label = report.after.latency_evidence
    before, after = (text.replace("+-", "\N{PLUS-MINUS SIGN}") for text in (row.before, row.after))
    details = [f"{printable(label)}: {evidence_text(label)}"]
    if "+-" in row.after:
        details.append("median of one run; \N{PLUS-MINUS SIGN} is half the way from the 10th to the 90th percentile")
    return Card("Latency", before or "-", after or "-", row.change, _tone(row.good), details)


def _accuracy(report: Figured) -> Card:
    old, new = report.before, report.after
    if report.quality == "relative-error":
        return _error_card(report)
    if new.drop is None:  # JSON has no infinity
        return Card("Drop", "0", "infinite", "", "bad", [LOST])
    inside = report.budget_met is not False
    details = list(_drop_details(report))
    if report.quality == "expected-drop" or new.metric is None:
        details.append("without labels: estimated from how sure the original is of its own answers")
        return Card("Expected drop", "0", signed(new.drop), "", _tone(inside), details)
    name = printable((report.metric or {}).get("name", "metric"))
    before = "-" if old.metric is None else f"{old.metric:.4f}"
    return Card(f"Accuracy ({name})", before, f"{new.metric:.4f}", f"drop {signed(new.drop)}", _tone(inside), details)


def _drop_details(report: Figured) -> Iterator[str]:
    new, limit = report.after, report.budget.get("max_drop")
    if new.drop_interval is not None and None not in new.drop_interval:
        low, high = new.drop_interval
        yield f"95 % interval of the drop {signed(low)} to {signed(high)}"
    if limit is None or report.budget_met is None:
        return
    if report.budget_met or not fits_drop(report):
        yield f"budget {limit:g}: {'met' if report.budget_met else 'NOT met'}"
    else:
        told = "" if new.error is None else f" (relative error {error_text(new.error)})"
        yield f"budget {limit:g}: kept by the drop, but another limit is NOT met{told}"


def _error_card(report: Figured) -> Card:
    error, limit = report.after.error, report.budget.get("max_error")
    if error is None:
        return Card("Relative error", "0", "infinite", "", "bad", [LOST])
    interval = error_range(report.after.error_interval)
    details = [f"95 % interval {interval}, of which the upper end counts"] if interval else []
    generated = bool(report.data.get("generated"))
    if generated:
        details.append("on made-up inputs, as there were no data: it says nothing of accuracy")
    if limit is not None and report.budget_met is not None and not (generated and report.after.error_interval is None):
        details.append(_error_budget(report, limit * WHOLE_OUTPUT if generated else limit))
    tone = _tone(False if report.budget_met is False else None if generated else True)
    return Card("Relative error", "0", error_text(error), "", tone, details)


def _error_budget(report: Figured, limit: float) -> str:
    """Whether a relative error is inside the budget, and what speaks against it where it is not the error itself."""
    if report.budget_met:
        return f"budget {error_text(limit)}: met"
    _, most = report.after.error_interval or (None, None)
    counted = report.after.error if most is None else most
    whole = "; a whole output may be off by half of it" if counted is not None and counted <= limit else ""
    return f"budget {error_text(limit)}: NOT met{whole}"


def _int8(report: Figured, rows: dict[str, Row]) -> Card:
    row = rows.get("MACs in int8", Row("", "-", "-"))
    details = []
    if report.after.macs:
        details.append(f"{count_text(report.after.macs)} multiply-accumulates a run")
    if report.after.resident_bytes:
        details.append(f"{bytes_text(report.after.resident_bytes)} of weights in memory once loaded")
    return Card("Work in int8", row.before, row.after, "", _tone(row.good), details)


def _tone(good: bool | None) -> str:
    return {True: "good", False: "bad", None: ""}[good]


# --- what to do next --------------------------------------------------------------------------------------------------


def next_steps(report: Report) -> list[Step]:
    """The commands that make the model again, verify it and show its graph."""
    source = str(report.model.get("path") or "ORIGINAL.onnx")
    output = str((report.output or {}).get("path") or f"{PurePath(source).stem}.opt.onnx")
    command = report.options.get("command")
    if isinstance(command, list) and all(isinstance(word, str) for word in command):
        again = Step("Do it again", command_line(["onnxcomp", "optimize", *command]), "as it was run")
    else:
        again = Step(
            "Do it again",
            command_line(_rebuilt(report, source, output)),
            f"put the path of your samples for {PLACEHOLDER}",
        )
    shared = _shared_words(command, generated=bool(report.data.get("generated")))
    verify = ["onnxcomp", "verify", source, output, "--target", report.target, *shared]
    note = f"put the path of your samples for {PLACEHOLDER}" if PLACEHOLDER in verify else ""
    steps = [again, Step("Verify the result as its target runs it", command_line(verify), note)]
    return [
        *steps,
        Step("Look at its whole graph", command_line(["onnxcomp", "view", output]), "with netron, in the browser"),
    ]


def _shared_words(command: object, *, generated: bool) -> list[str]:
    """The options of `optimize` that `verify` has too: the samples, how they are read, and what they are judged by."""
    words = [str(word) for word in command] if isinstance(command, list) else []
    found = []
    for index, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name == "--allow-code" or (equals and name in SHARED):
            found.append(word)
        elif word in SHARED and index + 1 < len(words):
            found += [word, words[index + 1]]
    if not generated and not any(word.partition("=")[0] == "--data" for word in found):
        found += ["--data", PLACEHOLDER]
    return found


def _rebuilt(report: Report, source: str, output: str) -> list[str]:
    """The command line that a report without one tells of."""
    options = report.options
    words = ["onnxcomp", "optimize", source]
    words += [] if report.data.get("generated") else ["--data", PLACEHOLDER]
    words += ["--metric", str(report.metric["name"])] if report.metric and report.metric.get("name") else []
    words += [word for name, flag in (("max_drop", "--max-drop"), ("max_error", "--max-error"))
              if (limit := report.budget.get(name)) is not None for word in (flag, f"{limit:g}")]  # fmt: skip
    words += ["--target", report.target, "--threads", str(report.environment.get("threads", 1))]
    words += ["--seed", str(options.get("seed") or 0)]
    words += ["--force"] if options.get("force") else []
    words += ["--no-timing"] if options.get("timing") is False else []
    return [*words, "-o", output]


def command_line(words: list[str]) -> str:
    """Words as a shell takes them."""
    return printable(shlex.join(words))
