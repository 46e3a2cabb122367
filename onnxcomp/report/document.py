"""The report as JSON, and the schema that describes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from onnxcomp.errors import OptionError
from onnxcomp.files import check_writable, replaced_whole
from onnxcomp.report.checking import first_mismatch, lost_place

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from onnxcomp.ledger import Report

Made = TypeVar("Made", bound="DataclassInstance")

__all__ = [
    "check_form",
    "from_json",
    "json_bytes",
    "jsonable",
    "known",
    "loaded_json",
    "read_json",
    "report_from",
    "schema",
    "to_json",
    "write_json",
    "write_text",
]

LARGEST_BYTES = 1 << 28
"""A report of 50,000 layers, with 350,000 nodes, has three fifths of that; what is larger is something else."""

NO_GRAPH = '\n  "graph": null'
"""A field of the report itself: fields further in are further in, and no text holds a new line."""


def to_json(report: Report) -> str:
    """Write a report as JSON, in ASCII, as `schema` describes it. What is infinite or no number is null."""
    document = report.to_dict()
    graph = document.pop("graph")
    text = json.dumps(jsonable({**document, "graph": None}), indent=2, allow_nan=False) + "\n"
    if graph is None:
        return text
    return text.replace(NO_GRAPH, NO_GRAPH.replace("null", _graph_text(graph)), 1)


def _graph_text(graph: Mapping[str, Any]) -> str:
    """Graphs as JSON: a line for each node and for each list of numbers, of which there are many."""
    sides = []
    for side, table in graph.items():
        nodes = ",\n".join(f"        {json.dumps(node)}" for node in table["nodes"])
        parts = [
            f"      {json.dumps(key)}: " + (f"[\n{nodes}\n      ]" if key == "nodes" else json.dumps(value))
            for key, value in table.items()
        ]
        sides.append(f"    {json.dumps(side)}: {{\n" + ",\n".join(parts) + "\n    }")
    return "{\n" + ",\n".join(sides) + "\n  }"


def write_json(report: Report, path: str | Path) -> None:
    """Write a report to a file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    write_text(to_json(report), path)


def read_json(path: str | Path) -> Report:
    """Read a report that `write_json` wrote, in this version or an earlier one of the same form.

    Raises:
        OptionError: It cannot be read, or is not such a report.
    """
    return from_json(json_bytes(path), str(path))


def json_bytes(path: str | Path) -> bytes:
    """What is in a file that a report may be in.

    Raises:
        OptionError: It cannot be read, or is too large.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_BYTES:
            message = f"{path}: expected a report as --json writes it, got a file of more than 256 MB"
            raise OptionError(message)
        return path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise OptionError(message) from error


def from_json(text: str | bytes, name: str = "the report") -> Report:
    """The report that `to_json` wrote.

    Args:
        text: The JSON.
        name: What to call it in an error.

    Raises:
        OptionError: It is not such a report.
    """
    return report_from(loaded_json(text, name), name)


def report_from(loaded: Any, name: str) -> Report:
    """The report that data tell of, once they are checked.

    Raises:
        OptionError: They are not those of a report.
    """
    check_form(loaded, schema(), name, "a report")
    if (wrong := lost_place(loaded)) is not None:
        message = f"{name}: is not a report as --json writes it: {wrong}"
        raise OptionError(message)
    return _report(loaded)


def loaded_json(text: str | bytes, name: str) -> Any:
    """What JSON holds.

    Raises:
        OptionError: It is none, or holds numbers that are none.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        message = f"{name}: expected a report as --json writes it, got what is no JSON ({error})"
        raise OptionError(message) from error


def check_form(loaded: Any, wanted: Mapping[str, Any], name: str, what: str) -> None:
    """Refuse what is not as a schema wants it.

    Raises:
        OptionError: It is not.
    """
    if (wrong := first_mismatch(loaded, wanted)) is not None:
        message = f"{name}: is not {what} as --json writes it: {wrong}"
        raise OptionError(message)


def _no_number(text: str) -> object:
    message = f"{text} is none"
    raise ValueError(message)


def _report(loaded: dict[str, Any]) -> Report:
    """The report that checked data tell of."""
    from onnxcomp.ledger import Attempt, Figures, PassEntry, Report, StageEntry

    def stage(entry: dict[str, Any]) -> StageEntry:
        attempts = [
            known(Attempt, {**attempt, "passes": [known(PassEntry, step) for step in attempt["passes"]]})
            for attempt in entry["attempts"]
        ]
        return known(StageEntry, {**entry, "attempts": attempts})

    figures = {name: known(Figures, loaded[name]) for name in ("before", "after")}
    return known(Report, {**loaded, **figures, "stages": [stage(entry) for entry in loaded["stages"]]})


def known(made: type[Made], values: Mapping[str, Any]) -> Made:
    """An object of the fields that this version knows."""
    return made(**{name: value for name, value in values.items() if name in made.__dataclass_fields__})


def write_text(text: str, path: str | Path) -> None:
    """Write a text to a file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    path = Path(path)
    check_writable(path)
    with replaced_whole(path) as [file]:
        file.write(text.encode())


def schema() -> dict[str, Any]:
    """The JSON Schema of a report."""
    text = resources.files("onnxcomp.report").joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def jsonable(value: Any) -> Any:
    """Plain JSON data: numpy's numbers become Python's, tuples lists, paths texts; infinity and NaN become null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [jsonable(item) for item in items]
    if value is None or isinstance(value, bool | str):
        return value
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, without importing numpy
        return jsonable(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)
