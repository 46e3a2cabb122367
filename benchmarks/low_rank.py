"""What thin weights cost and gain, without training: held-out accuracy, output error, bytes and time.

    python -m benchmarks.low_rank pair
    python -m benchmarks.low_rank large
    python -m benchmarks.low_rank models [NAME...] [-p SPEC] [--force]
    ONNXCOMP_BENCH=DIR python -m benchmarks.low_rank layers NAME [--ranks R...] [--include PATTERN...]

"pair" times a product with a 1000 x 1000 weight against one with its factors of rank 100, in turn, with one thread.

"large" puts a model with a 4096 x 16384 weight through `low-rank:rank=512` in a process of its own, from file to file:
its seconds and peak memory, and its error over that of the exact truncation. The weight is random, with singular values
that fall as trained ones do.

"models" runs `onnxcomp optimize -p simplify -p SPEC` (by default `low-rank` within the default budget; with an amount
add --force) on sample models and tasks, NAME as pruning.py takes it, and evaluates on the test data that the tool does
not see.

"layers" factors the layers that --include names at one rank, by plain SVD, by SVD whitened with what the layers before
give (`refit=false`), and fitted to what the original gives as well. It prints the error of each layer's output on test
data in the factored model, against the same layer's output in the original; last the drop of the metric with the 95%
interval of plain minus each, by 1,000 paired resamples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.pruning import Metric, Task, find_tasks, interval
from benchmarks.tasks import CLI, print_table
from onnxcomp import Context, Model
from onnxcomp.data import input_specs, open_data
from onnxcomp.runtime import Runtime
from onnxcomp_passes._views import find_views
from onnxcomp_passes.low_rank import LowRank
from onnxcomp_passes.simplify import Simplify

Array = np.ndarray[Any, Any]

PAIR_HEAD = ("batch", "weights", "fewer", "dense, ms", "factors, ms", "faster")
LARGE_HEAD = ("weight", "rank", "seconds", "peak MB", "error", "exact", "ratio")
MODELS_HEAD = ("model", "drop", "95% interval", "size", "weights", "MACs", "speed", "layers", "seconds", "verdict")
LAYERS_HEAD = ("rank", "layer", "plain SVD", "whitened", "fitted")
WAYS: dict[str, dict[str, Any]] = {
    "plain SVD": {"whiten": False},
    "whitened": {"refit": False},
    "fitted": {},
}

LARGE = """
import sys, time
from onnxcomp import Context, Model
from onnxcomp_passes import LowRank

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

started = time.monotonic()
model = Model.load(sys.argv[1])
LowRank(rank=int(sys.argv[2])).rewrite(model, Context())
model.save(sys.argv[3])
print(time.monotonic() - started, peak_mb())
"""


# --- one layer --------------------------------------------------------------------------------------------------------


def _product(weight: Array) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "W"], ["y"], name="product")
    sides = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in zip("xy", weight.shape, strict=True)]
    graph = helper.make_graph([node], "pair", sides[:1], sides[1:], [numpy_helper.from_array(weight, "W")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pair() -> Iterator[list[str]]:
    """The rows for a 1000 x 1000 weight."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((1000, 1000)).astype(np.float32) / np.float32(np.sqrt(1000))
    with Runtime() as runtime, tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "dense.onnx", Path(folder) / "thin.onnx"]
        dense, thin = Model.load(_product(weight)), Model.load(_product(weight))
        LowRank(rank=100).rewrite(thin, Context())
        for model, path in zip((dense, thin), paths, strict=True):
            model.save(path)
        left = sum(int(np.prod(tensor.shape)) for tensor in thin.constants())
        for batch in (1, 32):
            feed = {"x": rng.standard_normal((batch, 1000)).astype(np.float32)}
            one, other = runtime.time(paths, feed, min_rounds=300, max_rounds=3000, seconds=3)
            speed = one.median_ms / other.median_ms
            times = (f"{one.median_ms:.4f}", f"{other.median_ms:.4f}", f"{speed:.2f}")
            yield [str(batch), f"{left:,} of {weight.size:,}", f"{1 - left / weight.size:.0%}", *times]


