"""The report as JSON, and the schema that describes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.files import check_writable, replaced_whole

if TYPE_CHECKING:
    from onnxcomp.ledger import Report

__all__ = ["jsonable", "schema", "to_json", "write_json", "write_text"]


def to_json(report: Report) -> str:
    """Write a report as JSON, in ASCII, as `schema` describes it. What is infinite or no number is null."""
    return json.dumps(jsonable(report.to_dict()), indent=2, allow_nan=False) + "\n"


def write_json(report: Report, path: str | Path) -> None:
    """Write a report to a file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    write_text(to_json(report), path)


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
