"""How a model is trained."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from onnxcomp.errors import OptionError

__all__ = ["PRUNING", "Pruning", "TrainOptions"]

PRUNING = ("gradual", "once", "penalty")

_ABOVE_ZERO = ("epochs", "batch_size", "learning_rate", "accumulate", "evaluations", "checkpoint_seconds")
_SHARES = ("warmup", "ema")


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How weights become zeros during training.

    Attributes:
        sparsity: The share of zeros in the end, over all weight matrices, kernels and tables.
        how: "gradual": more and more, along a cubic ramp (Zhu & Gupta 2017, "To prune, or not to prune", section 3),
            the weights that stay chosen anew at each of its steps; "once": all of them before the first step;
            "penalty": a penalty draws weights to zero, and the smallest go at the end of the ramp.
        start: The share of training after which the ramp begins.
        end: The share of training after which it has ended; the rest mends.
        steps: How often weights are chosen on the way.
        penalty: The strength of the penalty.
        norm: "l1", or "l0": a smooth count of what is not zero.
        max_drop: The ramp waits while the loss on held-out samples, as the drop of the share of right or agreeing top
            classes, is larger; 0: it never waits.
    """

    sparsity: float
    how: str = "gradual"
    start: float = 0.0
    end: float = 0.6
    steps: int = 30
    penalty: float = 0.1
    norm: str = "l1"
    max_drop: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            message = f"the sparsity to reach must be above 0 and below 1, got {self.sparsity}"
            raise OptionError(message)
        for name, value, choices in (("how", self.how, PRUNING), ("norm", self.norm, ("l1", "l0"))):
            if value not in choices:
                message = f"pruning: {name} must be one of {', '.join(choices)}, got {value!r}"
                raise OptionError(message)
        if not 0 <= self.start < self.end <= 1:
            message = f"pruning must start before it ends, both in 0 to 1, got {self.start} and {self.end}"
            raise OptionError(message)
        if self.steps < 1 or self.penalty < 0 or self.max_drop < 0:
            message = "pruning: steps must be at least 1, penalty and max_drop not negative"
            raise OptionError(message)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long, how fast and on what a model is trained.

    Attributes:
        epochs: Passes over the training samples; fractions are allowed.
        batch_size: Samples in a step.
        learning_rate: The highest; after the warm-up it falls to nothing along a cosine.
        optimizer: "adamw" or "sgd" (with momentum 0.9).
        weight_decay: Of weights of two axes or more.
        warmup: The share of all steps in which the learning rate rises.
        clip_norm: The largest norm of all gradients together; 0: no limit.
        accumulate: A step's samples are run in this many parts.
        ema: The decay of an average of the weights, which is then what is judged and kept; 0: none.
        held_out: The share of the samples that are not trained on but judge the training.
        evaluations: How often they do.
        patience: Evaluations without gain after which training ends; 0: never.
        augment: What is done to inputs at random: "", "shift:N" (images, by up to N pixels), "flip" (images, left to
            right), both divided by a comma, or module:function of a batch of inputs and a generator.
        cache_mb: The teacher's outputs are kept where they need no more memory than this.
        seed: Of the order of samples and of augmentation.
        threads: Threads of one operator.
        device: "auto", "cpu", "cuda", "mps".
        mixed_precision: Compute in 16 bits where the device has them.
        checkpoint_seconds: How often training can be gone on from.
    """

    epochs: float = 5.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip_norm: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    held_out: float = 0.1
    evaluations: int = 10
    patience: int = 0
    augment: str = ""
    cache_mb: float = 1024.0
    seed: int = 0
    threads: int = 1
    device: str = "auto"
    mixed_precision: bool = True
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if not 0 < getattr(self, name) < math.inf:
                message = f"training: {name} must be above 0, got {getattr(self, name)}"
                raise OptionError(message)
        if not 0 < self.held_out < 1:
            message = f"training: held_out must be above 0 and below 1, got {self.held_out}"
            raise OptionError(message)
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                message = f"training: {name} must be at least 0 and below 1, got {getattr(self, name)}"
                raise OptionError(message)
        for name in ("weight_decay", "clip_norm", "patience", "cache_mb", "seed"):
            if not getattr(self, name) >= 0:
                message = f"training: {name} must not be negative, got {getattr(self, name)}"
                raise OptionError(message)
        if self.threads < 1:
            message = f"training: threads must be at least 1, got {self.threads}"
            raise OptionError(message)
        for name, choices in (("optimizer", ("adamw", "sgd")), ("device", ("auto", "cpu", "cuda", "mps"))):
            if getattr(self, name) not in choices:
                message = f"training: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                raise OptionError(message)

    def described(self) -> dict[str, object]:
        """All that decides the result: options that only say how it is computed are left out."""
        left_out = {"cache_mb", "checkpoint_seconds"}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
