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


def print_training(found: Trained, output: Path, console: Console) -> None:
    """Show how training went, what it gained, and where the model is."""
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
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"before training: {_told(found.before)}", markup=False, soft_wrap=True)
    console.print(f"after training:  {_told(found.after)}", markup=False, soft_wrap=True)
    if not found.kept:
        console.print("the new weights are no better on the held-out samples, so the student stays as it was")
    size = bytes_text(found.model.size_bytes)
    console.print(f"{printable(output)}: {size}, {len(found.changed)} weights changed", markup=False, soft_wrap=True)


def _told(quality: Quality) -> str:
    """A loss against the teacher, on held-out samples, through ONNX Runtime."""
    parts = []
    if quality.drop is not None and quality.interval is not None:
        low, high = quality.interval
        parts.append(f"drop {quality.drop:+.4f} (95% interval {low:+.4f} to {high:+.4f})")
    if quality.agreement is not None:
        parts.append(f"agreement {quality.agreement:.2%}")
    return ", ".join((*parts, f"error {quality.error:.2%}", f"{quality.samples:,} held-out samples"))
