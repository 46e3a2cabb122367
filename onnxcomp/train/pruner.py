"""Makes weights zero during training, more and more of them."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxcomp.train.fixed import Fixed
from onnxcomp.train.options import Pruning

__all__ = ["Pruner", "lamp_scores"]

SMALL = 0.5
"""A weight at half of its layer's root mean square counts about half in the smooth count."""


def lamp_scores(weight: Tensor) -> Tensor:
    """How much of a layer would go with each weight: its square over the sum of those that are no smaller.

    Scores of layers can be compared, so one threshold divides zeros among them (Lee et al. 2021, "Layer-adaptive
    sparsity for the magnitude-based pruning", section 3).

    Args:
        weight: Any shape.

    Returns:
        Scores of that shape, in 0 to 1.
    """
    squares, order = torch.sort(weight.detach().flatten().double().square(), descending=True)
    left = torch.cumsum(squares, 0)
    scores = torch.empty_like(squares)
    scores[order] = squares / left.clamp_min(torch.finfo(torch.float64).tiny)
    return scores.reshape(weight.shape)


class Pruner:
    """Follows a ramp of sparsity.

    Args:
        fixed: Holds the masks, which this changes.
        pruning: The ramp.
        total_steps: Of training.
    """

    def __init__(self, fixed: Fixed, pruning: Pruning, total_steps: int) -> None:
        self._fixed = fixed
        self._pruning = pruning
        once, last = pruning.how == "once", total_steps - 1
        self._start = 0 if once else min(last, round(pruning.start * total_steps))
        self._end = self._start if once else min(last, max(self._start + 1, round(pruning.end * total_steps)))
        self._every = max(1, (self._end - self._start) // pruning.steps)
        self.position = 0
        self.waits = False
        self._from = fixed.sparsity()

    @property
    def is_done(self) -> bool:
        """Whether the target is reached."""
        return self._start + self.position > self._end

    def wanted(self) -> float:
        """The sparsity at this place of the ramp."""
        if self._end == self._start:
            return self._pruning.sparsity
        done = min(1.0, max(0.0, self.position / (self._end - self._start)))
        if self._pruning.how == "penalty":
            return self._pruning.sparsity if done >= 1 else self._from
        return self._pruning.sparsity + (self._from - self._pruning.sparsity) * (1 - done) ** 3

    def before_step(self, step: int) -> None:
        """Choose anew what stays, where it is time for that."""
        if step < self._start or self.is_done or self.waits:
            return
        if self.position % self._every == 0 or self._start + self.position == self._end:
            self._choose(self.wanted())
        self.position += 1

    def _choose(self, sparsity: float) -> None:
        """Keep the weights with the highest scores of all layers; zeros stay zeros."""
        scores = {name: lamp_scores(parameter) for name, parameter in self._fixed.prunable.items()}
        if not scores:
            return
        flat = torch.cat([each.flatten() for each in scores.values()])
        count = min(len(flat) - 1, round(sparsity * len(flat)))
        if count < 1:
            return
        threshold = torch.kthvalue(flat, count).values
        for name, each in scores.items():
            self._fixed.set_mask(name, each > threshold)

    def penalty(self, step: int) -> Tensor | float:
        """What is added to the loss, so that weights go to zero by themselves."""
        pruning = self._pruning
        if pruning.how != "penalty" or step < self._start or self.is_done:
            return 0.0
        total: Tensor | float = 0.0
        for parameter in self._fixed.prunable.values():
            sizes = parameter.abs() / parameter.detach().square().mean().sqrt().clamp_min(1e-12)
            total = total + (sizes if pruning.norm == "l1" else 1 - torch.exp(-sizes / SMALL)).mean()
        return pruning.penalty * total / max(1, len(self._fixed.prunable))
