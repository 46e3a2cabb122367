"""How fast, and in how much memory, are the weights of a large transformer stored in 4 bits?

Makes a decoder-only transformer with external data (6 GB by default) in a temporary folder. A fresh process runs
`quantize-weights:bits=4,block=32,form=compute` over it through the Python API and saves it; another loads the result in
ONNX Runtime and runs a few tokens. Needs 1.4 times the model's size on the disk, and removes it afterwards.

    python -m benchmarks.weight_only
    python -m benchmarks.weight_only --gigabytes 0.6
    python -m benchmarks.weight_only --options bits=8,form=load
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

__all__ = ["make_transformer", "quantize_in_fresh_process", "run_in_fresh_process"]

HIDDEN, INNER, HEADS, VOCABULARY = 2048, 8192, 16, 16384
LAYER_BYTES = 4 * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
TABLE_BYTES = 4 * VOCABULARY * HIDDEN

QUANTIZE = """
import json, sys, time
from onnxcomp.model import Model
from onnxcomp.pass_options import parse_pass
from onnxcomp.passes import Context

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

step = parse_pass("quantize-weights:" + sys.argv[3])
before, started = peak_mb(), time.monotonic()
model = Model.load(sys.argv[1])
changes = step.rewrite(model, Context())
rounded = time.monotonic() - started
model.save(sys.argv[2])
seconds = time.monotonic() - started
print(json.dumps({"before_mb": before, "peak_mb": peak_mb(), "rounded": rounded, "seconds": seconds,
                  "changed": len(changes.changed), "left": [f"{l.where}: {l.why}" for l in changes.left]}))
"""

RUN = """
import collections, json, sys
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.enable_profiling = True
options.profile_file_prefix = sys.argv[1] + ".profile"
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
scores = session.run(None, {"tokens": np.arange(8, dtype=np.int64)[None]})[0]
events = json.load(open(session.end_profiling()))
kernels = collections.Counter(e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))
print(json.dumps({"finite": bool(np.isfinite(scores).all()), "shape": scores.shape, "kernels": kernels}))
"""


class _Writer:
    """Nodes and external weights of a growing model."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._rng = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def weight(self, name: str, rows: int, columns: int) -> str:
        """A random matrix in the data file; its outputs are about as large as its inputs."""
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": Path(self._data.name).name, "offset": self._data.tell(), "length": 4 * rows * columns}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        self._data.write((self._rng.standard_normal((rows, columns), np.float32) * rows**-0.5).tobytes())
        return name

    def constant(self, name: str, value: Any) -> str:
        """A small initializer."""
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """A node with one output, by that name."""
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def layer(self, number: int, source: str) -> str:
        """Attention and a feed-forward part, each with its LayerNormalization and residual Add."""
        tag = f"l{number}."
        normed = self.add("LayerNormalization", [source, "gain", "shift"], f"{tag}n1")
        heads = []
        for letter, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            flat = self.add("MatMul", [normed, self.weight(f"{tag}W{letter}", HIDDEN, HIDDEN)], f"{tag}{letter}")
            cut = self.add("Reshape", [flat, "to_heads"], f"{tag}{letter}h")
            heads.append(self.add("Transpose", [cut], f"{tag}{letter}t", perm=order))
        raw = self.add("MatMul", heads[:2], f"{tag}raw")
        scores = self.add("Softmax", [self.add("Mul", [raw, "scale"], f"{tag}scaled")], f"{tag}p", axis=-1)
        mixed = self.add(
            "Transpose", [self.add("MatMul", [scores, heads[2]], f"{tag}m")], f"{tag}mt", perm=[0, 2, 1, 3]
        )
        joined = self.add("Reshape", [mixed, "from_heads"], f"{tag}j")
        out = self.add("MatMul", [joined, self.weight(f"{tag}Wo", HIDDEN, HIDDEN)], f"{tag}o")
        middle = self.add("Add", [source, out], f"{tag}a")
        normed = self.add("LayerNormalization", [middle, "gain", "shift"], f"{tag}n2")
        wide = self.add("MatMul", [normed, self.weight(f"{tag}W1", HIDDEN, INNER)], f"{tag}w")
        active = self.add("Mul", [wide, self.add("Sigmoid", [wide], f"{tag}g")], f"{tag}r")
        narrow = self.add("MatMul", [active, self.weight(f"{tag}W2", INNER, HIDDEN)], f"{tag}d")
        return self.add("Add", [middle, narrow], f"{tag}y")


def make_transformer(folder: Path, gigabytes: float) -> Path:
    """A transformer over token numbers, with a table of embeddings, about so many gigabytes of float32 weights."""
    layers = max(1, round((gigabytes * 1e9 - 2 * TABLE_BYTES) / LAYER_BYTES))
    path = folder / "transformer.onnx"
    with (folder / "transformer.onnx.data").open("wb") as data:
        writer = _Writer(data)
        writer.constant("gain", np.ones(HIDDEN, np.float32))
        writer.constant("shift", np.zeros(HIDDEN, np.float32))
        writer.constant("scale", np.float32((HIDDEN / HEADS) ** -0.5))
        writer.constant("to_heads", np.array([0, 0, HEADS, HIDDEN // HEADS], np.int64))
        writer.constant("from_heads", np.array([0, 0, HIDDEN], np.int64))
        state = writer.add("Gather", [writer.weight("table", VOCABULARY, HIDDEN), "tokens"], "embedded")
        for number in range(layers):
            state = writer.layer(number, state)
        normed = writer.add("LayerNormalization", [state, "gain", "shift"], "last")
        writer.add("MatMul", [normed, writer.weight("head", HIDDEN, VOCABULARY)], "scores")
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", "length", VOCABULARY])
    graph = helper.make_graph(writer.nodes, "transformer", [tokens], [scores], writer.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def quantize_in_fresh_process(path: Path, output: Path, options: str) -> dict[str, Any]:
    """Quantize and save in a new process; its memory before and at most, and its seconds."""
    return _fresh(QUANTIZE, str(path), str(output), options)


def run_in_fresh_process(path: Path) -> dict[str, Any]:
    """Load and run in a new process: the shape of the output, whether it is finite, and the kernels that ran."""
    return _fresh(RUN, str(path))


def _fresh(program: str, *arguments: str) -> dict[str, Any]:
    one_core = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **one_core})
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="how large the model's weights are")
    parser.add_argument("--options", default="bits=4,block=32,form=compute,max_opset=21", help="of quantize-weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, output = make_transformer(Path(folder), arguments.gigabytes), Path(folder) / "small.onnx"
        result = quantize_in_fresh_process(path, output, arguments.options)
        before, after = (sum(each.stat().st_size for each in Path(folder).glob(f"{p.name}*")) for p in (path, output))
        ran = run_in_fresh_process(output)
    kernels = ", ".join(f"{count} {name}" for name, count in ran["kernels"].items() if "MatMul" in name)
    print("| bytes before | after | stored | left | MB with the libraries loaded | peak MB | seconds | MB/s | runs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {before:,} | {after:,} | {result['changed']} | {len(result['left'])} | {result['before_mb']:.0f} "
        f"| {result['peak_mb']:.0f} | {result['seconds']:.1f} | {before / 1e6 / result['seconds']:.0f} "
        f"| {'yes' if ran['finite'] else 'NOT FINITE'}: {kernels} |"
    )


if __name__ == "__main__":
    main()
