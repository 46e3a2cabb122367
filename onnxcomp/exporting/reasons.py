"""Errors of others in one line."""

from __future__ import annotations

import re

from onnxcomp.errors import OnnxcompError

REASON_CHARACTERS = 300


def innermost(error: BaseException) -> BaseException:
    """What an error was raised for in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """The class of an error and the first line of its text."""
    if isinstance(error, OnnxcompError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return short(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def short(text: str) -> str:
    """A text without colours, cut where it is long."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 1] + "…"
