"""A third-party pass: weights that are next to nothing become zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp import Changes, Context, Model, Pass, option, register


@register
@dataclass(frozen=True, kw_only=True)
class ZeroSmall(Pass):
    """Set weights to zero that are small beside the largest one of their layer.

    ::

        before   Y = MatMul(X, W)
        after    Y = MatMul(X, W')    W' = W where abs(W) >= threshold * max(abs(W)), else 0

    Left alone: layers without a constant float32 weight, and excluded ones.
    """

    name: ClassVar[str] = "zero-small"

    threshold: float = option(0.02, "The smallest weight that stays, as a share of the largest.", minimum=0, maximum=1)

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        for node in model.graph.nodes:
            weight = node.inputs[1] if node.op in {"Conv", "Gemm", "MatMul"} else None
            if not isinstance(weight, gs.Constant) or weight.dtype != np.float32:
                continue
            if context.excludes(node):
                changes.leave(node.name, "excluded")
                continue
            values = model.weight(weight.name)
            small = (values != 0) & (np.abs(values) < self.threshold * np.abs(values).max(initial=0))
            if small.any():
                model.set_weight(weight.name, np.where(small, np.float32(0), values))
                changes.add(node.name, f"{small.sum():,} of {small.size:,} weights set to zero")
        return changes

    def weaker(self) -> Iterator[Self]:
        """Half the threshold, twice."""
        yield replace(self, threshold=self.threshold / 2)
        yield replace(self, threshold=self.threshold / 4)
