"""Operators by domain and name, and what one of them is told about its node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from onnxcomp.errors import OptionError

__all__ = ["NodeCall", "Operator", "find_operator", "operator", "operator_names"]

Operator = Callable[..., Any]
"""Called with a `NodeCall` and the inputs, None for those left out. Gives a tensor, or a tuple of them where the node
has several outputs. Subgraphs come by the attribute's name, as functions of tensors to a list of tensors."""

Function = TypeVar("Function", bound=Operator)

_operators: dict[tuple[str, str], Operator] = {}

DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class NodeCall:
    """A node as its operator sees it.

    Attributes:
        name: The node's name, or that of its first output.
        op: The operator.
        domain: Of the operator; empty for ONNX's own.
        opset: The version of that domain in the model.
        attrs: Plain values; tensors as torch tensors. Subgraphs are not among them.
        wanted: For each output whether anything reads it.
        input_types: The ONNX element type of each input, 0 where it is not known.
    """

    name: str
    op: str
    domain: str = ""
    opset: int = 17
    attrs: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[bool, ...] = (True,)
    input_types: tuple[int, ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default where the node has none."""
        return self.attrs.get(name, default)


def operator(*names: str, domain: str = "") -> Callable[[Function], Function]:
    """Make a function known as the operator of these names.

    Example:
        >>> import torch
        >>> @operator("Twice", domain="example")
        ... def twice(call: NodeCall, x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> find_operator("example", "Twice") is twice
        True

    Raises:
        OptionError: A name is taken.
    """

    def register(function: Function) -> Function:
        for name in names:
            if _operators.setdefault((domain, name), function) is not function:
                message = (
                    f"two functions are registered for the operator {name!r} of the domain {domain or 'ai.onnx'!r}"
                )
                raise OptionError(message)
        return function

    return register


def find_operator(domain: str | None, name: str) -> Operator | None:
    """The function of an operator; None if there is none."""
    return _operators.get(("" if domain in DEFAULT_DOMAINS or domain is None else domain, name))


def operator_names(domain: str = "") -> list[str]:
    """The operators of a domain that are there, in order."""
    return sorted(name for where, name in _operators if where == domain)
