"""How much memory does a model that is larger than memory should allow for need?

Makes a chain of MatMuls with external data (2.6 GB by default) in a temporary folder, simplifies and saves it through
the Python API in a fresh process, and prints that process's largest resident size and its seconds. Needs twice the
model's size on the disk, and removes it afterwards.

    python -m benchmarks.large_model
    python -m benchmarks.large_model --gigabytes 0.6
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["make_large_model", "simplify_in_fresh_process"]

SIZE = 4096
"""A weight is SIZE x SIZE float32, 64 MiB, or smaller where a model has fewer than `LEAST_LAYERS` of them."""

LEAST_LAYERS = 8

WORK = """
import json, resource, sys, time
import onnxcomp_passes.simplify
from onnxcomp.model import Model
from onnxcomp.passes import Context

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

before, started = peak_mb(), time.monotonic()
model = Model.load(sys.argv[1])
changes = onnxcomp_passes.simplify.Simplify().rewrite(model, Context())
model.save(sys.argv[2])
seconds = time.monotonic() - started
what = [change.what for change in changes.changed]
print(json.dumps({"before_mb": before, "peak_mb": peak_mb(), "seconds": seconds, "changes": what}))
"""


def make_large_model(folder: Path, gigabytes: float, layers: int | None = None) -> Path:
    """A chain of MatMuls with a Relu after each, an Identity, a twin of the first weight, and external data."""
    size = int(math.sqrt(gigabytes * 1e9 / (4 * (layers or LEAST_LAYERS))))
    if layers is None:
        size = min(SIZE, size)
        layers = round(gigabytes * 1e9 / (4 * size * size))
    path, data = folder / "large.onnx", folder / "large.onnx.data"
    nodes, weights, source = [], [], "x"
    rng = np.random.default_rng(0)
    with data.open("wb") as file:
        for layer in range(layers):
            weight = TensorProto(name=f"W{layer}", data_type=TensorProto.FLOAT, dims=[size, size])
            weight.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", file.tell()), ("length", 4 * size * size)):
                weight.external_data.add(key=key, value=str(value))
            weights.append(weight)
            if layer == layers - 1:
                rng = np.random.default_rng(0)  # the last weight equals the first
            file.write((rng.standard_normal((size, size), np.float32) * size**-0.5).tobytes())
            nodes.append(helper.make_node("MatMul", [source, weight.name], [f"m{layer}"]))
            nodes.append(helper.make_node("Identity", [f"m{layer}"], [f"i{layer}"]))
            source = "y" if layer == layers - 1 else f"r{layer}"
            nodes.append(helper.make_node("Relu", [f"i{layer}"], [source]))
    interface = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "large", interface[:1], interface[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def simplify_in_fresh_process(path: Path, output: Path) -> dict[str, Any]:
    """Simplify and save in a new process; its memory before and at most, its seconds, and what changed."""
    run = subprocess.run(
        [sys.executable, "-c", WORK, str(path), str(output)], capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.6, help="how large the model's weights are")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make_large_model(Path(folder), arguments.gigabytes)
        output = Path(folder) / "simple.onnx"
        result = simplify_in_fresh_process(path, output)
        sizes = [sum(each.stat().st_size for each in Path(folder).glob(f"{p.name}*")) for p in (path, output)]
        equal = (
            onnx.load(output, load_external_data=False).graph.output
            == onnx.load(path, load_external_data=False).graph.output
        )
    print(f"bytes              {sizes[0]:,} -> {sizes[1]:,}")
    print(f"resident, MB       {result['before_mb']:.0f} with the libraries loaded, at most {result['peak_mb']:.0f}")
    print(f"seconds            {result['seconds']:.1f}")
    print(f"changes            {len(result['changes'])}, outputs {'kept' if equal else 'CHANGED'}")
    print(f"                   {result['changes'][-1]}")


if __name__ == "__main__":
    main()
