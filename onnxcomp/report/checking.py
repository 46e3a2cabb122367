"""Checks a report that was read from a file against the shipped schema, so that what follows may rely on its form.

Only what that schema uses of JSON Schema is understood. Fields that it does not know are allowed: a newer version of
the same form may have more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["first_mismatch", "lost_place"]

LARGEST = 1e300
"""No figure is larger, and arithmetic on what is may overflow."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def first_mismatch(value: object, schema: Mapping[str, Any]) -> str | None:
    """Say where a value is not as the schema wants it, what was expected and what came; None: nowhere.

    Example:
        >>> schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}
        >>> first_mismatch({"n": 1}, schema)
        >>> first_mismatch({"n": "one"}, schema)
        "n: expected integer, got 'one'"
        >>> first_mismatch({}, schema)
        "expected a field 'n', got none"
    """
    found = next(_mismatches(value, schema, schema, ""), None)
    return None if found is None else found.removeprefix(": ")


def lost_place(report: Mapping[str, Any]) -> str | None:
    """Say where a report's graphs, whose form was checked, name a tensor or a type that is not there.

    Example:
        >>> empty = {"nodes": [], "tensors": ["x"], "types": [], "constants": [], "inputs": [], "outputs": []}
        >>> lost_place({"graph": {"before": {**empty, "tensor_types": [0]}}})
        'graph.before.tensor_types: expected numbers below 0, got 0'
        >>> lost_place({"graph": None})
    """
    for side, graph in (report.get("graph") or {}).items():
        tensors, types = len(graph["tensors"]), len(graph["types"])
        if len(graph["tensor_types"]) != tensors:
            return f"graph.{side}.tensor_types: expected {tensors} items, got {len(graph['tensor_types'])}"
        lists = [("tensor_types", graph["tensor_types"], types)]
        lists += [(key, graph[key], tensors) for key in ("constants", "inputs", "outputs")]
        for index, node in enumerate(graph["nodes"]):
            lists += [
                (f"nodes[{index}].{key}", node.get(key, ()), tensors) for key in ("inputs", "outputs", "captured")
            ]
        for place, numbers, below in lists:
            if (most := max((number for number in numbers if number is not None), default=-1)) >= below:
                return f"graph.{side}.{place}: expected numbers below {below}, got {most}"
    return None


def _mismatches(value: object, part: Mapping[str, Any], root: Mapping[str, Any], place: str) -> Iterator[str]:
    if "$ref" in part:
        part = root["$defs"][part["$ref"].rpartition("/")[2]]
    if "oneOf" in part:
        options = [list(_mismatches(value, option, root, place)) for option in part["oneOf"]]
        if all(options):
            yield options[-1][0]
        return
    wanted = part.get("type", [])
    types = [wanted] if isinstance(wanted, str) else wanted
    if types and not any(_is(value, name) for name in types):
        yield f"{place}: expected {' or '.join(types)}, got {_shown(value)}"
        return
    if "enum" in part and value not in part["enum"]:
        yield f"{place}: expected one of {', '.join(part['enum'])}, got {_shown(value)}"
    elif isinstance(value, str) and not re.search(part.get("pattern", ""), value):
        yield f"{place}: expected a text like {part['pattern']}, got {_shown(value)}"
    elif isinstance(value, int | float) and not part.get("minimum", value) <= value <= part.get("maximum", value):
        yield f"{place}: {_shown(value)} is out of range"
    elif isinstance(value, list):
        yield from _in_list(value, part, root, place)
    elif isinstance(value, dict):
        yield from _in_object(value, part, root, place)


def _in_list(value: list[Any], part: Mapping[str, Any], root: Mapping[str, Any], place: str) -> Iterator[str]:
    if not part.get("minItems", 0) <= len(value) <= part.get("maxItems", len(value)):
        yield f"{place}: expected {part['minItems']} items, got {len(value)}"
    if _are_plain(value, part.get("items", {})):
        return
    for index, item in enumerate(value):
        yield from _mismatches(item, part.get("items", {}), root, f"{place}[{index}]")


def _are_plain(value: list[Any], part: Mapping[str, Any]) -> bool:
    """Whether these are texts or numbers that fit at first sight, as those of long lists do."""
    kinds = set(map(type, value))
    if part == {"type": "string"}:
        return kinds <= {str}
    if part == {"type": ["integer", "null"], "minimum": 0}:
        kinds.discard(type(None))
        value = [item for item in value if item is not None]
    elif part != {"type": "integer", "minimum": 0}:
        return False
    return not value or (kinds == {int} and min(value) >= 0 and max(value) <= LARGEST)


def _in_object(value: dict[str, Any], part: Mapping[str, Any], root: Mapping[str, Any], place: str) -> Iterator[str]:
    for name in part.get("required", ()):
        if name not in value:
            yield f"{place}: expected a field {name!r}, got none"
    known = part.get("properties", {})
    others = part.get("additionalProperties")
    for name, item in value.items():
        inner = known.get(name, others if isinstance(others, dict) else None)
        if inner is not None:
            yield from _mismatches(item, inner, root, f"{place}.{name}" if place else name)


def _is(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        return False
    return isinstance(value, _TYPES[name])


def _shown(value: object) -> str:
    """A value in few characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value) if isinstance(value, str | float) else str(value)[:40]
    return text if len(text) <= 40 else f"{text[:40]}..."
