"""`Thin`: what becomes of a weight, or has become of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcomp_passes._conv_forms import factor_shapes

if TYPE_CHECKING:
    from onnxcomp_passes._thin_layers import Unit

__all__ = ["THIN", "Thin"]

THIN = ".thin"
"""What names of factors and their nodes have after that of what they stand for."""


@dataclass(frozen=True)
class Thin:
    """What becomes of a weight.

    Attributes:
        form: One of `FORMS`; of all but a Conv's "svd".
        ranks: One, with "tucker" two.

    Example:
        >>> str(Thin("tucker", (16, 24))), Thin.parse("svd:8")
        ('tucker:16x24', Thin(form='svd', ranks=(8,)))
    """

    form: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.form}:{self.text}"

    @property
    def text(self) -> str:
        """The ranks."""
        return "x".join(map(str, self.ranks))

    @staticmethod
    def parse(text: str) -> Thin | None:
        """What a text stands for; None where it is none."""
        form, _, ranks = text.partition(":")
        sizes = ranks.split("x")
        count = {"svd": 1, "spatial": 1, "cp": 1, "tucker": 2}.get(form)
        if len(sizes) != count or not all(size.isdigit() and int(size) for size in sizes):
            return None
        return Thin(form, tuple(map(int, sizes)))

    def parameters(self, unit: Unit) -> int:
        """How many numbers the factors of a unit have."""
        if unit.node.op == "Conv":
            part = unit.parts[0]
            return sum(map(math.prod, factor_shapes(self.form, part.view.shape, part.sizes[0], self.ranks)))
        groups, inputs, outputs = unit.sizes
        return groups * self.ranks[0] * (inputs + outputs)