def large() -> Iterator[list[str]]:
    """The row for a 4096 x 16384 weight."""
    rng = np.random.default_rng(0)
    rows, columns, rank, inner = 4096, 16384, 512, 1024
    strengths = np.arange(1, inner + 1, dtype=np.float32) ** np.float32(-0.7)
    weight = (rng.standard_normal((rows, inner), np.float32) * strengths) @ rng.standard_normal((inner, columns), "f4")
    weight += np.float32(0.1) * rng.standard_normal((rows, columns), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "dense.onnx", Path(folder) / "thin.onnx"
        Model.load(_product(weight)).save(paths[0], external_data=True)
        command = [sys.executable, "-c", LARGE, str(paths[0]), str(rank), str(paths[1])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        thin = Model.load(paths[1])
        first, second = (thin.weight(tensor.name) for node in thin.graph.nodes for tensor in node.inputs[1:])
    seconds, peak = map(float, done.stdout.split())
    error = float(np.linalg.norm(weight - first @ second))
    values = np.linalg.eigvalsh(weight @ weight.T)
    exact = float(np.sqrt(np.maximum(values[:-rank], 0).sum()))
    told = (f"{seconds:.1f}", f"{peak:.0f}", f"{error:.2f}", f"{exact:.2f}", f"{error / exact:.4f}")
    yield [f"{rows} x {columns}", str(rank), *told]


# --- whole models -----------------------------------------------------------------------------------------------------


def models(task: Task, spec: str, *, force: bool) -> list[str]:
    """The row for one model."""
    with Runtime() as runtime, tempfile.TemporaryDirectory() as folder:
        output, report = Path(folder) / "model.onnx", Path(folder) / "report.json"
        data = ["--data", str(task.calibration), "-o", str(output), "--json", str(report), "--no-resume", "-q"]
        command = [*CLI, "optimize", str(task.model), "-p", "simplify", "-p", spec, *data, *["--force"] * force]
        subprocess.run(command, check=True, capture_output=True)
        told = json.loads(report.read_text())
        before, after = task.measure(runtime, task.model), task.measure(runtime, output)
        with np.load(task.test) as file:
            everything = np.arange(len(file["label"]))
        low, high = interval(before, after, len(everything))
        feed = next(iter(open_data(task.calibration, input_specs(Model.load(task.model).proto())).batches(1))).inputs
        one, other = runtime.time([task.model, output], feed, min_rounds=100, max_rounds=3000, seconds=3)
        stage = told["stages"][-1]
        factored = sum(len(step["changed"]) for step in stage["attempts"][-1]["passes"])
        whole, left = told["before"], told["after"]
        return [
            task.name,
            f"{before(everything) - after(everything):+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            f"{task.model.stat().st_size / output.stat().st_size:.2f}",
            f"{1 - left['parameters'] / whole['parameters']:.1%} fewer",
            f"{1 - left['macs'] / whole['macs']:.1%} fewer",
            f"{one.median_ms / other.median_ms:.2f}",
            str(factored if stage["verdict"] in {"kept", "forced"} else 0),
            f"{told['seconds']:.1f}",
            stage["verdict"],
        ]


# --- layer by layer ---------------------------------------------------------------------------------------------------


def layers(task: Task, ranks: Sequence[int], include: tuple[str, ...]) -> Iterator[list[str]]:
    """The rows for one task."""
    with Runtime() as runtime, tempfile.TemporaryDirectory() as folder:
        original = Model.load(task.model)
        Simplify().rewrite(original, Context())
        data = open_data(task.calibration, input_specs(original.proto()))
        context = Context(data=data, runtime=runtime, workdir=Path(folder))
        path = Path(folder) / "model.onnx"
        with np.load(task.test) as file:
            everything = np.arange(len(file["label"]))
        before = task.measure(runtime, task.model)
        for rank in ranks:
            errors: dict[str, dict[str, float]] = {}
            metrics: dict[str, Metric] = {}
            for way, options in WAYS.items():
                model = original.fork()
                LowRank(rank=rank, include=include, **options).rewrite(model, context)
                model.save(path)
                metrics[way] = task.measure(runtime, path)
                errors[way] = _output_errors(task, runtime, original, model, path)
            for layer in errors["plain SVD"]:
                yield [str(rank), layer, *(f"{errors[way][layer]:.4f}" for way in WAYS)]
            yield [
                str(rank),
                "drop of the metric",
                *(f"{before(everything) - metrics[w](everything):+.4f}" for w in WAYS),
            ]
            gains = (interval(metrics[way], metrics["plain SVD"], len(everything)) for way in list(WAYS)[1:])
            yield [str(rank), "gain, 95% interval", "", *(f"{low:+.4f} to {high:+.4f}" for low, high in gains)]


def _output_errors(task: Task, runtime: Runtime, original: Model, model: Model, path: Path) -> dict[str, float]:
    """The error of each layer's output on test data, by weight; where a bias is added, behind it."""
    weights = {tensor.name for tensor in model.constants()}
    wanted = {}
    for view in find_views(original):
        if view.name not in weights:
            output = view.node.outputs[0]
            added = [reader for reader in output.outputs if reader.op == "Add" and view.node.op == "MatMul"]
            wanted[view.name] = str((added[0] if added else view.node).outputs[0].name)
    feeds, runs = _test_feeds(task, original), []
    for each in (original, model):
        shown = each.fork()
        tensors = shown.graph.tensors()
        shown.graph.outputs = [tensors[name] for name in wanted.values()]
        for tensor in shown.graph.outputs:
            tensor.dtype = np.float32
        shown.save(path)
        runs.append(list(runtime.run(path, feeds)))
    squares = [
        [
            (np.square(one - other, dtype=np.float64).sum(), np.square(one, dtype=np.float64).sum())
            for one, other in both
        ]
        for both in (zip(*pair, strict=True) for pair in zip(*runs, strict=True))
    ]
    errors, energies = np.moveaxis(np.array(squares), 2, 0).sum(axis=1)
    return dict(zip(wanted, np.sqrt(errors / energies).tolist(), strict=True))


def _test_feeds(task: Task, model: Model) -> list[dict[str, Array]]:
    """Some of the test data, as the model takes them."""
    names = [spec.name for spec in input_specs(model.proto())]
    with np.load(task.test) as file:
        keys = [name if name in file.files else f"{name}.a" for name in names]
        arrays = {name: file[key][:200] for name, key in zip(names, keys, strict=True)}
    count = len(arrays[names[0]])
    return [{name: array[at : at + 10] for name, array in arrays.items()} for at in range(0, count, 10)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pair", "large", "models", "layers"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="models and tasks to run")
    parser.add_argument(
        "-p", "--pass", dest="spec", default="low-rank", metavar="SPEC", help="the pass and its options"
    )
    parser.add_argument("--force", action="store_true", help="keep the result whatever it costs")
    parser.add_argument("--ranks", type=int, nargs="+", default=(215,))
    parser.add_argument("--include", nargs="+", default=(), metavar="PATTERN", help="names of weights or nodes")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.what in {"pair", "large"}:
        head, rows = (PAIR_HEAD, pair()) if given.what == "pair" else (LARGE_HEAD, large())
        print_table(head, rows)
        return 0
    bench = os.environ.get("ONNXCOMP_BENCH")
    tasks = find_tasks(Path(bench) if bench else None)
    if unknown := set(given.names).difference(tasks):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(tasks)}")
    chosen = [tasks[name] for name in given.names or tasks]
    if given.what == "models":
        print_table(MODELS_HEAD, (models(task, given.spec, force=given.force) for task in chosen))
    else:
        print_table(LAYERS_HEAD, (row for task in chosen for row in layers(task, given.ranks, tuple(given.include))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
