"""Recipes: stages written down, as text on the command line and as TOML files.

::

    [budget]
    max_drop = 0.005

    [options]                # of `onnxcomp.optimize`; what the command line says wins
    target = "arm64"
    exclude = ["/head/*"]

    [[stage]]
    passes = ["simplify"]

    [[stage]]
    passes = ["quantize-weights", {name = "quantize", per_channel = false}]
    share = 0.4              # of the accuracy budget
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from onnxcomp.data.specs import suggestion
from onnxcomp.data.user_code import is_reference
from onnxcomp.errors import OptionError
from onnxcomp.pass_options import make_pass, parse_pass
from onnxcomp.passes import Pass
from onnxcomp.stages import Stage
from onnxcomp.values import parse_duration

__all__ = ["Recipe", "dump_recipe", "load_recipe", "make_pass", "parse_pass"]

BUDGET_KEYS = ("max_drop", "max_error")


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says.

    Attributes:
        stages: The stages, in order.
        max_drop: The budget; None where the file does not say.
        max_error: The budget where there is no metric; None where the file does not say.
        options: Arguments of `onnxcomp.optimize` by name.
    """

    stages: tuple[Stage, ...]
    max_drop: float | None = None
    max_error: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, *, allow_code: bool = False) -> Recipe:
    """Read a recipe from a TOML file.

    Args:
        path: The file.
        allow_code: Whether its data and metric may be "module:function".

    Raises:
        OptionError: It cannot be read, or something in it is not valid; the message names the file and the key.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise OptionError(message) from error
    except (ValueError, RecursionError) as error:  # ValueError: TOML's and UTF-8's, and of numbers with many digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        message = f"{path}: is not TOML: {reason}"
        raise OptionError(message) from error
    reader = _Reader(path, allow_code=allow_code)
    reader.known("", document, ("budget", "options", "stage"))
    budget = reader.table("budget", document.get("budget", {}))
    reader.known("budget.", budget, BUDGET_KEYS)
    limits = {key: reader.number(f"budget.{key}", value, 0.0) for key, value in budget.items()}
    return Recipe(reader.stages(document.get("stage")), options=reader.options(document.get("options", {})), **limits)


class _Reader:
    """Checks what a recipe file holds; every error names the file and the key."""

    def __init__(self, path: Path, *, allow_code: bool) -> None:
        self._path = path
        self._allow_code = allow_code

    def fail(self, key: str, expected: str, got: object) -> NoReturn:
        message = f"{self._path}: {key} must be {expected}, got {got!r}"
        raise OptionError(message)

    def known(self, prefix: str, table: Mapping[str, Any], keys: Sequence[str]) -> None:
        for key in table:
            if key not in keys:
                hint = suggestion(key, keys) or f"; expected {', '.join(keys)}"
                message = f"{self._path}: there is no key {prefix + key!r}{hint}"
                raise OptionError(message)

    def table(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(key, f"a table, [{key}]", value)
        return value

    def number(self, key: str, value: Any, minimum: float) -> float:
        if not _is_number(value) or not value >= minimum:
            self.fail(key, f"a number of at least {minimum:g}", value)
        return float(value)

    def stages(self, value: Any) -> tuple[Stage, ...]:
        if not isinstance(value, list) or not value:
            self.fail("stage", "a list of at least one table, [[stage]]", value)
        return tuple(self._stage(f"stage[{index}]", item) for index, item in enumerate(value))

    def _stage(self, key: str, value: Any) -> Stage:
        if not isinstance(value, dict):
            self.fail(key, "a table, [[stage]]", value)
        self.known(f"{key}.", value, ("passes", "share"))
        passes = value.get("passes")
        if not isinstance(passes, list) or not passes:
            self.fail(f"{key}.passes", "a list of at least one pass", passes)
        made = tuple(self._pass(f"{key}.passes[{index}]", item) for index, item in enumerate(passes))
        share = self.number(f"{key}.share", value.get("share", 1.0), 0.0)
        if not 0 < share <= 1:
            self.fail(f"{key}.share", "above 0 and at most 1", value["share"])
        return Stage(made, share)

    def _pass(self, key: str, value: Any) -> Pass:
        options = {"name": value} if isinstance(value, str) else value
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            self.fail(key, 'the name of a pass, or {name = "...", option = value}', value)
        try:
            return make_pass(options["name"], {name: item for name, item in options.items() if name != "name"})
        except OptionError as error:
            message = f"{self._path}: {key}: {error}"
            raise OptionError(message) from error

    def options(self, value: Any) -> dict[str, Any]:
        table = self.table("options", value)
        self.known("options.", table, tuple(_OPTIONS))
        return {key: _OPTIONS[key](self, f"options.{key}", item) for key, item in table.items()}

    # How each option is read.

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            self.fail(key, "text", value)
        return value

    def metric(self, key: str, value: Any) -> str:
        return self._no_code(key, self.text(key, value))

    def data(self, key: str, value: Any) -> str:
        text = self.text(key, value)
        beside = self._path.parent / text
        return str(beside) if _exists(beside) else self._no_code(key, text)

    def _no_code(self, key: str, text: str) -> str:
        if is_reference(text) and not self._allow_code:
            message = f"{self._path}: {key} names code to run, {text!r}; allow it with --allow-code"
            raise OptionError(message)
        return text

    def flag(self, key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self.fail(key, "true or false", value)
        return value

    def whole(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.fail(key, "a whole number of at least 0", value)
        return value

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "a list of texts", value)
        return tuple(value)

    def duration(self, key: str, value: Any) -> float:
        if _is_number(value) and value > 0:
            return float(value)
        if not isinstance(value, str):
            self.fail(key, "seconds, or a time such as '10m'", value)
        try:
            return parse_duration(value)
        except OptionError as error:
            message = f"{self._path}: {key}: {error}"
            raise OptionError(message) from error

    def shapes(self, key: str, value: Any) -> dict[str, tuple[int, ...]]:
        table = self.table(key, value)
        for name, sizes in table.items():
            if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
                self.fail(f"{key}.{name}", "a list of sizes of at least 1", sizes)
        return {name: tuple(sizes) for name, sizes in table.items()}


def _is_number(value: Any) -> bool:
    """Whether a value is a number, and none that is too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False  # a name that is too long, or a folder that may not be entered


