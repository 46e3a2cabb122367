"""Files that `benchmarks.fuzzing` starts from."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

__all__ = ["image_seeds", "large_model_seeds", "model_seeds", "npy_seeds", "npz_seeds", "recipe_seeds"]


def model_seeds() -> Iterator[bytes]:
    """Models of ONNX's backend tests: of every kind, none large."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = [*sorted(folder.glob("simple/*/model.onnx")), *sorted(folder.glob("node/*/model.onnx"))[::40]]
    yield from (path.read_bytes() for path in paths if path.stat().st_size < 1 << 14)
    yield from large_model_seeds()
    model = parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) {y = Add(x, W)}')
    values, places = (numpy_helper.from_array(np.array([1, 3], kind), "W") for kind in ("float32", "int64"))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5]))
    yield model.SerializeToString()


def large_model_seeds() -> Iterator[bytes]:
    """A model with a weight that is large enough to stay in the file, alone and beside a small one."""
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 1024] y) { y = MatMul(x, W) }'
    model = parser.parse_model(text)
    values = np.zeros((4, 1024), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, "W"))
    yield model.SerializeToString()
    model.graph.initializer.add(name="V", data_type=TensorProto.FLOAT, dims=[2], float_data=[1, 2])
    yield model.SerializeToString()


def npy_seeds() -> Iterator[bytes]:
    """Arrays of several types and orders."""
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(4, 3))
    for array in (floats.astype(np.float32), np.asfortranarray(floats), floats.astype(">f2"), np.arange(4), floats > 0):
        stream = io.BytesIO()
        np.save(stream, array)
        yield stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, np.array([b"one", b"two"]))
    yield stream.getvalue()


def npz_seeds() -> Iterator[bytes]:
    """Archives with samples, labels, and what all samples share."""
    arrays: dict[str, Any] = {"x": np.zeros((4, 3), np.float32), "ids": np.arange(4)}
    for save in (np.savez, np.savez_compressed):
        for more in ({}, {"label": np.arange(4)}, {"x": np.zeros((4, 1, 3)), "ids": np.int64(3)}):
            stream = io.BytesIO()
            save(stream, **{**arrays, **more})
            yield stream.getvalue()


def image_seeds() -> Iterator[bytes]:
    """An image of each kind, alone and with a file of labels."""
    from PIL import Image

    for number, kind in enumerate(("PNG", "JPEG", "BMP", "WEBP")):
        for mode in ("RGB", "L", "P"):
            stream = io.BytesIO()
            image = Image.new(mode, (9, 7))
            (image.convert("RGB") if kind in {"JPEG", "WEBP"} else image).save(stream, kind)
            suffix = (".png", ".jpg", ".bmp", ".webp")[number]
            yield bytes([number]) + b"\0" + stream.getvalue()
            yield bytes([number]) + b"\0" + stream.getvalue() + f"LABELSfile,label\nimage{suffix},3\n".encode()


def recipe_seeds() -> Iterator[bytes]:
    """A recipe of one pass, and one with all that a recipe may hold."""
    yield b'[[stage]]\npasses = ["simplify"]\n'
    yield b"""[budget]
max_drop = 0.005
max_error = 1e-3
[options]
target = "arm64"
metric = "top1"
data = "samples.npz"
exclude = ["/head/*"]
force = true
time_limit = "10m"
seed = 3
threads = 2
shapes = {x = [1, 3]}
keep_debug = false
timing = false
[[stage]]
passes = ["quantize-weights", {name = "quantize", per_channel = false}]
share = 0.4
[[stage]]
passes = [{name = "prune", sparsity = 0.5}, {name = "cluster", bits = 4}, "pack"]
"""
