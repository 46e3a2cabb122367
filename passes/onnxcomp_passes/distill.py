"""Distillation: what earlier passes lost is learnt again from the original's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, option, register
from onnxcomp_passes._training import Training

__all__ = ["Distill"]

PRUNING_WAYS = ("gradual", "once", "penalty")


@register
@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Train the model with the original as its teacher; labels help where there are any.

    ::

        before   Y = MatMul(X, W)    W: pruned, split, clustered or rounded
        after    Y = MatMul(X, W')   W': zeros, codebooks and grids as they were, values that answer as the original

    Everything between the original and this pass is judged together with it. The graph stays as it is, and so do zeros,
    shared values, integer grids and BatchNormalization's statistics.

    With `sparsity` weights also become zero on the way, as the learning goes.

    Left alone: the model, where the weights that were learnt are no better on samples held out from training.
    """

    name: ClassVar[str] = "distill"
    requires: ClassVar[frozenset[str]] = frozenset({"data", "torch"})
    idempotent: ClassVar[bool] = False
    mends: ClassVar[bool] = True

    temperature: float = option(2.0, "Evens out class probabilities.", minimum=0.01)
    alpha: float = option(
        0.9, "Weight of the original's answers against labels, where there are any.", minimum=0, maximum=1
    )
    features: float = option(0.0, "Weight of the errors of inner tensors.", minimum=0.0)
    attention: float = option(0.0, "Weight of the distances of attention maps.", minimum=0.0)
    relational: float = option(0.0, "Weight of distances and angles between a batch's samples.", minimum=0.0)
    graph: float = option(0.0, "Weight of similarities between a batch's samples.", minimum=0.0)
    tensors: tuple[str, ...] = option((), "Inner tensors to compare; else they are chosen.")
    sparsity: float = option(
        0.0, "Zeros to make on the way, as a share of all weights; they pay with a later `pack`. 0: none.",
        minimum=0.0, maximum=0.999,
    )  # fmt: skip
    prune_how: str = option("gradual", "More and more zeros; all at first; or by a penalty.", choices=PRUNING_WAYS)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: One of them is out of range.
        """
        super().__post_init__()
        if self.sparsity:
            object.__setattr__(self, "pays_with", "pack")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        from onnxcomp.train import Loss, Pruning

        changes = Changes()
        names = ("temperature", "alpha", "features", "attention", "relational", "graph")
        loss = Loss(tensors=self.tensors or "auto", **{name: getattr(self, name) for name in names})
        pruning = Pruning(sparsity=self.sparsity, how=self.prune_how) if self.sparsity else None
        self._train(model, context, changes, loss, pruning=pruning)
        return changes
