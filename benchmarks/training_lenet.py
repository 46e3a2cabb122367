"""Ever more weights of LeNet-300-100 become zero: in one shot, in one shot and then trained, and along a ramp.

    python -m benchmarks.training_lenet [--data DIR] [--curve-epochs N] [--epochs N]

The model is sample_models/fashion_lenet.onnx; it is trained with Fashion-MNIST's training images, from DIR, and scored
on its 10,000 test images, through ONNX Runtime. First the three curves, without labels, the second and the third with
the same time. Then two models along the ramp: one that learns from the original's answers alone, and one from labels
as well, which is then clustered to 16 values a weight, trained a little more, and packed.

Writes the figures, the curves as a picture and the models to benchmarks/results/. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks import print_table
from benchmarks.training import Fashion, saved, tell
from onnxcomp import Context, Model
from onnxcomp.train import Loss, Pruning
from onnxcomp_passes import Cluster, Pack, Prune
from sample_models.train import DEFAULT_DATA

RESULTS = Path(__file__).resolve().parent / "results"
CURVES_HEAD = ("zeros", "one shot", "one shot, then trained", "ramp")
HEAD = ("model", "accuracy", "drop", "fewer weights", "bytes", "smaller", "seconds")

SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
RATE = 2e-3
SETTINGS: dict[str, Any] = {"learning_rate": RATE, "ema": 0.999, "held_out": 0.02}
ALONE, LABELLED, PACKED = "original's answers alone", "labels too", "the same, clustered and packed"


def curves(fashion: Fashion, epochs: float) -> Iterator[list[str]]:
    """Accuracy against sparsity."""
    original = Model.load(fashion.path)
    for sparsity in SPARSITIES:
        shot = original.fork()
        Prune(sparsity=sparsity, criterion="magnitude", keep_ends="false", min_elements=1).rewrite(shot, Context())
        scores = [fashion.score(shot)]
        for how in ("once", "gradual"):
            pruning = Pruning(sparsity=sparsity, how=how)
            found = fashion.distil(original, epochs=epochs, learning_rate=RATE, pruning=pruning)
            scores.append(fashion.score(found.model))
        row = [f"{sparsity:.0%}", *(f"{score:.4f}" for score in scores)]
        tell(" | ".join(row))
        yield row


def plot(rows: Sequence[Sequence[str]], dense: float, path: Path) -> None:
    """The three curves, as a picture."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    zeros = [float(row[0].rstrip("%")) for row in rows]
    for column, (label, style) in enumerate(zip(CURVES_HEAD[1:], ("o:", "s--", "^-"), strict=True), start=1):
        axes.plot(zeros, [float(row[column]) for row in rows], style, label=label)
    axes.axhline(dense, color="gray", linewidth=1, label=f"dense: {dense:.4f}")
    axes.set(xlabel="weights that are zero, %", ylabel="accuracy on 10,000 test images", title="fashion_lenet")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def sparse(fashion: Fashion, epochs: float, sparsity: float, *, labels: bool) -> Model:
    """A model with zeros that were made along the ramp."""
    if labels:
        how: dict[str, Any] = {"loss": Loss(temperature=2.0, alpha=0.5), "pruning": Pruning(sparsity=sparsity, end=0.5)}
    else:
        how = {"loss": Loss(temperature=4.0), "pruning": Pruning(sparsity=sparsity, end=0.7), "weight_decay": 0.05}
    return fashion.distil(fashion.path, labels=labels, epochs=epochs, **how, **SETTINGS).model


def packed(fashion: Fashion, model: Model, epochs: float) -> Model:
    """The same with 16 values in each weight, which learn, in as few bytes as decoding at load allows."""
    few = model.fork()
    Cluster(bits=4).rewrite(few, Context())
    loss = Loss(temperature=2.0, alpha=0.5)
    trained = fashion.distil(few, labels=True, loss=loss, epochs=epochs, **SETTINGS).model
    Pack().rewrite(trained, Context())
    return trained


def figures(fashion: Fashion, model: Model, sparse_form: Model) -> dict[str, float]:
    """What a model scores, how many times fewer weights it has, and its bytes."""
    values = [sparse_form.weight(each.name) for each in sparse_form.constants() if each.dtype == np.float32]
    total, left = sum(each.size for each in values), sum(int(np.count_nonzero(each)) for each in values)
    with tempfile.TemporaryDirectory() as folder:
        size = saved(model, Path(folder)).stat().st_size
    return {"accuracy": fashion.score(model), "compression_rate": total / left, "file_bytes": size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of Fashion-MNIST's idx .gz files")
    parser.add_argument("--curve-epochs", type=float, default=10.0, help="of each point of the curves; 0: no curves")
    parser.add_argument("--epochs", type=float, default=40.0, help="of each of the two models")
    arguments = parser.parse_args()
    fashion = Fashion.read("fashion_lenet", arguments.data)
    dense, original_bytes = fashion.score(fashion.path), fashion.path.stat().st_size
    RESULTS.mkdir(exist_ok=True)
    if arguments.curve_epochs:
        rows = list(curves(fashion, arguments.curve_epochs))
        print_table(CURVES_HEAD, rows)
        plot(rows, dense, RESULTS / "lenet_curves.png")
    started = time.monotonic()
    alone = sparse(fashion, arguments.epochs, 0.9562, labels=False)
    best = sparse(fashion, arguments.epochs, 0.9665, labels=True)
    small = packed(fashion, best, arguments.epochs / 5)
    seconds = f"{time.monotonic() - started:.0f}"
    table, models = [], {}
    for label, model, form in ((ALONE, alone, alone), (LABELLED, best, best), (PACKED, small, best)):
        found = models[label] = figures(fashion, model, form)
        told = (f"{found['accuracy']:.4f}", f"{dense - found['accuracy']:+.4f}", f"{found['compression_rate']:.1f}")
        table.append([label, *told, f"{found['file_bytes']:,}", f"{original_bytes / found['file_bytes']:.1f}", seconds])
    print_table(HEAD, table)
    document = {
        "dense_accuracy": dense,
        "original_file_bytes": original_bytes,
        **models[LABELLED],
        "packed_accuracy": models[PACKED]["accuracy"],
        "packed_file_bytes": models[PACKED]["file_bytes"],
        "models": models,
    }
    (RESULTS / "lenet_distillation.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    saved(best, RESULTS, "lenet_distilled.onnx")
    saved(small, RESULTS, "lenet_distilled_packed.onnx")
    return 0


if __name__ == "__main__":
    sys.exit(main())
