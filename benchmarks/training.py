"""What training on the graph wins back, in accuracy on test images or sentences that it does not see.

    python -m benchmarks.training mobilenet|qat|vit [--data DIR] [--epochs N]

The fashion models are those of sample_models/, trained on with Fashion-MNIST's 60,000 training images, from DIR, and
scored on its 10,000 test images, through ONNX Runtime. Only the answers of the original teach. A part of the training
images is held out, and chooses the weights that are kept. Speed is that of one image on one thread, measured in turn
with the original.

"mobilenet" takes half of the multiply-accumulates out, distils, and quantizes. "qat" trains in 4 bits. "vit" takes a
third of its feed-forward neurons out, quantizes, and trains through the rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks import print_table
from onnxcomp import Context, Model, optimize
from onnxcomp.analysis import mac_counts
from onnxcomp.data import input_specs, open_data
from onnxcomp.passes import Changes, Pass
from onnxcomp.runtime import Runtime
from onnxcomp.train import Loss, Trained, TrainOptions, distill
from onnxcomp_passes import Pack, PruneChannels, Quantize, Simplify
from onnxcomp_passes._channels_groups import find_channels
from onnxcomp_passes._few_bits import quantize_layers
from sample_models.train import DEFAULT_DATA, accuracy, load_split

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "sample_models"
CALIBRATION = SAMPLES / "fashion_calib.npz"

HEAD = ("model", "accuracy", "drop", "MACs", "bytes", "smaller", "faster", "seconds")


@dataclass(frozen=True)
class Fashion:
    """Fashion-MNIST, and a model that was trained on it."""

    name: str
    images: Array
    labels: Array
    test_images: Array
    test_labels: Array

    @staticmethod
    def read(name: str, folder: Path) -> Fashion:
        """The sample model of this name, and the images in a folder."""
        return Fashion(name, *load_split(folder, "train"), *load_split(folder, "t10k"))

    @property
    def path(self) -> Path:
        """The model's file."""
        return SAMPLES / f"{self.name}.onnx"

    def score(self, model: Model | Path) -> float:
        """Accuracy on all test images."""
        if isinstance(model, Path):
            return accuracy(model, self.test_images, self.test_labels)
        with tempfile.TemporaryDirectory() as folder:
            path = saved(model, Path(folder))
            return accuracy(path, self.test_images, self.test_labels)

    def distil(self, student: Model | Path, *, labels: bool = False, loss: Loss | None = None, **how: Any) -> Trained:
        """Train a student on all training images."""
        data = {"image": self.images, **({"label": self.labels} if labels else {})}
        pruning = how.pop("pruning", None)
        scales = how.pop("learn_scales", False)
        return distill(
            self.path, student, data, loss=loss or Loss(temperature=4.0, alpha=0.5), options=TrainOptions(**how),
            pruning=pruning, learn_scales=scales, progress=tell,
        )  # fmt: skip

    def compressed(self, model: Model | Path, *passes: Pass) -> Model:
        """A model after passes that are given calibration images."""
        return optimize(model, data=CALIBRATION, passes=passes, force=True, resume=False).model


def tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def saved(model: Model, folder: Path, name: str = "model.onnx") -> Path:
    copy = model.fork()
    copy.path = None
    copy.save(folder / name)
    return folder / name


def row(fashion: Fashion, label: str, model: Model, started: float) -> list[str]:
    """Accuracy, size and speed of a model beside the original's; speed is measured in turn, with one thread."""
    shapes = {"image": [1, 1, 28, 28]}
    original = Model.load(fashion.path)
    with tempfile.TemporaryDirectory() as folder, Runtime() as runtime:
        path = saved(model, Path(folder))
        feed = {"image": fashion.test_images[:1]}
        one, other = runtime.time([fashion.path, path], feed, min_rounds=500, max_rounds=5000, seconds=5)
        size = path.stat().st_size
    score, dense = fashion.score(model), fashion.score(fashion.path)
    macs = sum(mac_counts(model, shapes).values()) / sum(mac_counts(original, shapes).values())
    return [
        label,
        f"{score:.4f}",
        f"{dense - score:+.4f}",
        f"{macs:.0%}",
        f"{size:,}",
        f"{fashion.path.stat().st_size / size:.2f}",
        f"{one.median_ms / other.median_ms:.2f}",
        f"{time.monotonic() - started:.0f}",
    ]


