"""`Pass`, what it may use (`Context`), what it says (`Changes`), and the registry that finds passes by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib.metadata
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np

from onnxcomp.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_graphsurgeon as gs

    from onnxcomp.data import Dataset
    from onnxcomp.judge import Judge
    from onnxcomp.model import Model
    from onnxcomp.runtime import Runtime
    from onnxcomp.targets import Target

__all__ = [
    "Change",
    "Changes",
    "Context",
    "Left",
    "Pass",
    "Table",
    "find_pass",
    "option",
    "register",
    "registered_passes",
]

ENTRY_POINT_GROUP = "onnxcomp.passes"


def option(
    default: Any,
    description: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare an option of a pass: its default, what it means, and what it may be.

    Args:
        default: The value when the user says nothing.
        description: One sentence, shown by `onnxcomp passes NAME`.
        choices: The strings that are allowed.
        minimum: The smallest number that is allowed.
        maximum: The largest number that is allowed.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={"description": description, **limits})


@dataclass(frozen=True)
class Change:
    """One place that a pass changed."""

    where: str
    what: str


@dataclass(frozen=True)
class Left:
    """One place that a pass left alone, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Table:
    """What a pass has measured or counted, for the report.

    Attributes:
        title: What it shows.
        columns: Names of the columns.
        rows: A value for each column: text, a number, or None where there is none.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | int | float | None, ...]]


@dataclass
class Changes:
    """What a pass did: honest, since the ledger shows it.

    Attributes:
        changed: Each place that changed.
        left: Each place left alone, and why.
        notes: Anything else that the user should know.
        tables: What was measured or counted, layer by layer.
        resolved: Options that make the pass take the same decisions again without measuring.
    """

    changed: list[Change] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many places changed."""
        return len(self.changed)

    def add(self, where: str, what: str) -> None:
        """Say that a place was changed."""
        self.changed.append(Change(where, what))

    def leave(self, where: str, why: str) -> None:
        """Say that a place was left alone."""
        self.left.append(Left(where, why))


def _no_progress(text: str) -> None:
    """Say nothing."""


