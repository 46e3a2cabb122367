"""A form of a stage that was applied and measured, and what is to be said of it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from dataclasses import dataclass, field

from onnxcomp.judge import Score
from onnxcomp.ledger import Attempt, PassEntry
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Pass
from onnxcomp.quality import Quality
from onnxcomp.stages import Stage

__all__ = ["Candidate", "loss_text", "pass_entry"]

WHOLE = "the model"
"""Where passes say that they leave what has no name of its own."""


@dataclass
class Candidate:
    """A model that a form of a stage made, what its passes said, and what was measured."""

    model: Model
    passes: list[PassEntry] = field(default_factory=list)
    failure: str | None = None
    quality: Quality | None = None
    score: Score | None = None
    versus_base: float = 1.0
    chose: bool = False
    written: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        """How many places changed."""
        return sum(len(entry.changed) for entry in self.passes)

    @property
    def gain(self) -> str:
        """What it gains and loses, in words."""
        assert self.score is not None
        assert self.quality is not None
        size, speed, how = self.score.size, self.score.speed, self.score.evidence
        return f"{size:.2f} times smaller, {speed:.2f} times as fast ({how}), {loss_text(self.quality)}"

    def attempt(self, verdict: str, reason: str) -> Attempt:
        """The candidate as the ledger shows it."""
        score, quality = self.score, self.quality
        return Attempt(
            passes=self.passes,
            verdict=verdict,
            reason=reason,
            seconds=time.monotonic() - self.started,
            speed=score.speed if score else None,
            size=score.size if score else None,
            drop=quality.drop if quality else None,
            drop_interval=quality.interval if quality else None,
            error=quality.error if quality else None,
            error_interval=quality.error_interval if quality else None,
            evidence=score.evidence if score else "not measured",
        )

    def nothing(self, stage: Stage) -> str:
        """Why nothing changed: what each lossy pass says of the whole model, else of most that it left."""
        told = []
        for step, entry in zip(stage.passes, self.passes, strict=True):
            whole = [left["why"] for left in entry.left if left["where"] == WHOLE]
            whys = Counter(whole or (left["why"] for left in entry.left))
            if whys and not step.lossless:
                why, count = whys.most_common(1)[0]
                who = f"{step.name}: " if len(stage.passes) > 1 else ""
                told.append(f"{who}{why}" + (f" ({count} of {whys.total()})" if whys.total() > 1 else ""))
        return "; ".join(told) or "nothing to do"


def loss_text(quality: Quality) -> str:
    """A loss in words."""
    error = f"relative error {quality.error:.2%}" if math.isfinite(quality.error) else "different shapes or NaN"
    if quality.drop is None or quality.interval is None:
        most = f"95% interval to {quality.error_interval[1]:.2%}, " if math.isfinite(quality.error) else ""
        return f"{error} ({most}{quality.samples} samples)"
    low, high = quality.interval
    drop = f"drop {quality.drop:.4f} (95% interval {low:.4f} to {high:.4f}, {quality.samples} samples)"
    return f"{drop}, {error}" if quality.kind == "expected-drop" else drop


def pass_entry(step: Pass, changes: Changes, seconds: float) -> PassEntry:
    """What a pass did, as the ledger shows it."""
    return PassEntry(
        name=step.name,
        options={**step.options(), **changes.resolved},
        changed=[{"where": change.where, "what": change.what} for change in changes.changed],
        left=[{"where": left.where, "why": left.why} for left in changes.left],
        notes=list(changes.notes),
        tables=[dataclasses.asdict(table) for table in changes.tables],
        seconds=seconds,
    )
