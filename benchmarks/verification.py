"""The sample models on every layer of `verify`: in float, in int8, pruned and packed.

    python benchmarks/verification.py [--install] [--layers NAME,...] [NAME...]

Needs nothing besides the installed package; with --install the layers install what they lack into the user's cache
folder, once. Each form is made for the target that the layer stands for. A layer "ran" where its outputs are as near to
this machine's CPU provider as `verify` asks for; the columns tell how near, on 32 test images.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnxcomp.verification import LayerResult, verify

FOLDER = Path(__file__).resolve().parent.parent / "sample_models"
CLI = (sys.executable, "-c", "from onnxcomp.cli import main; main()")
SAMPLES = 32

LAYERS = {
    "cpu": "arm64",
    "ort": "arm64",
    "arm64": "arm64",
    "android": "xnnpack",
    "web": "web",
    "x86": "x86",
    "qnn": "qnn",
}
"""Layer -> the target that it stands for."""

FORMS = {
    "float": ["-p", "simplify"],
    "int8": ["-p", "simplify", "-p", "quantize:choose=false", "--force"],
    "pruned": ["-p", "simplify", "-p", "prune:sparsity=0.8", "--force"],
    "packed": [],
}
"""What is made of a model; nothing given is the default recipe, which ends in packing."""

HEAD = ("model", "form", "layer", "status", "to the CPU here", "same class", "nodes by provider", "codes part at")


def run_form(path: Path, form: str, layers: list[str], *, install: bool) -> Iterator[list[str]]:
    """Make a form for each target, verify it, and yield rows of the table."""
    targets = list(dict.fromkeys(LAYERS[name] for name in layers))
    with tempfile.TemporaryDirectory() as work:
        for target in targets:
            made = Path(work) / f"{target}.onnx"
            data = ["--data", str(FOLDER / "fashion_calib.npz")]
            arguments = [str(path), *data, "--target", target, *FORMS[form], "-o", str(made), "--no-resume", "-q"]
            subprocess.run([*CLI, "optimize", *arguments], check=True)
            mine = [name for name in layers if LAYERS[name] == target]
            test = FOLDER / "fashion_test.npz"
            found = verify(path, made, data=test, target=target, layers=mine, install=install, samples=SAMPLES)
            for layer in found.layers:
                if not (layer.name == "cpu" and layer.what == "as it is"):
                    yield [path.stem, form, *_cells(layer)]


def _cells(layer: LayerResult) -> list[str]:
    cpu = layer.versus_cpu
    nodes = [
        f"{provider.removesuffix('ExecutionProvider')} {sum(operators.values())}"
        for provider, operators in layer.nodes.items()
    ]
    parting = [
        f"{node.node}: {node.steps} step{'s' * (node.steps != 1)} in {node.share:.1%}" for node in layer.differing
    ]
    label = f"{layer.name}, {layer.what}" if layer.name == "cpu" else layer.name
    near = "-" if cpu is None else "equal bits" if cpu.equal else _near(cpu.sqnr_db, cpu.max_abs)
    agreement = "-" if cpu is None or cpu.agreement is None else f"{cpu.agreement:.1%}"
    reason = re.sub(r"^\S+\.(onnx|ort): ", "", layer.reason)  # a temporary file
    status = layer.status if layer.status == "ran" else f"{layer.status}: {reason}"
    return [label, status, near, agreement, ", ".join(nodes) or "not told", "; ".join(parting)]


def _near(decibels: float, largest: float) -> str:
    return f"{largest:.2g}" if math.isinf(decibels) else f"{decibels:.0f} dB, at most {largest:.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to run, such as fashion_vit; all by default")
    parser.add_argument("--install", action="store_true", help="install what a layer lacks")
    parser.add_argument("--layers", default="cpu,ort,arm64,android,web", help="layers to run")
    arguments = parser.parse_args()
    layers = arguments.layers.split(",")
    print("| " + " | ".join(HEAD) + " |")
    print("|" + " --- |" * len(HEAD))
    for path in sorted(FOLDER.glob("fashion_???*.onnx")):
        if path.name.endswith(".opt.onnx") or (arguments.names and path.stem not in arguments.names):
            continue
        for form in FORMS:
            for row in run_form(path, form, layers, install=arguments.install):
                print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
