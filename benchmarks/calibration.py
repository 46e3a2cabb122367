"""Time and memory of calibration, beside ONNX Runtime's `quantize_static` with the same method and data.

    ONNXCOMP_BENCH=DIR python benchmarks/calibration.py [--task NAME] [--repeats N] [METHOD...]

DIR is that of tasks.py. For each method three commands run in turn, each in a process of its own and on one thread:

- `quantize`: the pass alone, from file to file, calibrated on all samples: what `quantize_static` does.
- `optimize`: the whole command, which also judges the result and makes the report.
- `onnxruntime`: `quantize_static`, QDQ, per channel. Conv, Gemm and MatMul only, as it fails on the mask's infinite
  values otherwise; and with the samples in batches of one size, as it fails on others.

Seconds are medians, memory is the highest seen: of one process, and the sum over the tree of them (what processes share
counts for each).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks import CLI, Usage, print_table, run_measured

METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy", "mse": None, "moving-average": None}
"""Ours -> ONNX Runtime's."""

HEAD = ("method", "program", "seconds", "ratio", "process MB", "tree MB", "of min-max")
MOST_ROWS = 32


def quantize(model: Path, data: Path, output: Path, method: str) -> None:
    """Our pass alone."""
    from onnxcomp import Context, Model
    from onnxcomp.data import input_specs, open_data
    from onnxcomp.runtime import Runtime
    from onnxcomp_passes.quantize import Quantize

    loaded = Model.load(model)
    samples = open_data(data, input_specs(loaded.proto()))
    with Runtime() as runtime, tempfile.TemporaryDirectory() as work:
        context = Context(data=samples, runtime=runtime, workdir=Path(work))
        Quantize(calibration=method, choose=False).rewrite(loaded, context)
    loaded.save(output)


def quantize_static(model: Path, data: Path, output: Path, method: str) -> None:
    """ONNX Runtime's."""
    import onnxruntime
    from onnxruntime import quantization

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc] # has no types
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc] # has no types
        def __init__(self) -> None:
            self.feeds = equal_batches(data)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    onnxruntime.SessionOptions = OneThread
    quantization.quantize_static(
        str(model),
        str(output),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        calibrate_method=quantization.CalibrationMethod[method],
    )


def equal_batches(data: Path) -> Iterator[dict[str, Any]]:
    """The samples in the largest batches of one size."""
    with np.load(data) as file:
        arrays = {name: file[name] for name in file.files}
    count = len(next(iter(arrays.values())))
    rows = next(rows for rows in range(min(MOST_ROWS, count), 0, -1) if count % rows == 0)
    for start in range(0, count, rows):
        yield {name: array[start : start + rows] for name, array in arrays.items()}


def commands(task: Path, output: Path, method: str) -> dict[str, list[str]]:
    """Program -> its command."""
    model, data = str(task / "model.onnx"), str(task / "calib.npz")
    own = [sys.executable, __file__, "--run"]
    options = ["-p", f"quantize:calibration={method},choose=false", "--force", "--no-timing", "--no-resume", "-q"]
    found = {
        "quantize": [*own, "quantize", model, data, str(output), method],
        "optimize": [*CLI, "optimize", model, "--data", data, *options, "-o", str(output)],
    }
    peer = METHODS[method]
    return (
        found if peer is None else {**found, "onnxruntime": [*own, "quantize_static", model, data, str(output), peer]}
    )


def measure(task: Path, method: str, repeats: int) -> dict[str, list[Usage]]:
    """Run a method's programs in turn."""
    usages: dict[str, list[Usage]] = {}
    for _ in range(repeats):
        for program in commands(task, Path("unused"), method):
            with tempfile.TemporaryDirectory() as work:
                command = commands(task, Path(work) / "model.onnx", method)[program]
                usages.setdefault(program, []).append(run_measured(command))
    return usages


def rows(usages: dict[str, dict[str, list[Usage]]]) -> Iterator[Sequence[str]]:
    """The table: `ratio` is seconds over ONNX Runtime's, `of min-max` tree memory over the same program's with it."""
    for method, programs in usages.items():
        peer = programs.get("onnxruntime")
        for program, runs in programs.items():
            ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(runs, peer or [], strict=False)]
            tree = max(usage.tree_bytes for usage in runs)
            base = max((usage.tree_bytes for usage in usages.get("minmax", {}).get(program, [])), default=None)
            yield (
                method,
                program,
                f"{statistics.median(usage.seconds for usage in runs):.2f}",
                f"{statistics.median(ratios):.2f}" if ratios else "",
                f"{max(usage.process_bytes for usage in runs) / 1e6:.0f}",
                f"{tree / 1e6:.0f}",
                f"{tree / base:.2f}" if base else "",
            )


def main() -> int:
    if sys.argv[1:2] == ["--run"]:
        program, model, data, output, method = sys.argv[2:]
        run = {"quantize": quantize, "quantize_static": quantize_static}[program]
        run(Path(model), Path(data), Path(output), method)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"{', '.join(METHODS)}; all by default")
    parser.add_argument("--task", default="paraphrase_minilm_l3", help="the task to take model and data of")
    parser.add_argument("--repeats", type=int, default=3, help="how often each program runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.methods).difference(METHODS):
        parser.error(f"there are the methods {', '.join(METHODS)}, not {', '.join(sorted(unknown))}")
    folder = Path(os.environ.get("ONNXCOMP_BENCH", ""))
    task = folder / "tasks" / arguments.task
    if not os.environ.get("ONNXCOMP_BENCH") or not task.is_dir():
        parser.error(
            f"set ONNXCOMP_BENCH to a folder with tasks/{arguments.task}, as benchmarks/README.md describes it"
        )
    os.environ["OMP_NUM_THREADS"] = "1"
    usages = {}
    for method in arguments.methods or METHODS:
        print(f"running {method}", file=sys.stderr)
        usages[method] = measure(task, method, arguments.repeats)
    print_table(HEAD, rows(usages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
