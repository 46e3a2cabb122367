"""Puts the page together: a template, a style, a script and a charting library, all in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from onnxcomp.report.document import jsonable
from onnxcomp.report.page.answer import cards, next_steps
from onnxcomp.report.page.candidates import candidates, chart_data
from onnxcomp.report.page.graph import graph_data, graph_summary, left_out, operator_chart, operators
from onnxcomp.report.page.history import curves, measured, stages, time_line
from onnxcomp.report.page.kinds import KINDS
from onnxcomp.report.page.layers import layer_data
from onnxcomp.report.rows import figure_rows, outcome, summary_lines, title
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

    from onnxcomp.ledger import Report

__all__ = ["fact_groups", "page_html", "whole_page"]

SCRIPTS = ("words", "operators", "charts", "compare", "graph", "panel", "layers", "commands")
"""The page's own scripts, in the order in which they run: one script element holds them all."""

STYLES = ("page.css", "graph.css")
"""The page's own styles, in order: one style element holds them all."""

SOURCE_MAP = "//# sourceMappingURL="
"""A comment by which developers' tools ask for a further file, which is not there."""


def page_html(report: Report) -> str:
    """Write a report as one HTML page that needs nothing else.

    Every text of the report is escaped. The page forbids itself, in a Content-Security-Policy, to load anything, and to
    run any script but its own, whose hashes it names.

    Args:
        report: The report, as `from_json` gives it.
    """
    return whole_page("page.html.jinja", _view(report))


def whole_page(name: str, view: dict[str, Any]) -> str:
    """Fill in a template, with what the style and the scripts need."""
    template = _templates().get_template(name)
    style, library = "".join(map(_file, STYLES)), _library()
    script = "\n".join(_file(f"scripts/{name}.js") for name in SCRIPTS)
    return template.render(
        **view,
        embedded=_embedded(view["data"]),
        policy=_policy(style, [library, script]),
        style=_inline(style),
        script=_inline(script),
        library=_inline(library),
        licence=_file("vendor/chart-LICENSE.txt"),
    )


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _view(report: Report) -> dict[str, Any]:
    """What the template shows."""
    tried = candidates(report)
    counts = operators(report)
    data = {
        "candidates": chart_data(report, tried),
        "layers": layer_data(report),
        "time": time_line(report),
        "curves": curves(report),
        "operators": operator_chart(counts),
        "graph": graph_data(report),
    }
    verdict = printable(report.verdict)
    return {
        "title": title(report).replace(" -> ", " \N{RIGHTWARDS ARROW} "),
        "verdict": verdict[:1].upper() + verdict[1:],
        "outcome": outcome(report),
        "summary": "; ".join(summary_lines(report)),
        "cards": cards(report),
        "figures": [(row.label, row.before, row.after, row.change) for row in figure_rows(report)],
        "steps": next_steps(report),
        "warnings": [printable(text) for text in report.warnings],
        "notes": [printable(text) for text in report.notes],
        "tried": tried,
        "operators": counts,
        "graph_summary": graph_summary(counts),
        "graph_left": left_out(report),
        "kinds": list(KINDS),
        "relative": report.quality == "relative-error",
        "stages": stages(report),
        "measured": measured(report),
        "facts": _facts(report),
        "data": data,
    }


def _facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the figures depend on, in groups."""
    host = {name: value for name, value in report.environment.items() if name != "versions"}
    groups = [
        ("Original", report.model),
        ("Result", report.output or {}),
        ("Samples", report.data),
        ("Run", {"target": report.target, "created": report.created, "seconds": round(report.seconds, 1)}),
        ("Budget", report.budget),
        ("Options", {name: value for name, value in report.options.items() if name != "command"}),
        ("Machine", host),
        ("Versions", {**report.environment.get("versions", {}), "report": report.schema_version}),
    ]
    return fact_groups(groups)


def fact_groups(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts in words, by group; a group without any is left out."""
    return [
        (name, [(printable(key.replace("_", " ")), _fact(value)) for key, value in values.items()])
        for name, values in groups
        if values
    ]


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, list):
        return printable(" ".join(map(str, value))) or "-"
    if isinstance(value, dict):
        return printable(", ".join(f"{key}={item}" for key, item in value.items())) or "-"
    return f"{value:,}" if isinstance(value, int) else printable(value)


# --- what is put into the page as it is -------------------------------------------------------------------------------


def _file(name: str) -> str:
    return resources.files("onnxcomp.report.page").joinpath(name).read_text(encoding="utf-8")


def _library() -> str:
    return _file("vendor/chart.umd.min.js").partition(SOURCE_MAP)[0]


def _inline(code: str) -> Any:
    """Code of ours or of the library, which the template must not escape."""
    from markupsafe import Markup

    return Markup(code)  # package data, which no report reaches


def _embedded(data: object) -> Any:
    """JSON that cannot end the script element that it is in, and whose letters mean nothing to HTML."""
    from markupsafe import Markup

    text = json.dumps(jsonable(data), allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # ASCII without < > &


def _policy(style: str, scripts: list[str]) -> str:
    allowed = " ".join(_digest(script) for script in scripts)
    return f"default-src 'none'; style-src {_digest(style)}; script-src {allowed}; base-uri 'none'; form-action 'none'"


def _digest(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
