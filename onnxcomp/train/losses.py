"""`Loss`: what a student is trained for, out of the terms that compare it with its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import torch
from torch import Tensor

from onnxcomp.data.user_code import is_reference, load_function
from onnxcomp.errors import ModelError, OptionError
from onnxcomp.model import Model
from onnxcomp.train.matching import matched_tensors
from onnxcomp.train.terms import (
    attention_maps,
    feature_maps,
    graph_based,
    hard_targets,
    log_probabilities,
    normalised_mse,
    relational,
    soft_targets,
)

__all__ = [
    "Kind",
    "Loss",
    "UserLoss",
    "attention_maps",
    "feature_maps",
    "graph_based",
    "hard_targets",
    "log_probabilities",
    "matched_tensors",
    "normalised_mse",
    "relational",
    "soft_targets",
    "user_loss",
]

Kind = Literal["auto", "soft", "mse"]
Tensors = Mapping[str, Tensor]
UserLoss = Callable[[dict[str, Tensor], dict[str, Tensor], "Tensor | None"], Tensor]

MOST_CLASSES = 32_768
"""An output that is wider is not taken for classes, but where `kind` is "soft"."""

ROUNDING = 1e-3
"""How far from 1 the sum of probabilities may be; those of float16 are off by 5e-4 at most for one that is near 1."""

_INNER = {"features": feature_maps, "attention": attention_maps, "relational": relational, "graph": graph_based}
_WEIGHTS = ("output_weight", *_INNER)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a student is trained for: the weighted sum of how far its tensors are from the teacher's.

    Call it with the tensors of both by name, outputs and watched inner ones, and with labels where there are any.

    Attributes:
        kind: How outputs are compared: "soft" by class probabilities over the last axis, "mse" by the squared error
            over the teacher's variance, "auto" by "soft" where `classes` is set and the output is a row of classes for
            each sample (rank 2), else by "mse". Integer outputs are left out.
        classes: Whether outputs are scores of classes; nothing in a graph tells that.
        temperature: How much class probabilities are evened out.
        alpha: The weight of the comparison with the teacher where there are labels; theirs is 1 - alpha. Labels are for
            the first output of classes whose positions they have the shape of.
        output_weight: The weight of what is said of outputs above.
        features: The weight of the squared error of inner tensors; of attention maps where channels were pruned.
        attention: The weight of the distance of attention maps of inner tensors of rank 3 or 4.
        relational: The weight of distances and angles between the samples of a batch, of inner tensors.
        graph: The weight of similarities between the samples of a batch, of inner tensors.
        tensors: The names of the inner tensors, which may be outputs too; "auto" is to be replaced by `fitted`.
        outputs: The names of the outputs; None for all that are not in `tensors`.
        user: A further term: `module:function` of both mappings and the labels (or None), which gives a scalar.
        allow_code: Whether `user` may be imported and run.

    Example:
        >>> loss = Loss(classes=True, temperature=2.0, alpha=0.5)
        >>> logits = torch.tensor([[2.0, -1.0]])
        >>> {name: round(value.item(), 4) for name, value in
        ...  loss.terms({"y": logits}, {"y": logits}, torch.tensor([0])).items()}
        {'soft': 0.0, 'hard': 0.0243}
    """

    kind: Kind = "auto"
    classes: bool = False
    temperature: float = 2.0
    alpha: float = 0.9
    output_weight: float = 1.0
    features: float = 0.0
    attention: float = 0.0
    relational: float = 0.0
    graph: float = 0.0
    tensors: tuple[str, ...] | Literal["auto"] = "auto"
    outputs: tuple[str, ...] | None = None
    user: str | None = None
    allow_code: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            _refuse("kind", f"one of {', '.join(get_args(Kind))}", self.kind)
        for name in ("classes", "allow_code"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, "True or False", getattr(self, name))
        if not _is_number(self.temperature) or self.temperature <= 0:
            _refuse("temperature", "a number above 0", self.temperature)
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            _refuse("alpha", "in [0, 1]", self.alpha)
        for name in _WEIGHTS:
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                _refuse(name, "a number of at least 0", getattr(self, name))
        for name, special in (("tensors", "auto"), ("outputs", None)):
            object.__setattr__(self, name, _names(name, getattr(self, name), special))
        self._check_sense()
        function = None if self.user is None else user_loss(self.user, self.allow_code)
        object.__setattr__(self, "_function", function)

    def _check_sense(self) -> None:
        if self.user is not None and not (isinstance(self.user, str) and is_reference(self.user)):
            _refuse("user", "module:function", self.user)
        if self.user is None and not any(getattr(self, name) for name in _WEIGHTS):
            _refuse("weights", "one above 0, or a loss of the user's", "none")
        if self.outputs == () and self.output_weight:
            _refuse("outputs", "names, or None for all", "none")
        if self.tensors == () and self._inner():
            _refuse("tensors", f"names for {', '.join(self._inner())}", "none")

    def _inner(self) -> list[str]:
        """The terms of inner tensors that count."""
        return [name for name in _INNER if getattr(self, name)]

    # --- which tensors --------------------------------------------------------------------------------------------

    def fitted(self, teacher: Model, student: Model) -> Loss:
        """This loss with the names of outputs and inner tensors filled in, for a teacher and a student.

        Raises:
            OptionError: A term needs inner tensors, and the two have none in common.
        """
        outputs = self.outputs or tuple(tensor.name for tensor in student.graph.outputs if _may_be_float(tensor))
        if self.tensors != "auto":
            return replace(self, outputs=outputs)
        inner = self._inner()
        found = tuple(matched_tensors(teacher, student, any_channels=True)) if inner else ()
        if inner and not found:
            message = (
                f"loss: {', '.join(inner)} need inner tensors, and teacher and student have none of the same name that"
                " would suit; name them in tensors"
            )
            raise OptionError(message)
        return replace(self, tensors=found, outputs=outputs)

    @property
    def watch(self) -> tuple[str, ...]:
        """The inner tensors that this loss needs beside the outputs."""
        known = set(self.outputs or ())
        return tuple(name for name in self.tensors if name not in known) if self.tensors != "auto" else ()

    # --- its value ------------------------------------------------------------------------------------------------

    def __call__(self, student: Tensors, teacher: Tensors, labels: Tensor | None = None) -> Tensor:
        """The sum of the terms.

        Args:
            student: Its tensors by name.
            teacher: Those of the teacher, by the same names.
            labels: Class numbers of the samples, where there are any.

        Raises:
            OptionError: A tensor is missing, a term suits none of them, or the user's loss is not one.
            ModelError: Two tensors do not fit each other.
            DataError: The labels do not fit the output.
        """
        return sum(self.terms(student, teacher, labels).values(), torch.zeros(()))

    def terms(self, student: Tensors, teacher: Tensors, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Each term by its name, times its weight: they add up to the loss.

        Raises:
            OptionError: As for the call of the loss.
        """
        found: dict[str, Tensor] = {}
        if self.output_weight:
            found.update(self._output_terms(student, teacher, labels))
        for name in self._inner():
            found[name] = self._inner_term(name, student, teacher)
        function: UserLoss | None = vars(self)["_function"]
        if function is not None:
            found["user"] = function(dict(student), dict(teacher), labels)
        return found

    def _output_terms(self, student: Tensors, teacher: Tensors, labels: Tensor | None) -> dict[str, Tensor]:
        names = self.outputs or [name for name in teacher if self.tensors == "auto" or name not in self.tensors]
        names = [name for name in names if _of(teacher, name, "teacher").is_floating_point()]
        if not names:
            _refuse("outputs", "one of floats", "none")
        share = self.output_weight / len(names)
        hard = None
        found: dict[str, Tensor] = {}
        for name in names:
            got, wanted = _of(student, name, "student"), _of(teacher, name, "teacher")
            _check_shapes(name, got, wanted)
            if not self._is_classes(name, wanted):
                found["mse"] = found.get("mse", 0) + share * normalised_mse(got, wanted)
                continue
            if _are_probabilities(wanted):
                got, wanted = log_probabilities(got), log_probabilities(wanted)
            found["soft"] = found.get("soft", 0) + share * soft_targets(got, wanted, self.temperature)
            if hard is None and labels is not None and labels.shape == wanted.shape[:-1]:
                hard = hard_targets(got, labels)
        if labels is None or not (self.classes or self.kind == "soft"):
            return found
        if hard is None:
            shapes = ", ".join(f"{name!r} of shape {list(teacher[name].shape)}" for name in names)
            _refuse("labels", f"the shape of the positions of an output of classes ({shapes})", list(labels.shape))
        found = {name: self.alpha * value for name, value in found.items()}
        return {**found, "hard": (1 - self.alpha) * self.output_weight * hard}

    def _is_classes(self, name: str, teacher: Tensor) -> bool:
        if self.kind == "soft":
            if teacher.ndim < 2 or teacher.shape[-1] < 2:
                _refuse("kind", f"'auto' or 'mse' for the output {name!r} of shape {list(teacher.shape)}", "soft")
            return True
        return self.kind == "auto" and self.classes and teacher.ndim == 2 and 2 <= teacher.shape[-1] <= MOST_CLASSES

    def _inner_term(self, term: str, student: Tensors, teacher: Tensors) -> Tensor:
        if self.tensors == "auto":
            _refuse("tensors", f"names for {term} (Loss.fitted chooses them)", "auto")
        values = []
        for name in self.tensors:
            got, wanted = _of(student, name, "student"), _of(teacher, name, "teacher")
            if term == "attention" and wanted.ndim not in {3, 4}:
                continue
            try:
                values.append(_INNER[term](got, wanted))
            except ModelError as error:
                message = f"the tensor {name!r}: {error}"
                raise ModelError(message) from error
        if not values:
            _refuse("tensors", f"one of rank 3 or 4 for {term}", ", ".join(self.tensors))
        return getattr(self, term) * torch.stack(values).mean()


def _may_be_float(tensor: Any) -> bool:
    """Whether an output may be a tensor of floats; sequences, which have no type of elements here, are none."""
    info = getattr(tensor, "info", None)
    if info is not None and info.type.WhichOneof("value") not in {None, "tensor_type"}:
        return False
    return tensor.dtype is None or np.dtype(tensor.dtype).kind not in "OUSbiu"


def user_loss(reference: str, allow_code: bool) -> UserLoss:
    """Load a user's loss: `module:function` of the student's tensors, the teacher's, and the labels or None.

    Args:
        reference: Where it is.
        allow_code: Whether it may be imported and run.

    Returns:
        The function; what it gives is checked in every call.

    Raises:
        OptionError: It may not be run, or is not there. In a call: it fails, or does not give a scalar tensor with a
            gradient (there need be none where torch computes none).
    """
    function = load_function(reference, allow_code)

    def checked(student: dict[str, Tensor], teacher: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        where = f"the loss {reference!r}"
        try:
            value: Any = function(student, teacher, labels)
        except Exception as error:  # a user's function may raise anything
            message = f"{where} failed: {type(error).__name__}: {error}"
            raise OptionError(message) from error
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim:
            shape = f"a tensor of {value.dtype} and shape {list(value.shape)}" if isinstance(value, Tensor) else None
            message = f"{where} must give a scalar tensor of floats, got {shape or f'a {type(value).__name__}'}"
            raise OptionError(message)
        if torch.is_grad_enabled() and not value.requires_grad:
            message = f"{where} must give a tensor with a gradient, got one that does not depend on the student"
            raise OptionError(message)
        return value

    return checked


# --- parts ------------------------------------------------------------------------------------------------------------


def _are_probabilities(rows: Tensor) -> bool:
    sums = rows.float().sum(-1)
    return bool((rows >= 0).all()) and bool(((sums - 1).abs() <= ROUNDING).all())


def _of(tensors: Tensors, name: str, whose: str) -> Tensor:
    if name not in tensors:
        _refuse("tensors", f"{name!r} among the {whose}'s", ", ".join(tensors) or "none")
    return tensors[name]


def _check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        message = f"the output {name!r} must have the teacher's shape {list(teacher.shape)}, got {list(student.shape)}"
        raise ModelError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(option: str, value: Any, special: str | None) -> Any:
    if value == special:
        return special
    if isinstance(value, str) or not isinstance(value, Iterable):
        _refuse(option, f"a list of names or {special!r}", value)
    names = tuple(value)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        _refuse(option, "names, each once", names)
    return names


def _refuse(where: str, expected: str, got: object) -> NoReturn:
    message = f"loss: {where} must be {expected}, got {got!r}"
    raise OptionError(message)
