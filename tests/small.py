"""Small models and data in files, for tests that run whole commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

HIDDEN = 48
INPUTS = 32
CLASSES = 4


def classifier(seed: int = 0, *, noise: float = 0.0) -> onnx.ModelProto:
    """Two Gemm layers, 32 inputs, 4 classes; `noise` moves the weights."""
    rng = np.random.default_rng(seed)
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> small (float[N,32] x) => (float[N,4] scores)'
        "{ [first] h = Gemm(x, w1, b1) [relu] r = Relu(h) i = Identity(r) [head] scores = Gemm(i, w2) }"
    )
    values = {
        "w1": rng.normal(size=(INPUTS, HIDDEN)),
        "b1": rng.normal(size=HIDDEN),
        "w2": rng.normal(size=(HIDDEN, CLASSES)),
    }
    moved = np.random.default_rng(99)
    for name, value in values.items():
        value = (value + noise * moved.normal(size=value.shape)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return proto


def save_classifier(path: Path, seed: int = 0, *, noise: float = 0.0) -> Path:
    """Write the classifier to a file."""
    onnx.save(classifier(seed, noise=noise), path)
    return path


def save_samples(path: Path, count: int = 64, *, labels: bool = True) -> Path:
    """Write samples, with the labels that the classifier itself would give."""
    x = np.random.default_rng(7).normal(size=(count, INPUTS)).astype(np.float32)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in classifier().graph.initializer}
    scores = np.maximum(x @ weights["w1"] + weights["b1"], 0) @ weights["w2"]
    np.savez(path, **({"x": x, "label": scores.argmax(axis=1)} if labels else {"x": x}))
    return path
