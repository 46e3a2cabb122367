"""`fit-target` on random quantized layers: what it gives computes the same, with and without int8 kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import Context, Model
from onnxcomp.lints import lint_model
from onnxcomp.targets import TARGETS, find_target
from onnxcomp_passes import FitTarget
from tests.models import graph_model, run

SIZE = 4
STEP = 0.05
BOUND = 3.1 * STEP
"""The weight's rounding, the bias's and the result's."""

LAYERS = {
    "Conv": ("Conv(d, w{bias})", (2, SIZE, 3, 3), (SIZE, SIZE, 2, 2), (2, SIZE, 2, 2), 0),
    "ConvTranspose": ("ConvTranspose(d, w{bias})", (2, SIZE, 2, 2), (SIZE, SIZE, 2, 2), (2, SIZE, 3, 3), 1),
    "Gemm": ("Gemm(d, w{bias})", (2, SIZE), (SIZE, SIZE), (2, SIZE), 1),
    "Gemm, turned": ("Gemm<transB = 1>(d, w{bias})", (2, SIZE), (SIZE, SIZE), (2, SIZE), 0),
    "Gemm, halved": ("Gemm<alpha = 0.5>(d, w{bias})", (2, SIZE), (SIZE, SIZE), (2, SIZE), 1),
    "MatMul": ("MatMul(d, w)", (2, SIZE), (SIZE, SIZE), (2, SIZE), 1),
    "MatMul, on the left": ("MatMul(w, d)", (SIZE, 2), (SIZE, SIZE), (SIZE, 2), 0),
}
"""Name -> operator, shapes of input, weight and output, axis of the output channels."""


@st.composite
def layers(draw: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A layer between codes, and its input. All sizes are equal, so that a wrong axis goes unnoticed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    text, shape, of_weight, of_output, channels = LAYERS[draw(st.sampled_from(sorted(LAYERS)))]
    sign, weights = draw(st.sampled_from(["uint8", "int8"])), draw(st.sampled_from(["int8", "uint8"]))
    per = draw(st.sampled_from(["tensor", "output", "input"]))
    axis = {"tensor": None, "output": channels, "input": 1 - channels}[per]
    low = np.iinfo(weights).min
    scale = rng.uniform(0.002, 0.02, () if axis is None else SIZE).astype(np.float32)
    offset = draw(st.sampled_from([0, 5])) if weights == "int8" else 128
    values: dict[str, Any] = {
        "sx": np.float32(0.02),
        "zx": np.asarray(np.iinfo(sign).min + 128, sign),
        "sy": np.float32(STEP),
        "zy": np.asarray(np.iinfo(sign).min + 128, sign),
        "W": rng.integers(low, low + 256, of_weight).astype(weights),
        "sw": scale,
        "zw": np.full(scale.shape, offset, weights),
    }
    kind = draw(st.sampled_from(["none", "float", "int32", "int32 elsewhere"])) if "{bias}" in text else "none"
    line = ""
    if kind == "float":
        values["b"] = rng.uniform(-1, 1, SIZE).astype(np.float32)
    elif kind != "none":
        step = np.float32(0.02) * scale if kind == "int32" and per == "output" else np.float32(1e-3)
        values |= {"B": rng.integers(-900, 900, SIZE).astype(np.int32), "sb": step}
        line = f"b = DequantizeLinear{'<axis = 0>' if np.size(step) > 1 else ''}(B, sb)"
    zero = ", zw" if draw(st.booleans()) or offset else ""
    at = "" if axis is None else f"<axis = {axis}>"
    ends = f"float{list(shape)} x) => (float{list(of_output)} y"
    body = f"""q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)
        w = DequantizeLinear{at}(W, sw{zero}) {line}
        c = {text.format(bias="" if kind == "none" else ", b")}
        cq = QuantizeLinear(c, sy, zy) y = DequantizeLinear(cq, sy, zy)"""
    if not zero and weights == "uint8":
        del values["zw"]
    model = graph_model(f"g ({ends}) {{ {body} }}", {name: np.asarray(value) for name, value in values.items()})
    return model, {"x": rng.uniform(-2, 2, shape).astype(np.float32)}


@given(layers(), st.sampled_from(sorted(TARGETS)))
@settings(max_examples=60, deadline=None)
def test_what_it_gives_computes_the_same_and_int8_kernels_do_too(drawn, name):
    model, feed = drawn
    fitted, target = Model.load(model), find_target(name)
    changes = FitTarget().rewrite(fitted, Context(target=target))
    meant, given_ = run(model, feed)[0], run(fitted, feed)[0]
    assert np.abs(meant - given_).max() <= BOUND
    errors = {finding.id for finding in lint_model(fitted, target) if finding.severity == "error"}
    assert not errors or changes.left
    assert np.abs(given_ - run(fitted, feed, optimized=True)[0]).max() <= BOUND
    assert FitTarget().rewrite(fitted, Context(target=target)).count == 0
