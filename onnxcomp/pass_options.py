"""A pass and the values of its options, from text and from TOML or JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxcomp.data.specs import suggestion
from onnxcomp.errors import OptionError
from onnxcomp.passes import Pass, find_pass

__all__ = ["make_pass", "parse_pass"]


def parse_pass(text: str) -> Pass:
    """Make a pass from `NAME[:option=value,...]`.

    Values are read by the option's type. Lists are divided by `|`. A value, or part of one, may be put in single or
    double quotes, to hold a comma or a `|`.

    Raises:
        OptionError: There is no such pass or option, or a value is not one that the option takes.

    Example:
        >>> made = parse_pass("quantize-weights:per_channel=false,min_elements=64")
        >>> made.options()["per_channel"], made.options()["min_elements"]
        (False, 64)
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if colon and not rest.strip():
        message = f"{text!r} has a colon and no option after it; expected NAME or NAME:option=value,..."
        raise OptionError(message)
    kinds = _option_kinds(find_pass(name))
    values: dict[str, Any] = {}
    for key, items in _scan(rest, text) if colon else ():
        if key in values:
            message = f"{name}: the option {key!r} is given twice; give it once"
            raise OptionError(message)
        _check_known(name, key, kinds)
        values[key] = _read(f"{name}: {key}", kinds[key], items)
    return make_pass(name, values)


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Make a pass from its name and the values of its options, as TOML and JSON hold them (lists for tuples).

    Raises:
        OptionError: There is no such pass or option, or a value is not one that the option takes.
    """
    cls = find_pass(name)
    kinds = _option_kinds(cls)
    values = {}
    for key, value in options.items():
        _check_known(name, key, kinds)
        values[key] = _convert(f"{name}: {key}", kinds[key], value)
    return cls(**values)


def _check_known(name: str, key: str, kinds: Mapping[str, Any]) -> None:
    if key not in kinds:
        hint = suggestion(key, kinds) or f"; it has {', '.join(kinds) or 'no options'}"
        message = f"the pass {name!r} has no option {key!r}{hint}"
        raise OptionError(message)


def _option_kinds(cls: type[Pass]) -> dict[str, Any]:
    """The type of each option, from its annotation, or from its default where that cannot be told."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # a plugin's annotation that only type checkers can read
        hints = {}
    return {option.name: hints.get(option.name, type(option.default)) for option in dataclasses.fields(cls)}


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass
class _Item:
    """A piece of a value between `|`. `quoted`: some of it was in quotes, so that it is not nothing."""

    text: str = ""
    quoted: bool = False


def _scan(text: str, whole: str) -> Iterable[tuple[str, list[_Item]]]:
    """Divide `option=value,...` into names and the items of their values."""
    found: list[tuple[str, list[_Item]]] = []
    key, items, quote = "", [_Item()], ""
    seen_equals = False
    for char in [*text, ""]:
        if quote and char:
            if char == quote:
                quote = ""
            else:
                items[-1].text += char
        elif quote:
            message = f"{whole!r}: a quote {quote} is not closed"
            raise OptionError(message)
        elif char in {",", ""}:
            if not seen_equals or not key:
                message = f"{whole!r}: expected option=value, got {(key or items[-1].text).strip()!r}"
                raise OptionError(message)
            found.append((key, items))
            key, items, seen_equals = "", [_Item()], False
        elif char == "=" and not seen_equals:
            key, items, seen_equals = items[-1].text.strip(), [_Item()], True
        elif char in {"'", '"'} and seen_equals:
            quote, items[-1].quoted = char, True
        elif char == "|" and seen_equals:
            items.append(_Item())
        else:
            items[-1].text += char
    return found


def _read(where: str, kind: Any, items: list[_Item]) -> Any:
    """The value of an option from its text."""
    element = _element(kind)
    if element is not None:
        if len(items) == 1 and not items[0].text.strip() and not items[0].quoted:
            return ()
        return tuple(_read_one(where, element, item) for item in items)
    joined = _Item("|".join(item.text for item in items), any(item.quoted for item in items))
    return _read_one(where, kind, joined)


def _read_one(where: str, kind: Any, item: _Item) -> Any:
    text = item.text if item.quoted else item.text.strip()
    inner = _inner(kind)
    if inner is not None:
        return None if text.lower() == "none" else _read_one(where, inner, item)
    if kind is bool:
        if text.lower() not in {"true", "false"}:
            raise _wrong(where, kind, text)
        return text.lower() == "true"
    if kind in {int, float}:
        try:
            return kind(text)
        except ValueError:
            raise _wrong(where, kind, text) from None
    return text


def _convert(where: str, kind: Any, value: Any) -> Any:
    """The value of an option from TOML or JSON, refused where it is of another type."""
    element, inner = _element(kind), _inner(kind)
    if inner is not None:
        return None if value is None or value == "none" else _convert(where, inner, value)
    if element is not None:
        if not isinstance(value, list | tuple):
            raise _wrong(where, kind, value)
        return tuple(_convert(where, element, item) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _wrong(where, kind, value) from None
    expects = {bool: bool, int: int, float: float, str: str}.get(kind)
    if expects and (not isinstance(value, expects) or (isinstance(value, bool) and kind is not bool)):
        raise _wrong(where, kind, value)
    return value


def _element(kind: Any) -> Any:
    """The type of a tuple's elements; None for what is no tuple."""
    if typing.get_origin(kind) is tuple:
        return (typing.get_args(kind) or (str,))[0]
    return str if kind is tuple else None


def _inner(kind: Any) -> Any:
    """The type that an optional value has when it is there; None for what is not optional."""
    if typing.get_origin(kind) in {typing.Union, types.UnionType}:
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        return inner[0] if len(inner) == 1 else None
    return None


def _wrong(where: str, kind: Any, value: Any) -> OptionError:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    element = _element(kind)
    expected = f"a list ({words.get(element, 'values')})" if element is not None else words.get(kind, str(kind))
    return OptionError(f"{where} must be {expected}, got {value!r}")
