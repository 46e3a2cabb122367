"""How cost grows with a model: seconds against nodes for every pass, and against bytes for a whole run.

    python -m benchmarks.scale nodes [--counts 10,100,1000,5000,20000] [--passes NAME,...]
    python -m benchmarks.scale bytes [--gigabytes 0.001,0.01,0.1,1,2.6,8] [--layers 119]
    python -m benchmarks.scale plot

`nodes` times passes on chains of residual blocks (MatMul, Add, Relu, Add), in a process of its own each, without a
judge: what is timed is the rewrite. `bytes` runs `onnxcomp optimize` with default settings and no data on a chain of
MatMul with external data, of which only the rewriting process's peak memory is told: running a model takes what the
model takes. Needs four times the largest size on the disk. The figures go to results/scale.json, from which `plot`
draws results/scale.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.large_model import SIZE, make_large_model

__all__ = ["chain"]

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH = 16
NODES_IN_BLOCK = 4
PASSES = (
    "simplify", "quantize-weights", "quantize:choose=false", "quantize-dynamic", "float16", "prune:sparsity=0.5",
    "prune-channels:ratio=0.25", "cluster:bits=4", "pack", "unpack", "low-rank:ratio=1.5", "fit-target",
)  # fmt: skip

TIME_PASS = """
import json, sys, tempfile, time
from pathlib import Path
import numpy as np
import onnx
from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.recipe import parse_pass
from onnxcomp.runtime import Runtime
from onnxcomp.targets import host_target
path, text = sys.argv[1:]
started = time.monotonic()
model = Model.load(path)
load = time.monotonic() - started
samples = {"x": np.random.default_rng(1).standard_normal((32, model.graph.inputs[0].shape[1])).astype(np.float32)}
with Runtime() as runtime, tempfile.TemporaryDirectory() as folder:
    runtime.check(Path(path))  # ONNX Runtime's own time to load it is not the pass's
    data = open_data(samples, input_specs(model.proto()))
    context = Context(data=data, runtime=runtime, workdir=Path(folder), target=host_target())
    step = parse_pass(text)
    started = time.monotonic()
    changes = step.rewrite(model, context)
    seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "changed": changes.count, "load": load}))
"""


def chain(nodes: int) -> onnx.ModelProto:
    """Residual blocks of a MatMul, two Add and a Relu."""
    rng = np.random.default_rng(0)
    made, weights, source = [], [], "x"
    blocks = max(1, nodes // NODES_IN_BLOCK)
    for block in range(blocks):  # what each adds is the smaller the more there are, or else the sum overflows
        matrix = (rng.standard_normal((WIDTH, WIDTH)) * WIDTH**-0.5 / blocks).astype(np.float32)
        bias = (rng.standard_normal(WIDTH) * 0.01 / blocks).astype(np.float32)
        weights += [numpy_helper.from_array(matrix, f"w{block}"), numpy_helper.from_array(bias, f"b{block}")]
        made += [
            helper.make_node("MatMul", [source, f"w{block}"], [f"m{block}"], name=f"matmul{block}"),
            helper.make_node("Add", [f"m{block}", f"b{block}"], [f"a{block}"], name=f"bias{block}"),
            helper.make_node("Relu", [f"a{block}"], [f"r{block}"], name=f"relu{block}"),
            helper.make_node("Add", [source, f"r{block}"], [f"s{block}"], name=f"add{block}"),
        ]
        source = f"s{block}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", WIDTH]) for name in ("x", source)]
    graph = helper.make_graph(made, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def time_nodes(counts: list[int], passes: list[str]) -> dict[str, dict[str, float]]:
    """Seconds of each pass by number of nodes; a row of the table is printed as it is known."""
    found: dict[str, dict[str, float]] = {}
    print("| pass | " + " | ".join(f"{count:,}" for count in counts) + " | last two, seconds by nodes |")
    print("|" + " --- |" * (len(counts) + 2))
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            onnx.save(chain(count), Path(folder) / f"{count}.onnx")
        for text in passes:
            seconds = {}
            for count in counts:
                command = [sys.executable, "-c", TIME_PASS, str(Path(folder) / f"{count}.onnx"), text]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds[str(count)] = float(json.loads(done.stdout)["seconds"])
            found[text] = seconds
            last = [seconds[str(count)] for count in counts[-2:]]
            growth = (last[1] / last[0]) / (counts[-1] / counts[-2]) if len(counts) > 1 else 1.0
            cells = [f"{seconds[str(count)]:.2f}" for count in counts]
            print(f"| {text} | " + " | ".join(cells) + f" | {growth:.2f} |", flush=True)
    return found


def time_bytes(gigabytes: list[float], layers: int | None) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of a whole run by size; of so many layers, or of more the larger it is."""
    found: dict[str, dict[str, float]] = {}
    print("| GB | seconds | seconds a GB | peak MB of the rewriting process | allowed | kept | times smaller |")
    print("|" + " --- |" * 7)
    for size in gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = make_large_model(Path(folder), size, layers)
            real = sum(each.stat().st_size for each in path.parent.glob("large.onnx*")) / 1e9
            output = Path(folder) / "small.onnx"
            started = time.monotonic()
            peak = _peak_of_run(path, output)
            seconds = time.monotonic() - started
            report = json.loads(output.with_suffix(".json").read_text())
        allowed = 2.5 * 4 * SIZE * SIZE / 1e6 + 500
        kept = ", ".join(stage["name"] for stage in report["stages"] if stage["verdict"] == "kept")
        smaller = report["before"]["size_bytes"] / report["after"]["size_bytes"]
        found[f"{real:.3f}"] = {"seconds": seconds, "peak_mb": peak}
        cells = (
            f"{real:.3f} | {seconds:.1f} | {seconds / real:.1f} | {peak:.0f} | {allowed:.0f} | {kept} | {smaller:.2f}"
        )
        print(f"| {cells} |", flush=True)
    return found


