"""`quantize-weights` in the form "compute": which weights MatMulNBits takes, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcomp.passes import Context
from onnxcomp.runtime import Runtime
from onnxcomp.targets import find_target
from tests.models import graph_model, matmul_model, mlp_model, ops, random_weights, run
from tests.test_quantize_weights_widths import NEWEST, every_width, left, relative, stored, tensor_types, value

INT8_INPUT = 0.03
"""Relative: MatMulNBits rounds each input row to 8 bits, half a step of 1/127 of its peak, some 0.6% (44 dB) for normal
values; five times that."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as running:
        yield running


@pytest.mark.parametrize("block", [0, 16, 32, 128])
@every_width
def test_the_kernel_computes_every_width(bits: int, symmetric: bool, block: int, runtime: Runtime, tmp_path: Path):
    weight = random_weights(256, 48)
    context = Context(runtime=runtime, workdir=tmp_path)
    options: Any = {"bits": bits, "symmetric": symmetric, "block": block, "max_opset": NEWEST}

    model, changes = stored(matmul_model(weight), context, form="compute", **options)
    model.save(tmp_path / "after.onnx")

    assert changes.count == 1
    assert runtime.census(tmp_path / "after.onnx").counts() == {"MatMulNBits": 1}
    feeds = {"X": random_weights(4, 256, seed=9)}
    plain, _ = stored(matmul_model(weight), **options)
    np.testing.assert_array_equal(value(model, "W"), value(plain, "W"))
    assert relative(feeds["X"] @ value(model, "W"), run(model, feeds, optimized=True)[0]) < INT8_INPUT


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_gemm_is_computed_too(trans_b: int, bias: str, runtime: Runtime, tmp_path: Path):
    weight = random_weights(*((48, 100) if trans_b else (100, 48)))
    text = f"g (float[N, 100] x) => (float[N, 48] y) {{ y = Gemm<transB = {trans_b}>(x, W{bias}) }}"
    proto = graph_model(text, {"W": weight, **({"b": random_weights(48)} if bias else {})})
    context = Context(runtime=runtime, workdir=tmp_path)

    model, changes = stored(proto, context, bits=8, block=32, form="compute", max_opset=21)
    model.save(tmp_path / "after.onnx")

    assert changes.changed[0].what.endswith("float32 stored as int8 in blocks of 32, computed by MatMulNBits")
    assert runtime.census(tmp_path / "after.onnx").counts() == {"MatMulNBits": 1}
    feeds = {"x": random_weights(4, 100, seed=9)}
    for optimized in (False, True):
        assert relative(run(proto, feeds)[0], run(model, feeds, optimized=optimized)[0]) < INT8_INPUT


def test_a_last_block_may_be_short():
    weight = random_weights(100, 48)

    model, changes = stored(matmul_model(weight), bits=8, block=32, form="compute", max_opset=21)

    assert changes.count == 1
    assert relative(weight, value(model, "W")) < 0.01


SQUARE = "g (float[64, 64] x) => (float[A, B] y)"

NO_KERNEL = {
    "conv": ("g (float[N, 16, 8, 8] x) => (float[N, 16, C, D] y)", "y = Conv(x, V)"),
    "gather": ("g (int64[N] x) => (float[N, 64] y)", "y = Gather(W, x)"),
    "shared": (SQUARE, "h = MatMul(x, W) y = MatMul(h, W)"),
    "relu": (SQUARE, "h = MatMul(x, W) y = Relu(h)"),
    "bias and clip": (SQUARE, "h = MatMul(x, W) a = Add(h, b) r = Clip(a) y = MatMul(r, R)"),
    "alpha": (SQUARE, "y = Gemm<alpha = 0.5>(x, W)"),
    "left operand": (SQUARE, "y = MatMul(W, x)"),
}


@pytest.mark.parametrize("kind", NO_KERNEL)
def test_what_the_kernel_does_not_take_is_stored_to_be_decoded_at_load(kind: str, runtime: Runtime, tmp_path: Path):
    interface, body = NO_KERNEL[kind]
    proto = graph_model(f"{interface} {{ {body} }}")
    read = {name for node in proto.graph.node for name in node.input}
    for name, shape in {"W": (64, 64), "V": (16, 16, 3, 3), "b": (64,), "R": (64, 64)}.items():
        if name in read:
            proto.graph.initializer.append(numpy_helper.from_array(random_weights(*shape), name))
    context = Context(runtime=runtime, workdir=tmp_path)

    model, changes = stored(proto, context, bits=4, block=16, form="compute", max_opset=21)
    model.save(tmp_path / "after.onnx")

    first = changes.changed[0]
    assert first.where in {"W", "V"}
    assert "MatMulNBits" not in first.what
    assert "DequantizeLinear" not in runtime.census(tmp_path / "after.onnx").counts()


def test_a_decoding_that_is_seen_to_run_gives_way_to_the_form_load(tmp_path: Path):
    class StubRuntime:
        """Makes no MatMulNBits, but folds."""

        def census(self, path: Path) -> Any:
            fused = "DequantizeLinear" in ops(onnx.load(path))
            with Runtime() as runtime:
                return runtime.census(path, optimize=not fused)

    runtime: Any = StubRuntime()

    model, changes = stored(
        mlp_model((24, 48, 24)), Context(runtime=runtime, workdir=tmp_path), form="compute", max_opset=21
    )

    assert changes.count == 2
    assert "DequantizeLinear" not in ops(model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "needed"), [({"block": 32}, 21), ({"block": 32, "bits": 4}, 21), ({"block": 16, "bits": 2}, 21)]
)
def test_a_target_whose_runtime_is_too_old_is_refused_with_the_reason(options: dict[str, Any], needed: int):
    model = matmul_model(random_weights(64, 48))
    context = Context(target=find_target("x86-vnni"))

    _, changes = stored(model, context, form="compute", **options)

    assert changes.count == 0
    why = f"needs opset {needed}; x86-vnni is made for ONNX Runtime 1.16, opset 19: allow it with max_opset={needed}"
    assert left(changes) == {"the model": why}


def test_whole_columns_of_8_bits_need_no_newer_opset_than_13():
    model, changes = stored(matmul_model(random_weights(64, 48)), form="compute")

    assert (changes.count, model.opset, ops(model)) == (1, 17, ["DequantizeLinear", "MatMul"])


def test_a_model_with_functions_keeps_its_opset_and_says_so():
    proto = matmul_model(random_weights(64, 48)).to_proto()
    opsets = [onnx.helper.make_opsetid("", 17)]
    relu = [onnx.helper.make_node("Relu", ["a"], ["b"])]
    proto.functions.append(onnx.helper.make_function("own", "f", ["a"], ["b"], relu, opsets))

    _, refused = stored(proto, bits=4, block=32, form="compute", max_opset=21)
    model, changes = stored(proto, bits=4, block=32, max_opset=21)

    assert left(refused) == {"the model": "opset 17 cannot be raised to 21: the model has functions of its own"}
    assert (changes.count, model.opset, tensor_types(model)) == (1, 17, {"FLOAT": 1, "INT8": 1, "INT64": 1})
