"""What training must not change: zeros that stay zero, and weights that share a value."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

__all__ = ["Fixed", "Ties", "masked"]

MOST_VALUES = 0.125
"""A weight with at most this share of distinct values is a codebook: its values are trained, its codes kept."""

LARGEST = 256
"""The most values that a codebook has. Large weights of 16 bits hold more, by chance, each many times."""

FEW_ELEMENTS = 64
"""Smaller tensors are taken as they are."""


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """A weight with zeros where it is not kept; a product would make some of them -0.0, which is stored as a value."""
    return torch.where(kept, weight, 0)


class Ties:
    """The places of a weight that share a value move together: the gradient of a value is the sum over its places.

    Places start equal and get equal steps, so they stay equal, bit for bit.

    Args:
        weight: Any shape.
    """

    def __init__(self, weight: Tensor) -> None:
        values, codes = torch.unique(weight.detach().flatten(), return_inverse=True)
        self.count = len(values)
        self._codes = codes
        self._shape = weight.shape

    def are_codebook(self) -> bool:
        """Whether the values are few: those of the weight, or those of each of its channels."""
        few = MOST_VALUES * self._codes.numel()
        if self.count <= LARGEST or self.count > few:
            return bool(self.count <= few)
        for axis, size in enumerate(self._shape):
            channel = torch.arange(size, device=self._codes.device).reshape(-1, *[1] * (len(self._shape) - axis - 1))
            found = torch.unique(self._codes.reshape(self._shape) + self.count * channel) // self.count
            if len(found) <= few and int(torch.bincount(found).max()) <= LARGEST:
                return True
        return False

    def apply(self, gradient: Tensor) -> Tensor:
        """The gradient of each place's value."""
        sums = torch.zeros(self.count, dtype=gradient.dtype, device=gradient.device)
        sums.index_add_(0, self._codes.to(gradient.device), gradient.flatten())
        return sums[self._codes].reshape(gradient.shape)


class Fixed:
    """Keeps zeros and codebooks of Parameters.

    Args:
        parameters: Names and Parameters. Those of two axes or more with zeros keep them.
        codebooks: Whether few values are taken for a codebook.
        codes: Names of those that are behind integer codes: their few values are a grid, not a codebook.
        rounded: Names of those whose zeros come from rounding, and may become other codes.
        matrices: Names of those that more zeros may be made in; None: all.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        codebooks: bool = True,
        codes: Container[str] = (),
        rounded: Container[str] = (),
        matrices: Container[str] | None = None,
    ) -> None:
        self.parameters = {name: each for name, each in parameters if each.requires_grad and each.ndim >= 2}
        self.prunable = {name: each for name, each in self.parameters.items() if matrices is None or name in matrices}
        self.masks: dict[str, Tensor] = {}
        self.ties: dict[str, Ties] = {}
        for name, parameter in self.parameters.items():
            if codebooks and name not in codes and parameter.numel() >= FEW_ELEMENTS:
                ties = Ties(parameter)
                if ties.are_codebook():
                    self.ties[name] = ties
            if name not in rounded:
                self.set_mask(name, parameter.detach() != 0)

    def set_mask(self, name: str, kept: Tensor) -> None:
        """Make zeros of all but what is kept, from now on."""
        if bool(kept.all()):
            self.masks.pop(name, None)
        else:
            self.masks[name] = kept
            with torch.no_grad():
                self.parameters[name].copy_(masked(self.parameters[name], kept))

    def before_step(self) -> None:
        """Make gradients those of what may change: a zero that stays tells nothing of the value that it once had."""
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)
        for name, ties in self.ties.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                parameter.grad = ties.apply(parameter.grad)

    @torch.no_grad()  # type: ignore[untyped-decorator] # torch has no type information here
    def after_step(self) -> None:
        """Put zeros back: weights that are masked have no gradient, but may have momentum left."""
        for name, mask in self.masks.items():
            self.parameters[name].masked_fill_(~mask, 0)

    def sparsity(self) -> float:
        """The share of zeros in all that could have some."""
        total = sum(each.numel() for each in self.prunable.values())
        zeros = sum(int((each == 0).sum()) for each in self.prunable.values())
        return float(zeros / max(1, total))