def _peak_of_run(path: Path, output: Path) -> float:
    """The largest resident size in MB of the process that rewrites, its worker not counted."""
    code = (
        "import sys, resource\nfrom onnxcomp.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    options = ["-q", "--no-resume", "--no-timing", "--json", str(output.with_suffix(".json"))]
    command = [sys.executable, "-c", code, "optimize", str(path), "-o", str(output), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
    return int(done.stderr.strip().splitlines()[-1]) / 1e3


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw seconds against nodes and against bytes, both on logarithmic axes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, seconds in results.get("nodes", {}).items():
        axes[0].loglog([int(count) for count in seconds], list(seconds.values()), marker="o", label=name)
    axes[0].set(xlabel="nodes", ylabel="seconds", title="A pass against nodes")
    axes[0].legend(fontsize=7)
    for key in (key for key in results if key.startswith("bytes")):
        sizes = results[key]
        label = key.removeprefix("bytes of ") if key != "bytes" else "8 layers, or of 67 MB each"
        axes[1].loglog([float(size) for size in sizes], [one["seconds"] for one in sizes.values()], "o-", label=label)
    axes[1].legend(fontsize=7)
    axes[1].set(xlabel="GB", ylabel="seconds", title="A whole run against bytes")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nodes", "bytes", "plot"])
    parser.add_argument("--counts", default="10,100,1000,5000,20000", help="numbers of nodes")
    parser.add_argument("--passes", default=",".join(PASSES), help="passes to time")
    parser.add_argument("--gigabytes", default="0.001,0.01,0.1,1,2.6,8", help="sizes of weights")
    parser.add_argument("--layers", type=int, help="layers of each of these sizes; else more the larger it is")
    arguments = parser.parse_args()
    written = RESULTS / "scale.json"
    results = json.loads(written.read_text()) if written.exists() else {}
    if arguments.what == "nodes":
        counts = [int(count) for count in arguments.counts.split(",")]
        results.setdefault("nodes", {}).update(time_nodes(counts, arguments.passes.split(",")))
    elif arguments.what == "bytes":
        sizes = [float(size) for size in arguments.gigabytes.split(",")]
        key = f"bytes of {arguments.layers} layers" if arguments.layers else "bytes"
        results.setdefault(key, {}).update(time_bytes(sizes, arguments.layers))
    else:
        plot(results, RESULTS / "scale.png")
        return 0
    written.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