_OPTIONS: dict[str, Callable[[_Reader, str, Any], Any]] = {
    "data": _Reader.data,
    "metric": _Reader.metric,
    "target": _Reader.text,
    "exclude": _Reader.texts,
    "force": _Reader.flag,
    "time_limit": _Reader.duration,
    "seed": _Reader.whole,
    "threads": _Reader.whole,
    "shapes": _Reader.shapes,
    "keep_debug": _Reader.flag,
    "timing": _Reader.flag,
}
"""What [options] may hold, and how it is read."""


def dump_recipe(
    stages: Sequence[Stage],
    *,
    max_drop: float | None = None,
    max_error: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Write a recipe as TOML, which `load_recipe` reads back to the same. Options at their defaults are left out.

    Example:
        >>> print(dump_recipe([Stage((parse_pass("quantize-weights:min_elements=64"),), 0.5)], max_drop=0.01), end="")
        [budget]
        max_drop = 0.01
        <BLANKLINE>
        [[stage]]
        passes = [{name = "quantize-weights", min_elements = 64}]
        share = 0.5
    """
    budget = {key: value for key, value in zip(BUDGET_KEYS, (max_drop, max_error), strict=True) if value is not None}
    blocks = [_block("[budget]", budget)] if budget else []
    if options:
        blocks.append(_block("[options]", options))
    for stage in stages:
        share = {"share": stage.share} if stage.share != 1.0 else {}
        blocks.append(_block("[[stage]]", {"passes": [_described(item) for item in stage.passes], **share}))
    return "\n".join(blocks)


def _described(item: Pass) -> str | dict[str, Any]:
    defaults = {option.name: option.default for option in dataclasses.fields(item)}
    changed = {key: value for key, value in item.options().items() if value != defaults[key]}
    return {"name": item.name, **changed} if changed else item.name


def _block(head: str, table: Mapping[str, Any]) -> str:
    return "\n".join([head, *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml(key)
