"""What weights set to zero cost, without training: accuracy on held-out test data against sparsity, by criterion.

    python -m benchmarks.pruning [NAME...] [--sparsity SHARE...]
    ONNXCOMP_BENCH=DIR python -m benchmarks.pruning ic01_resnet8 kws01_dscnn

NAME is a model of sample_models/ or, with ONNXCOMP_BENCH, a task in the folder that tasks.py takes, if it has class
labels or pairs of sentences; all by default. Weights are pruned in float32 by `prune` alone behind `simplify`, with the
calibration data and no labels; figures are of the test data, which nothing else sees.

Columns are drops of the metric: by magnitude with the same share of each weight, and with one threshold over all
weights; by magnitude times the norm of the input (wanda) and by second order with compensation (obs), with one
threshold too. "obs gains" is the metric by second order less that by magnitude with one threshold, with the 95%
interval of 1,000 paired resamples of the test data. Seconds are those of `prune` by second order, data included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks import print_table
from onnxcomp import Context, Model
from onnxcomp.data import input_specs, open_data
from onnxcomp.runtime import Runtime
from onnxcomp_passes.prune import Prune
from onnxcomp_passes.simplify import Simplify

Array = np.ndarray[Any, Any]
Metric = Callable[[Array], float]
"""The metric of the test samples with these numbers."""

SAMPLES = Path(__file__).resolve().parent.parent / "sample_models"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PATTERN = "2:4"
CRITERIA = {
    "magnitude, each": ("magnitude", "layer"),
    "magnitude, all": ("magnitude", "global"),
    "wanda": ("wanda", "global"),
    "obs": ("obs", "global"),
}
"""Column -> criterion and scope."""
HEAD = ("model", "sparsity", "metric", *CRITERIA, "obs gains", "95% interval", "seconds")
BATCH = 50
RESAMPLES = 1000


@dataclass(frozen=True)
class Task:
    """A model with its data.

    Attributes:
        name: What the table calls it.
        model: The float model.
        calibration: Inputs without labels.
        test: Inputs with labels.
        metric: "top1", "spearman_pairs", or "auc_reconstruction": of the difference between output and input, in the
            mean over the windows of a clip.
        output: Which output of the model that is about.
    """

    name: str
    model: Path
    calibration: Path
    test: Path
    metric: str = "top1"
    output: int = 0

    def measure(self, runtime: Runtime, path: Path) -> Metric:
        """Run a model on the test data."""
        with np.load(self.test) as file:
            arrays = {name: file[name] for name in file.files}
        inputs = [spec.name for spec in input_specs(Model.load(path).proto())]
        if self.metric == "top1":
            classes = self._outputs(runtime, path, {name: arrays[name] for name in inputs}).argmax(1)
            right = classes == arrays["label"]
            return lambda chosen: float(right[chosen].mean())
        if self.metric == "auc_reconstruction":
            windows = arrays[inputs[0]]
            errors = np.square(windows - self._outputs(runtime, path, {inputs[0]: windows})).mean(axis=1)
            clips = np.bincount(arrays["clip"], errors) / np.bincount(arrays["clip"])
            return lambda chosen: _auc(clips[chosen], arrays["label"][chosen])
        sides = []
        for side in (".a", ".b"):
            hidden = self._outputs(runtime, path, {name: arrays[name + side] for name in inputs})
            mask = arrays["attention_mask" + side][..., None].astype(np.float32)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            sides.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        cosines = (sides[0] * sides[1]).sum(1)
        return lambda chosen: _spearman(cosines[chosen], arrays["label"][chosen])

    def _outputs(self, runtime: Runtime, path: Path, arrays: dict[str, Array]) -> Array:
        count = len(next(iter(arrays.values())))
        feeds = [{name: a[start : start + BATCH] for name, a in arrays.items()} for start in range(0, count, BATCH)]
        return np.concatenate([run[self.output] for run in runtime.run(path, feeds)])


def _spearman(one: Array, other: Array) -> float:
    ranks = [np.unique(values, return_inverse=True, return_counts=True)[1:] for values in (one, other)]
    means = [(np.cumsum(counts) - (counts - 1) / 2)[places] for places, counts in ranks]  # ties: their mean rank
    one, other = (mean - mean.mean() for mean in means)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def _auc(scores: Array, labels: Array) -> float:
    """The chance that a clip with label 1 has a larger score than one with label 0; ties count half."""
    one, other = scores[labels == 1][:, None], scores[labels == 0][None]
    return float(np.mean((one > other) + 0.5 * (one == other)))


def find_tasks(bench: Path | None) -> dict[str, Task]:
    """The tasks by name: sample models, and those of the folder."""
    calibration, test = (SAMPLES / f"fashion_{kind}.npz" for kind in ("calib", "test"))
    paths = sorted(path for path in SAMPLES.glob("*.onnx") if not path.name.endswith(".opt.onnx"))
    found = {path.stem: Task(path.stem, path, calibration, test) for path in paths}
    for folder in sorted(bench.glob("tasks/*")) if bench else []:
        told = json.loads((folder / "task.json").read_text())
        if told["metric"] in {"top1", "spearman_pairs", "auc_reconstruction"}:
            name = f"{folder.name} (task)" if folder.name in found else folder.name
            model, calibration, test = (folder / file for file in ("model.onnx", "calib.npz", "test.npz"))
            found[name] = Task(name, model, calibration, test, told["metric"], told.get("output", 0))
    return found


def rows(task: Task, sparsities: Sequence[float]) -> Iterator[list[str]]:
    """The rows of the table for one task."""
    with Runtime() as runtime, tempfile.TemporaryDirectory() as folder:
        original = Model.load(task.model)
        Simplify().rewrite(original, Context())
        data = open_data(task.calibration, input_specs(original.proto()))
        context = Context(data=data, runtime=runtime, workdir=Path(folder))
        path = Path(folder) / "model.onnx"
        with np.load(task.test) as file:
            everything = np.arange(len(file["label"]))
        before = task.measure(runtime, task.model)(everything)
        amounts: list[float | str] = [*sparsities, PATTERN]
        for amount in amounts:
            pattern = amount if isinstance(amount, str) else ""
            sparsity = 0.0 if isinstance(amount, str) else amount
            metrics: dict[str, Metric] = {}
            for name, (criterion, scope) in CRITERIA.items():
                model, started = original.fork(), time.monotonic()
                Prune(criterion=criterion, scope=scope, pattern=pattern, sparsity=sparsity).rewrite(model, context)
                seconds = time.monotonic() - started
                model.save(path)
                metrics[name] = task.measure(runtime, path)
            low, high = interval(metrics["obs"], metrics["magnitude, all"], len(everything))
            values = {name: metric(everything) for name, metric in metrics.items()}
            yield [
                task.name,
                amount if isinstance(amount, str) else f"{amount:.0%}",
                f"{before:.4f}",
                *(f"{before - value:+.4f}" for value in values.values()),
                f"{values['obs'] - values['magnitude, all']:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{seconds:.1f}",
            ]


def interval(one: Metric, other: Metric, count: int) -> tuple[float, float]:
    """The 95% interval of the difference of two models' metrics on the same samples, by bootstrap."""
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, count, count)
        differences.append(one(chosen) - other(chosen))
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models and tasks to run")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES, help="shares of zeros")
    arguments = parser.parse_args()
    bench = os.environ.get("ONNXCOMP_BENCH")
    tasks = find_tasks(Path(bench) if bench else None)
    if unknown := set(arguments.names).difference(tasks):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(tasks)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    print_table(HEAD, (row for name in arguments.names or tasks for row in rows(tasks[name], arguments.sparsity)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
