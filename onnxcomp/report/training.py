"""What `distill` prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.report.plain import plain_columns
from onnxcomp.report.text import bytes_text, duration_text, printable

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.quality import Quality
    from onnxcomp.train import Trained

__all__ = ["print_training"]


def print_training(found: Trained, student: Path, output: Path, console: Console) -> None:
    """Show how training went, what it gained, and where the model is."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    gained = (
        f"{len(found.changed):,} weights trained" if found.kept else "training made it no better, it stays as it was"
    )
    say(f"{printable(student)} -> {printable(output)}: {gained}, {bytes_text(found.model.size_bytes)}")
    say(f"before: {_told(found.before)}")
    say(f"after:  {_told(found.after)}")
    say("")
    head = ("step", "loss", "drop", "error", "agreement", "zeros", "time")
    rows = [
        (
            f"{each.step:,}",
            f"{each.loss:.4g}" if math.isfinite(each.loss) else "",
            "" if each.drop is None else f"{each.drop:+.4f}",
            f"{each.error:.2%}",
            "" if each.agreement is None else f"{each.agreement:.2%}",
            f"{each.sparsity:.1%}",
            duration_text(each.seconds),
        )
        for each in found.history.evaluations
    ]
    for line in plain_columns([head, *rows]):
        say(line)
    if found.history.resumed_at:
        say(f"note: went on from step {found.history.resumed_at:,} of an interrupted run")


def _told(quality: Quality) -> str:
    """A loss against the teacher, on held-out samples, through ONNX Runtime."""
    parts = []
    if quality.drop is not None and quality.interval is not None:
        low, high = quality.interval
        parts.append(f"drop {quality.drop:+.4f} (95% interval {low:+.4f} to {high:+.4f})")
    if quality.agreement is not None:
        parts.append(f"agreement {quality.agreement:.2%}")
    return ", ".join((*parts, f"relative error {quality.error:.2%}", f"{quality.samples:,} held-out samples"))