class _Watched:
    """A number that remembers whether it was read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return 1.0  # the default of the dataclass's field
        instance.__dict__["was_asked"] = True
        return instance.__dict__[self._name]

    def __set__(self, instance: Any, value: float) -> None:
        instance.__dict__[self._name] = value


@dataclass
class Context:
    """What a pass may use besides the model.

    Attributes:
        data: Samples to calibrate with, or None.
        target: What the model is made for; None means this host.
        judge: Scores candidate models, or None where nothing can be measured.
        runtime: ONNX Runtime in its worker process, or None.
        workdir: A folder for temporary models, or None.
        rng: The seeded source of randomness.
        exclude: Patterns of node names that every pass leaves alone.
        keep_debug: Keep the exporter's traces.
        progress: Called with a short line on what is going on.
        deadline: When choosing by measurement must end (`time.monotonic()` seconds).
        statistics: What was measured before in this run, by (model digest, tensor, method).
        activations: What float activations look like, by model, data, tensor and method; runs for several targets share
            it.
        exact: The model before its weights were rounded, so that none need be rounded twice; None: they are not.
        share: The part of the budget to choose within: less than all where an earlier choice did not hold on the
            samples kept for confirmation.
        was_asked: Whether `share` was read: then less of it leads to another choice.
    """

    data: Dataset | None = None
    target: Target | None = None
    judge: Judge | None = None
    runtime: Runtime | None = None
    workdir: Path | None = None
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    exclude: tuple[str, ...] = ()
    keep_debug: bool = False
    progress: Callable[[str], None] = _no_progress
    deadline: float | None = None
    statistics: dict[Any, Any] = field(default_factory=dict)
    activations: dict[Any, Any] = field(default_factory=dict)
    exact: Model | None = None
    share: float = _Watched()  # type: ignore[assignment] # a float to all who read it
    was_asked: bool = field(default=False, init=False)

    def excludes(self, node: gs.Node) -> bool:
        """Whether the user asked to leave this node alone."""
        name = node.name or (node.outputs[0].name if node.outputs else "")
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)

    def out_of_time(self) -> bool:
        """Whether the time for choosing by measurement is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A graph rewrite: a frozen dataclass whose fields are its options.

    Attributes:
        name: Its name on the command line: the class name in kebab-case.
        requires: What must be there for it to run: "data", "labels", "torch".
        lossless: It claims equal results, to float rounding; the pipeline checks the claim.
        rounds: All that it changes in weights is how they are rounded, so that a later pass which rounds them too may
            go back to the weights before it.
        idempotent: Running it a second time changes nothing.
        seals: Later passes cannot look into the weights that it has written, so lossy ones must come before it.
        grows: It makes the file larger on purpose.
        required: The model does not run on its target without it, so it is kept whatever it costs; all is measured.
        mends: It makes up for what earlier passes lost, so it is judged together with those since the last that did.
        pays_with: The name of a later pass without which it cannot pay. Given one by one, the two and what is between
            them are one stage.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    lossless: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    seals: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    required: ClassVar[bool] = False
    mends: ClassVar[bool] = False
    pays_with: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check each option against what it declares.

        Raises:
            OptionError: A value has the wrong type or is out of range.
        """
        for declared in dataclasses.fields(self):
            _check_option(self.name, declared, getattr(self, declared.name))

    @abstractmethod
    def rewrite(self, model: Model, context: Context) -> Changes:
        """Rewrite the model in place and say what changed."""

    def weaker(self) -> Iterator[Self]:
        """Gentler settings to fall back to, best first."""
        return iter(())

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {declared.name: getattr(self, declared.name) for declared in dataclasses.fields(self)}


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}
"""The types of options that are checked, told by the default, in words."""


def _check_option(pass_name: str, declared: dataclasses.Field[Any], value: Any) -> None:
    limits = declared.metadata
    choices, minimum, maximum = (limits.get(key) for key in ("choices", "minimum", "maximum"))
    where = f"{pass_name}: {declared.name}"
    if choices and value not in choices:
        message = f"{where} must be one of {', '.join(choices)}, got {value!r}"
        raise OptionError(message)
    expected = type(declared.default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = is_number if expected is float else isinstance(value, expected)
    if expected in _KINDS and (not fits or (isinstance(value, bool) and expected is not bool)):
        message = f"{where} must be {_KINDS[expected]}, got {value!r}"
        raise OptionError(message)
    if (minimum is not None and not value >= minimum) or (maximum is not None and not value <= maximum):
        allowed = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        message = f"{where} must be {allowed if minimum is not None else f'at most {maximum}'}, got {value}"
        raise OptionError(message)


# --- the registry -----------------------------------------------------------------------------------------------------

AnyPass = TypeVar("AnyPass", bound=type[Pass])
_registry: dict[str, type[Pass]] = {}


def register(cls: AnyPass) -> AnyPass:
    """Make a pass known by its name.

    Raises:
        OptionError: The name is taken, or is not the class name in kebab-case.
    """
    kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
    name = getattr(cls, "name", None)
    if name != kebab:
        message = f"the pass {cls.__qualname__} must be called {kebab!r}, got {name!r}"
        raise OptionError(message)
    known = _registry.get(cls.name)
    if known is not None and known is not cls:
        message = f"two passes are called {cls.name!r}: {known.__module__} and {cls.__module__}"
        raise OptionError(message)
    _registry[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """All passes by name, those of installed plugins included.

    Raises:
        OptionError: A plugin cannot be imported.
    """
    _load_plugins()
    return dict(sorted(_registry.items()))


@cache
def _load_plugins() -> None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except ImportError as error:
            message = f"the plugin {entry.name!r} ({entry.value}) cannot be imported: {error}"
            raise OptionError(message) from error


def find_pass(name: str) -> type[Pass]:
    """The pass with this name.

    Raises:
        OptionError: There is none.
    """
    passes = registered_passes()
    if name in passes:
        return passes[name]
    close = difflib.get_close_matches(name, passes, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(passes)}"
    message = f"no pass is called {name!r}; {hint}"
    raise OptionError(message)
