"""Files that mean harm, or are as broken as files get: what reads them must say so in a line, and touch nothing."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.models import graph_model, mlp_model

HUGE = 10**9
"""Two axes of it are 10^18 elements."""


# --- models -----------------------------------------------------------------------------------------------------------


def external(folder: Path, location: str, **entries: Any) -> Path:
    """A MatMul whose weight of 64 x 64 lies in another file."""
    model = graph_model("g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, W) }")
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    model.graph.initializer.append(tensor)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _beside(folder: Path, content: bytes = bytes(64 * 64 * 4)) -> None:
    (folder / "w.bin").write_bytes(content)


def leads_up(folder: Path) -> Path:
    (folder.parent / "secret.bin").write_bytes(bytes(64 * 64 * 4))
    return external(folder, "../secret.bin")


def absolute(folder: Path) -> Path:
    return external(folder, "/etc/passwd")


def zeros_for_ever(folder: Path) -> Path:
    return external(folder, "/dev/zero")


def link_out(folder: Path) -> Path:
    (folder / "w.bin").symlink_to("/etc/passwd")
    return external(folder, "w.bin")


def link_to_zeros(folder: Path) -> Path:
    (folder / "w.bin").symlink_to("/dev/zero")
    return external(folder, "w.bin")


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "w.bin")
    return external(folder, "w.bin")


def past_the_end(folder: Path) -> Path:
    _beside(folder)
    return external(folder, "w.bin", offset=64 * 64 * 4 - 8, length=64 * 64 * 4)


def endless_length(folder: Path) -> Path:
    _beside(folder)
    return external(folder, "w.bin", length=2**62)


def negative_offset(folder: Path) -> Path:
    _beside(folder)
    return external(folder, "w.bin", offset=-4096)


def offset_that_overflows(folder: Path) -> Path:
    _beside(folder)
    return external(folder, "w.bin", offset=2**64 - 16)


def offset_that_is_no_number(folder: Path) -> Path:
    _beside(folder)
    return external(folder, "w.bin", offset="0x10; rm")


def _weight(folder: Path, dims: list[int], data: bytes = b"") -> Path:
    model = graph_model("g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, W) }")
    model.graph.initializer.append(TensorProto(name="W", data_type=TensorProto.FLOAT, dims=dims, raw_data=data))
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def huge_weight(folder: Path) -> Path:
    return _weight(folder, [HUGE, HUGE], bytes(64))


def negative_dims(folder: Path) -> Path:
    return _weight(folder, [-64, -64], bytes(64 * 64 * 4))


def dims_that_overflow(folder: Path) -> Path:
    return _weight(folder, [2**33, 2**33, 2**33], bytes(64))


def too_little_data(folder: Path) -> Path:
    return _weight(folder, [64, 64], bytes(100))


def _saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def deep_nesting(folder: Path) -> Path:
    """A graph as the attribute of a node of a graph, 20,000 levels deep."""

    def field(number: int, body: bytes) -> bytes:
        size, length = b"", len(body)
        while True:
            size += bytes([length & 127 | (128 if length > 127 else 0)])
            length >>= 7
            if not length:
                return bytes([number << 3 | 2]) + size + body

    graph = b""
    for _ in range(20_000):
        attribute = field(1, b"body") + field(6, graph)  # AttributeProto: name, g
        graph = field(1, field(5, attribute))  # GraphProto: node; NodeProto: attribute
    path = folder / "m.onnx"
    path.write_bytes(b"\x08\x08" + field(7, graph))
    return path


def cycle(folder: Path) -> Path:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    ends = [helper.make_tensor_value_info(name, 1, [2]) for name in "xb"]
    return _saved(folder, helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), ir_version=8))


def two_makers(folder: Path) -> Path:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    ends = [helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    return _saved(folder, helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), ir_version=8))


def initializers_of_one_name(folder: Path) -> Path:
    model = mlp_model()
    model.graph.initializer.append(model.graph.initializer[0])
    return _saved(folder, model)


def function_of_itself(folder: Path) -> Path:
    call = helper.make_node("F", ["a"], ["b"], domain="own")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "F", ["a"], ["b"], [call], opsets)
    ends = [helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="own")], "g", ends[:1], ends[1:])
    return _saved(folder, helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8))


def sparse_out_of_bounds(folder: Path) -> Path:
    model = graph_model("g (float[N, 4] x) => (float[N, 4] y) { y = MatMul(x, W) }")
    values = numpy_helper.from_array(np.ones(2, np.float32), "W")
    indices = numpy_helper.from_array(np.array([3, 10**12], np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    return _saved(folder, model)


def huge_constant_of_shape(folder: Path) -> Path:
    """Three nodes that ask for 4 exabytes."""
    model = graph_model(
        "g (float[2] x) => (float[2] y) { z = ConstantOfShape(s) r = ReduceSum<keepdims = 0>(z) y = Add(x, r) }",
        s=np.array([HUGE, HUGE], np.int64),
    )
    return _saved(folder, model)


def folding_bomb(folder: Path) -> Path:
    """A constant that doubles 40 times: 4 terabytes, if someone folds it."""
    lines = " ".join(f"c{i + 1} = Concat<axis = 0>(c{i}, c{i})" for i in range(40))
    model = graph_model(
        f"g (float[2] x) => (float[2] y) {{ {lines} r = ReduceSum<keepdims = 0>(c40) y = Add(x, r) }}",
        c0=np.ones(4, np.float32),
    )
    return _saved(folder, model)


def strings_for_numbers(folder: Path) -> Path:
    model = mlp_model()
    model.graph.initializer[0].data_type = TensorProto.STRING
    return _saved(folder, model)


def unknown_element_type(folder: Path) -> Path:
    model = mlp_model()
    model.graph.initializer[0].data_type = 99
    return _saved(folder, model)


def zip_of_a_model(folder: Path) -> Path:
    path = folder / "m.onnx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m.onnx", mlp_model().SerializeToString())
    return path


MODELS: dict[str, Callable[[Path], Path]] = {
    made.__name__: made
    for made in (
        leads_up, absolute, zeros_for_ever, link_out, link_to_zeros, fifo, past_the_end, endless_length,
        negative_offset, offset_that_overflows, offset_that_is_no_number, huge_weight, negative_dims,
        dims_that_overflow, too_little_data, deep_nesting, cycle, two_makers, initializers_of_one_name,
        function_of_itself, sparse_out_of_bounds, huge_constant_of_shape, folding_bomb, strings_for_numbers,
        unknown_element_type, zip_of_a_model,
    )
}  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------------------


def _npy(shape: tuple[int, ...], dtype: str = "<f4", data: bytes = b"") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def zip_bomb(folder: Path) -> Path:
    """An archive of a few hundred kB that says to hold 32 GB, and unpacks to 268 MB of zeros."""
    path = folder / "d.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(_npy((HUGE, 8)))
        block = bytes(1 << 22)
        for _ in range(64):
            file.write(block)
    return path


def pickled(folder: Path) -> Path:
    path = folder / "d.npy"
    np.save(path, np.array([{"harm": print}, None], dtype=object), allow_pickle=True)
    return path


def pickled_in_an_archive(folder: Path) -> Path:
    path = folder / "d.npz"
    np.savez(path, x=np.array([{"harm": 1}], dtype=object), allow_pickle=True)
    return path


def huge_array(folder: Path) -> Path:
    path = folder / "d.npy"
    path.write_bytes(_npy((HUGE, HUGE)))
    return path


def head_that_is_code(folder: Path) -> Path:
    head = b"{'descr': __import__('os').system('touch harm'), 'fortran_order': False, 'shape': (1,)}\n"
    path = folder / "d.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(64))
    return path


def negative_shape(folder: Path) -> Path:
    path = folder / "d.npy"
    path.write_bytes(_npy((-8, 8), data=bytes(256)))
    return path


def members_outside(folder: Path) -> Path:
    path = folder / "d.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.ones((8, 8), np.float32))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../harm.npy", buffer.getvalue())
    return path


def endless_folder(folder: Path) -> Path:
    """A folder that holds itself."""
    data = folder / "data"
    data.mkdir()
    (data / "again").symlink_to(data)
    (data / "a.npy").symlink_to("/dev/zero")
    return data


def a_device(folder: Path) -> Path:
    return Path("/dev/zero")


DATA: dict[str, Callable[[Path], Path]] = {
    made.__name__: made
    for made in (
        zip_bomb, pickled, pickled_in_an_archive, huge_array, head_that_is_code, negative_shape, members_outside,
        endless_folder, a_device,
    )
}  # fmt: skip


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPES = {
    "code": "[[stage]]\npasses = [\"__import__('os').system('touch harm')\"]\n",
    "metric that is code": '[options]\nmetric = "os:system"\n[[stage]]\npasses = ["simplify"]\n',
    "data that are code": '[options]\ndata = "os:getcwd"\n[[stage]]\npasses = ["simplify"]\n',
    "not text": "\x00\x01\x02",
    "endless numbers": f"[budget]\nmax_drop = {'9' * 4000}\n",
    "deep": "a = " + "[" * 5000 + "]" * 5000 + "\n",
}
