"""Fine-tuning: what earlier passes lost is learnt again from labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, register
from onnxcomp_passes._training import Training

__all__ = ["FineTune"]


@register
@dataclass(frozen=True, kw_only=True)
class FineTune(Training):
    """Train the model with labels of classes alone.

    ::

        before   Y = MatMul(X, W)    W: pruned, split, clustered or rounded
        after    Y = MatMul(X, W')   W': zeros, codebooks and grids as they were, values that fit the labels

    Everything between the original and this pass is judged together with it. Distillation, which uses labels too, most
    often gives more: an answer holds more than a label.

    Left alone: the model, where the weights that were learnt are no better on samples held out from training.
    """

    name: ClassVar[str] = "fine-tune"
    requires: ClassVar[frozenset[str]] = frozenset({"data", "labels", "torch"})
    idempotent: ClassVar[bool] = False
    mends: ClassVar[bool] = True

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        from onnxcomp.train import Loss

        changes = Changes()
        self._train(model, context, changes, Loss(alpha=0.0, classes=True))
        return changes
