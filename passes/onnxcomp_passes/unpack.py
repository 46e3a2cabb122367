"""Turn packed weights back into dense ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp.model import Model
from onnxcomp.packed import unpack
from onnxcomp.passes import Changes, Context, Pass, register

__all__ = ["Unpack"]


@register
@dataclass(frozen=True, kw_only=True)
class Unpack(Pass):
    """Turn packed weights back into dense ones, bit for bit, so that other passes and tools can work on them.

    ::

        before   Y = MatMul(X, Gather(book, Cast(unpack(codes))))
        after    Y = MatMul(X, W)

    The file grows, on purpose: `onnxcomp optimize --unpack` keeps that.

    Left alone: weights that `pack` did not pack, such as int8 codes that a Cast and a Mul decode.
    """

    name: ClassVar[str] = "unpack"
    lossless: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        candidate = model.fork()
        for packed in unpack(candidate):
            name, size = str(packed.tensor.name), f"{packed.nbytes:,}"
            changes.add(name, f"{size} bytes of codes become a dense weight")
        if changes.count:
            model.become(candidate)
        return changes
