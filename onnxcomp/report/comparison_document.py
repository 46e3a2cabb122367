"""The comparison of several models as JSON, and the schema that describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.report.document import check_form, json_bytes, jsonable, known, loaded_json, report_from, schema

if TYPE_CHECKING:
    from onnxcomp.compared import Comparisons
    from onnxcomp.ledger import Report

__all__ = ["any_from_json", "comparison_from_json", "comparison_schema", "comparison_to_json", "read_any_json"]


def comparison_to_json(found: Comparisons) -> str:
    """Write a comparison as JSON, in ASCII, as `comparison_schema` describes it. What is infinite or NaN is null."""
    return json.dumps(jsonable(found.to_dict()), indent=2, allow_nan=False) + "\n"


def comparison_from_json(text: str | bytes, name: str = "the comparison") -> Comparisons:
    """The comparison that `comparison_to_json` wrote.

    Args:
        text: The JSON.
        name: What to call it in an error.

    Raises:
        OptionError: It is not such a comparison.
    """
    return _comparison(loaded_json(text, name), name)


def read_any_json(path: str | Path) -> Report | Comparisons:
    """Read what `optimize --json` or `compare --json` wrote: the file says which.

    Raises:
        OptionError: It cannot be read, or is neither.
    """
    return any_from_json(json_bytes(path), str(path))


def any_from_json(text: str | bytes, name: str = "the report") -> Report | Comparisons:
    """The report or the comparison that was written as JSON.

    Raises:
        OptionError: It is neither.
    """
    loaded = loaded_json(text, name)
    if isinstance(loaded, Mapping) and loaded.get("kind") == "comparison":
        return _comparison(loaded, name)
    return report_from(loaded, name)


def comparison_schema() -> dict[str, Any]:
    """The JSON Schema of a comparison, with what it shares with that of a report."""
    text = resources.files("onnxcomp.report").joinpath("comparison_schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    shared = schema()["$defs"]
    parts = ("detail", "histogram", "activation", "singular_values")  # of a layer
    loaded["$defs"] |= {name: shared[name] for name in ("interval", "evidence", "figures", "layer", *parts)}
    return loaded


def _comparison(loaded: Any, name: str) -> Comparisons:
    from onnxcomp.compared import Candidate, Comparisons
    from onnxcomp.ledger import Figures

    check_form(loaded, comparison_schema(), name, "a comparison")
    candidates = [
        known(Candidate, {**entry, "after": known(Figures, entry["after"]) if entry["after"] else None})
        for entry in loaded["candidates"]
    ]
    return known(Comparisons, {**loaded, "before": known(Figures, loaded["before"]), "candidates": candidates})
