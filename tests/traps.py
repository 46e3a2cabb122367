"""Small quantized models, each with one trap that models fall into on their way to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxcomp.lints import lint_model
from onnxcomp.model import Model
from onnxcomp.targets import find_target
from tests.models import graph_model

Array = np.ndarray[Any, Any]


def conv(
    *,
    activations: str = "uint8",
    weights: str = "int8",
    per_channel: bool = True,
    limit: int = 127,
    weight_zero: int | None = 0,
    bias: str = "int32",
    batch: str = "1",
    depthwise: bool = False,
    channels: int = 4,
    opset: int = 17,
) -> onnx.ModelProto:
    """A quantized Conv with its Relu in the range of its codes."""
    rng = np.random.default_rng(0)
    channels = 3 if depthwise else channels
    sign = np.iinfo(activations)
    shape = (channels, 1 if depthwise else 3, 3, 3)
    codes = rng.integers(-limit, limit + 1, shape)
    codes.flat[0] = limit
    if weights == "uint8":
        codes = codes + 128
    scale = rng.uniform(0.005, 0.01, channels if per_channel else ()).astype(np.float32)
    zero = weight_zero if weight_zero is not None else 0
    sx = np.float32(0.02)
    values: dict[str, Any] = {
        "sx": sx,
        "zx": np.asarray(sign.min + 128, activations),
        "W": codes.astype(weights),
        "sw": scale,
        "zw": np.full(scale.shape, zero + (128 if weights == "uint8" else 0), weights),
        "sy": np.float32(0.05),
        "zy": np.asarray(sign.min, activations),
    }
    floats = rng.standard_normal(channels).astype(np.float32)
    if bias == "int32":
        steps = np.broadcast_to(sx * scale, channels).astype(np.float32)
        values |= {"B": np.rint(floats / steps).astype(np.int32), "sb": steps}
    else:
        values["bf"] = floats
    axis = "<axis = 0>" if per_channel else ""
    group = f", group = {channels}" if depthwise else ""
    third = "" if weight_zero is None else ", zw"
    bias_line = "bf = DequantizeLinear<axis = 0>(B, sb)" if bias == "int32" else ""
    return graph_model(
        f"""g (float[{batch}, 3, 8, 8] x) => (float[{batch}, {channels}, 8, 8] y) {{
            q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)
            w = DequantizeLinear{axis}(W, sw{third}) {bias_line}
            [conv] c = Conv<pads = [1, 1, 1, 1]{group}>(d, w, bf)
            [out] cq = QuantizeLinear(c, sy, zy) y = DequantizeLinear(cq, sy, zy)
        }}""",
        {name: np.asarray(value) for name, value in values.items()},
        opset=opset,
    )


def matmul(*, axis: int = 1, inputs: int = 16) -> onnx.ModelProto:
    """A quantized MatMul with a scale for each output channel, or with axis 0 for each input."""
    rng = np.random.default_rng(1)
    return graph_model(
        f"""g (float[1, {inputs}] x) => (float[1, 8] y) {{
            q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)
            w = DequantizeLinear<axis = {axis}>(W, sw, zw)
            [product] c = MatMul(d, w)
            cq = QuantizeLinear(c, sy, zx) y = DequantizeLinear(cq, sy, zx)
        }}""",
        sx=np.asarray(0.02, np.float32),
        zx=np.asarray(128, np.uint8),
        W=rng.integers(-127, 128, (inputs, 8)).astype(np.int8),
        sw=rng.uniform(0.005, 0.01, (inputs, 8)[axis]).astype(np.float32),
        zw=np.zeros((inputs, 8)[axis], np.int8),
        sy=np.asarray(0.05, np.float32),
    )


def gemm(bias_factor: float = 1.0) -> onnx.ModelProto:
    """A quantized Gemm, whose bias has this times the scale of the products."""
    rng = np.random.default_rng(0)
    return graph_model(
        """g (float[1, 8] x) => (float[1, 4] y) {
            q = QuantizeLinear(x, sx, z) d = DequantizeLinear(q, sx, z)
            w = DequantizeLinear(W, sw, zw) b = DequantizeLinear(B, sb)
            [head] c = Gemm(d, w, b)
            cq = QuantizeLinear(c, sy, z) y = DequantizeLinear(cq, sy, z)
        }""",
        sx=np.asarray(0.02, np.float32),
        z=np.asarray(128, np.uint8),
        W=rng.integers(-127, 128, (8, 4)).astype(np.int8),
        sw=np.asarray(0.01, np.float32),
        zw=np.asarray(0, np.int8),
        B=rng.integers(-5000, 5000, 4).astype(np.int32),
        sb=np.asarray(0.02 * 0.01 * bias_factor, np.float32),
        sy=np.asarray(0.05, np.float32),
    )


def softmax(step: float = 1 / 255) -> onnx.ModelProto:
    """A Softmax between uint8 codes, whose result has this scale."""
    return graph_model(
        """g (float[1, 10] x) => (float[1, 10] y) {
            q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)
            [softmax] s = Softmax(d)
            sq = QuantizeLinear(s, ss, zs) y = DequantizeLinear(sq, ss, zs)
        }""",
        sx=np.asarray(0.05, np.float32),
        zx=np.asarray(128, np.uint8),
        ss=np.asarray(step, np.float32),
        zs=np.asarray(0, np.uint8),
    )


def concat() -> onnx.ModelProto:
    """Boxes up to hundreds and scores up to 1, joined under one scale."""
    return graph_model(
        """g (float[1, 4, 9] boxes, float[1, 2, 9] scores) => (float[1, 6, 9] y) {
            bq = QuantizeLinear(boxes, sb, z) b = DequantizeLinear(bq, sb, z)
            sq = QuantizeLinear(scores, ss, z) s = DequantizeLinear(sq, ss, z)
            [join] j = Concat<axis = 1>(b, s)
            jq = QuantizeLinear(j, sb, z) y = DequantizeLinear(jq, sb, z)
        }""",
        sb=np.asarray(2.5, np.float32),
        ss=np.asarray(1 / 255, np.float32),
        z=np.asarray(0, np.uint8),
    )


def mask() -> onnx.ModelProto:
    """Attention logits and their mask of -1e4 under one scale."""
    return graph_model(
        """g (float[1, 8, 8] logits, float[1, 8, 8] mask) => (float[1, 8, 8] y) {
            a = Add(logits, mask)
            [codes] q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z)
            y = Softmax(d)
        }""",
        s=np.asarray(40.0, np.float32),
        z=np.asarray(254, np.uint8),
    )


def found(model: onnx.ModelProto | Model, target: str) -> set[str]:
    """The identifiers of what the lints find."""
    loaded = model if isinstance(model, Model) else Model.load(model)
    return {finding.id for finding in lint_model(loaded, find_target(target))}