def mobilenet(fashion: Fashion, epochs: float | None) -> Iterator[list[str]]:
    """Half of the multiply-accumulates, distilled, then int8."""
    started = time.monotonic()
    pruned = fashion.compressed(fashion.path, Simplify(), PruneChannels(ratio=0.5, round_to=16))
    yield row(fashion, "pruned", pruned, started)
    small = fashion.distil(pruned, epochs=epochs or 6.0, learning_rate=2e-3).model
    yield row(fashion, "pruned, distilled", small, started)
    yield row(fashion, "pruned, distilled, int8", fashion.compressed(small, Quantize()), started)


def qat(fashion: Fashion, epochs: float | None) -> Iterator[list[str]]:
    """Weights of 4 bits, and activations of 8 or 4, before and after training; those of 8 bits packed in the end."""
    started = time.monotonic()
    quantize = Quantize(weight_bits=4, choose=False, remedies=("round-weights",))
    rough = fashion.compressed(fashion.path, Simplify(), quantize)
    yield row(fashion, "W4A8, calibrated", rough, started)
    trained = fashion.distil(rough, epochs=epochs or 4.0, learning_rate=1e-3, learn_scales=True).model
    yield row(fashion, "W4A8, trained", trained, started)
    yield row(fashion, "W4A8, trained, packed", fashion.compressed(trained, Pack()), started)
    started = time.monotonic()
    rough = fashion.compressed(fashion.path, Simplify())
    with Runtime() as runtime, tempfile.TemporaryDirectory() as folder:
        data = open_data(CALIBRATION, input_specs(rough.proto()))
        context = Context(data=data, runtime=runtime, workdir=Path(folder))
        quantize_layers(rough, context, Changes(), weights=4, activations=4)
    yield row(fashion, "W4A4, calibrated", rough, started)
    trained = fashion.distil(rough, epochs=epochs or 8.0, learning_rate=1e-3, learn_scales=True).model
    yield row(fashion, "W4A4, trained", trained, started)


def vit(fashion: Fashion, epochs: float | None) -> Iterator[list[str]]:
    """A third of each block's feed-forward neurons gone, then int8."""
    started = time.monotonic()
    base = fashion.compressed(fashion.path, Simplify())
    groups = {name: units // 3 for name, units in _feed_forward(base).items()}
    pruned = fashion.compressed(base, PruneChannels(removed=tuple(f"{name}={count}" for name, count in groups.items())))
    yield row(fashion, "a third of the FFN gone", pruned, started)
    small = fashion.distil(pruned, epochs=epochs or 8.0, learning_rate=1e-3).model
    yield row(fashion, "distilled", small, started)
    rough = fashion.compressed(small, Quantize(choose=False))
    yield row(fashion, "distilled, int8", rough, started)
    trained = fashion.distil(rough, epochs=(epochs or 8.0) / 2, learning_rate=3e-4, learn_scales=True)
    yield row(fashion, "distilled, int8, trained", trained.model, started)


def _feed_forward(model: Model) -> dict[str, int]:
    """The neurons between the two layers of each block's feed-forward part."""
    return {group.name: group.units for group in find_channels(model).groups if "/mlp/" in group.name}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mobilenet", "qat", "vit"])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of Fashion-MNIST's idx .gz files")
    parser.add_argument("--epochs", type=float, help="instead of each model's own number")
    arguments = parser.parse_args()
    runs = {
        "mobilenet": ("fashion_mobilenet", mobilenet),
        "qat": ("fashion_mobilenet", qat),
        "vit": ("fashion_vit", vit),
    }
    name, run = runs[arguments.what]
    rows = []
    for each in run(Fashion.read(name, arguments.data), arguments.epochs):
        tell(" | ".join(each))
        rows.append(each)
    print_table(HEAD, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
