"""The page of a comparison: a table of models, what they lose against what they gain, and each of them in detail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxcomp.report.compared import LATENCY, columns, loss, models, summary_text, warnings_of
from onnxcomp.report.page.answer import PLACEHOLDER, Card, Step, cards, command_line
from onnxcomp.report.page.candidates import Candidate, charts
from onnxcomp.report.page.layers import layer_row, table_data
from onnxcomp.report.page.panels import details
from onnxcomp.report.page.render import fact_groups, whole_page
from onnxcomp.report.rows import figure_rows, kernel_changes
from onnxcomp.report.text import decibels_text, printable, shortened

if TYPE_CHECKING:
    from onnxcomp import compared
    from onnxcomp.compared import Comparisons

__all__ = ["comparison_page_html"]

LABEL_LENGTH = 32
"""Letters of a model's path that a chart shows."""

TONES = {"better": "kept", "no gain": "unchanged", "over": "dropped", "failed": "dropped"}
"""How a verdict looks: as those of a run's stages do."""


@dataclass(frozen=True)
class Detail:
    """What the page says of one candidate by itself."""

    name: str
    verdict: str
    tone: str
    reason: str
    notes: list[str]
    cards: list[Card] = field(default_factory=list)
    figures: list[tuple[str, str, str, str]] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    kernels: list[tuple[str, int, int]] = field(default_factory=list)


def comparison_page_html(found: Comparisons) -> str:
    """Write a comparison as one HTML page that needs nothing else; what holds for `page_html` holds for it.

    Args:
        found: The comparison, as `comparison_from_json` gives it.
    """
    return whole_page("comparison.html.jinja", _view(found))


def _view(found: Comparisons) -> dict[str, Any]:
    names = [printable(row.name) for row in models(found)]
    head, rows = _table(found)
    verdict, outcome = _answer(found)
    arrow = "\N{RIGHTWARDS ARROW}"
    return {
        "title": f"{names[0]} {arrow} {names[1]}" if len(names) == 2 else f"{names[0]} and {len(names) - 1} candidates",
        "verdict": verdict,
        "outcome": outcome,
        "summary": summary_text(found),
        "warnings": [printable(text) for text in warnings_of(found)],
        "steps": [_again(found)],
        "head": head,
        "rows": rows,
        "details": [_detail(found, name, one) for name, one in found.named],
        "facts": _facts(found),
        "data": {
            "compared": charts(_points(found), found, {}, None),
            "layers": {
                **table_data(list(_layers(found))),
                "details": details([layer for one in found.candidates for layer in one.layers]),
            },
        },
        "models": list(dict.fromkeys(printable(name) for name, one in found.named if one.layers)),
    }


def _table(found: Comparisons) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The table's head, and for each model how its verdict looks, and its cells; columns without any are left out."""
    tells = columns(found)
    tells["model"] = lambda row: printable(row.name)
    latency = tells[LATENCY]
    tells[LATENCY] = lambda row: latency(row).replace("+-", "\N{PLUS-MINUS SIGN}")
    cells = {title: [tell(row) for row in models(found)] for title, tell in tells.items()}
    shown = {title: texts for title, texts in cells.items() if any(text not in {"", "-"} for text in texts)}
    tones = [TONES.get(row.verdict, "") for row in models(found)]
    lines = [list(line) for line in zip(*shown.values(), strict=True)]
    return [_capital(title) for title in shown], list(zip(tones, lines, strict=True))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _answer(found: Comparisons) -> tuple[str, str]:
    """The page's first line, and how it is to be seen."""
    better = [one for one in found.candidates if one.verdict == "better"]
    outcome = "better" if better else "same" if any(one.verdict == "no gain" for one in found.candidates) else "over"
    if len(found.candidates) == 1:
        reason = printable(found.candidates[0].reason)
        return _capital(reason), outcome
    if not better:
        return f"None of {len(found.candidates)} candidates is better than the original", outcome
    verb = "is" if len(better) == 1 else "are"
    return f"{len(better)} of {len(found.candidates)} candidates {verb} better than the original", outcome


def _points(found: Comparisons) -> list[Candidate]:
    relative = found.quality == "relative-error"
    return [
        Candidate(
            stage=shortened(printable(row.name), LABEL_LENGTH),
            setting="",
            verdict=one.verdict,
            reason=printable(one.reason),
            evidence=printable(one.after.latency_evidence),
            speed=one.speed,
            size=one.size,
            loss=loss(row, relative=relative),
            interval=one.after.error_interval if relative else one.after.drop_interval,
            kept=one.verdict in {"better", "no gain"},
        )
        for one, row in zip(found.candidates, models(found)[1:], strict=True)
        if one.after is not None
    ]


def _detail(found: Comparisons, name: str, one: compared.Candidate) -> Detail:
    notes = [printable(text) for text in (*one.warnings, *one.shortfalls)]
    detail = Detail(printable(name), one.verdict, TONES.get(one.verdict, ""), printable(one.reason), notes)
    if one.after is None:
        return detail
    pair = found.pair(one)
    detail.cards.extend(cards(pair))
    detail.figures.extend((row.label, row.before, row.after, row.change) for row in figure_rows(pair))
    detail.outputs.extend((printable(name), decibels_text(value)) for name, value in pair.sqnr_db.items())
    detail.kernels.extend(kernel_changes(pair.before, pair.after))
    return detail


def _layers(found: Comparisons) -> Iterator[dict[str, Any]]:
    """The layers of all candidates, the worst first; with one candidate there is no need to name it."""
    several = len(found.candidates) > 1
    for name, one in found.named:
        for layer in one.layers:
            yield {**layer_row(layer), **({"model": name} if several else {})}


def _again(found: Comparisons) -> Step:
    """The command that compares them again."""
    command = found.options.get("command")
    if isinstance(command, list) and all(isinstance(word, str) for word in command):
        return Step("Do it again", command_line(["onnxcomp", "compare", *command]), "as it was run")
    paths = [str(row.name) for row in models(found)]
    data = [] if found.data["generated"] else ["--data", PLACEHOLDER]
    limits = [word for name, least in found.limits.items() for word in ("--fail-under", f"{name}={least:g}")]
    words = ["onnxcomp", "compare", *paths, *data, *limits, "--target", found.target]
    return Step("Do it again", command_line(words), f"put the path of your samples for {PLACEHOLDER}" if data else "")


def _facts(found: Comparisons) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the figures depend on, in groups."""
    host = {name: value for name, value in found.environment.items() if name != "versions"}
    return fact_groups(
        [
            ("Original", found.model),
            *((f"Candidate {number}", one.model) for number, one in enumerate(found.candidates, start=1)),
            ("Samples", found.data),
            ("Run", {"target": found.target, "created": found.created, "seconds": round(found.seconds, 1)}),
            ("Budget", found.budget),
            ("Limits", found.limits),
            ("Options", {name: value for name, value in found.options.items() if name != "command"}),
            ("Machine", host),
            ("Versions", {**found.environment.get("versions", {}), "comparison": found.schema_version}),
        ]
    )
