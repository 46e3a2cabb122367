"""What a lint is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from onnxcomp.model import Model
from onnxcomp.ort_format import OrtFile
from onnxcomp.runtime import Census
from onnxcomp.targets import Target

__all__ = ["LINTS", "Finding", "Lint", "Seen", "Subject", "lint"]

Severity = Literal["error", "warning"]
"""error: the target refuses the model, or computes something else. warning: it is slower or less exact for it."""

Seen = Iterator[tuple[str, str]]
"""Where, and what is there."""


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        target: What the model is for.
        model: The model; None of a file in ONNX Runtime's own format.
        ort: What is in such a file.
        census: Its kernels on this host, where they are known.
    """

    target: Target
    model: Model | None = None
    ort: OrtFile | None = None
    census: Census | None = None


@dataclass(frozen=True)
class Lint:
    """A trap that models fall into.

    Attributes:
        id: Its identifier.
        severity: How bad it is.
        why: What comes of it.
        fix: What to do about it.
        mended_by: What does that: a pass, or a step of `optimize` or `deploy`; empty: the user has to.
        look: Finds it.
        on: The targets that it is about; empty: all.
    """

    id: str
    severity: Severity
    why: str
    fix: str
    mended_by: str
    look: Callable[[Subject], Seen]
    on: frozenset[str]


@dataclass(frozen=True)
class Finding:
    """A place where a lint found its trap.

    Attributes:
        id: The lint's.
        severity: The lint's.
        where: The node or tensor, or "the model".
        what: What is there.
        why: What comes of it.
        fix: What to do about it.
    """

    id: str
    severity: Severity
    where: str
    what: str
    why: str
    fix: str


LINTS: dict[str, Lint] = {}


def lint(
    identifier: str, severity: Severity, *, why: str, fix: str, mended_by: str = "", on: tuple[str, ...] = ()
) -> Callable[[Callable[[Subject], Seen]], Callable[[Subject], Seen]]:
    """Register a function that finds a trap; see `Lint`."""

    def register(look: Callable[[Subject], Seen]) -> Callable[[Subject], Seen]:
        assert identifier not in LINTS, identifier
        LINTS[identifier] = Lint(identifier, severity, why, fix, mended_by, look, frozenset(on))
        return look

    return register
