"""How a training went."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Evaluation", "History"]


@dataclass(frozen=True)
class Evaluation:
    """What held-out samples said.

    Attributes:
        step: After how many steps.
        loss: The mean training loss since the last time.
        held_out_loss: The mean loss on the held-out samples.
        drop: What the student loses; None where only an error can be measured.
        error: The relative error of its worst output.
        agreement: How often the top class is the teacher's.
        sparsity: The share of zeros.
        seconds: Since training began.
    """

    step: int
    loss: float
    held_out_loss: float
    drop: float | None
    error: float
    agreement: float | None
    sparsity: float
    seconds: float

    @property
    def score(self) -> tuple[float, float]:
        """Smaller is better; between equal drops, which few samples often give, the loss decides."""
        return (self.error if self.drop is None else self.drop), self.held_out_loss


@dataclass
class History:
    """How training went.

    Attributes:
        steps: How many were run.
        evaluations: In order; the first is before training.
        best: That of the weights which were kept.
        resumed_at: The step that a checkpoint was taken over at; 0: none was.
    """

    steps: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    best: Evaluation | None = None
    resumed_at: int = 0
