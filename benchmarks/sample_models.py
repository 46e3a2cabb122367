"""The main job on the models of sample_models/, and the accuracy before and after on 1,000 labelled test images.

    python benchmarks/sample_models.py [--no-data] [NAME...]

Needs nothing besides the installed package. Calibration sees no labels; the test images are seen by `onnxcomp compare`
alone, which also times the two models in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "sample_models"
CLI = (sys.executable, "-c", "from onnxcomp.cli import main; main()")
HEAD = (
    "model",
    "accuracy before",
    "accuracy after",
    "bytes before",
    "bytes after",
    "size",
    "speed",
    "MACs in int8",
    "seconds",
)


def run_model(path: Path, *, data: bool) -> list[str]:
    """Optimize a model, compare it with the original, and return a row of the table."""
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "model.onnx"
        given = ["--data", str(FOLDER / "fashion_calib.npz")] if data else []
        started = time.monotonic()
        _run("optimize", str(path), *given, "-o", str(output), "--no-resume", "-q")
        seconds = time.monotonic() - started
        test = ["--data", str(FOLDER / "fashion_test.npz"), "--metric", "top1", "--json", "-"]
        found: dict[str, Any] = json.loads(_run("compare", str(path), str(output), *test))
        sizes = path.stat().st_size, output.stat().st_size
    [one] = found["candidates"]
    before, after = found["before"], one["after"]
    return [
        path.stem,
        f"{before['metric']:.4f}",
        f"{after['metric']:.4f}",
        f"{sizes[0]:,}",
        f"{sizes[1]:,}",
        f"{sizes[0] / sizes[1]:.2f}",
        f"{one['speed']:.2f}",
        f"{after['int8_macs'] / after['macs']:.0%}",
        f"{seconds:.1f}",
    ]


def _run(*arguments: str) -> str:
    return subprocess.run([*CLI, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to run, such as fashion_vit; all by default")
    parser.add_argument("--no-data", action="store_true", help="do not give the calibration data to the tool")
    arguments = parser.parse_args()
    models = sorted(FOLDER.glob("*.onnx"))
    models = [path for path in models if not path.name.endswith(".opt.onnx")]
    unknown = set(arguments.names).difference(path.stem for path in models)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(path.stem for path in models)}")
    print("| " + " | ".join(HEAD) + " |")
    print("|" + " --- |" * len(HEAD))
    for path in models:
        if not arguments.names or path.stem in arguments.names:
            print("| " + " | ".join(run_model(path, data=not arguments.no_data)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
