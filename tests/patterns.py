"""Graphs as exporters write them, each with the surroundings in which quantization meets it: int8 layers on both sides.

Weights are given by their shapes, other constants by their values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.models import graph_model

Array = np.ndarray[Any, Any]


def pattern(text: str, *, opset: int = 17, seed: int = 0, **constants: Any) -> onnx.ModelProto:
    """A model from its graph; a tuple stands for random weights of that shape, scaled to keep the signal's size."""
    rng = np.random.default_rng(seed)
    values = {
        name: _weights(rng, value) if isinstance(value, tuple) else np.asarray(value, _kind(value))
        for name, value in constants.items()
    }
    model = graph_model(f"g {text}", values, opset=opset, ir_version=10 if opset > 18 else 8)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{index}"
    return model


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    inputs = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    scale = 0.1 if len(shape) == 1 else inputs**-0.5
    return np.asarray(rng.standard_normal(shape) * scale, np.float32)


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, np.ndarray | np.generic) else np.float32


def image(body: str, *, inputs: int = 3, **constants: Any) -> onnx.ModelProto:
    """`body` between a Conv that writes `a` (16 channels, 16 x 16) and one that reads `z` (of `W2`'s channels)."""
    constants = {"W": (16, inputs, 3, 3), "bias": (16,), "W2": (8, 16, 1, 1), **constants}
    text = f"""(float[N, {inputs}, 16, 16] x) => (float[N, 8, H, V] y) {{
        a = Conv<pads = [1, 1, 1, 1]>(x, W, bias)
        {body}
        y = Conv(z, W2) }}"""
    return pattern(text, **constants)


def tokens(body: str, *, width: int = 32, out: int = 32, **constants: Any) -> onnx.ModelProto:
    """`body` between a MatMul that writes `a` (8 tokens of `width`) and one that reads `z`."""
    constants = {"W": (width, width), "W2": (width, out), **constants}
    text = f"""(float[N, 8, {width}] x) => (float[N, 8, {out}] y) {{
        a = MatMul(x, W)
        {body}
        y = MatMul(z, W2) }}"""
    return pattern(text, **constants)


GELU_ERF = (
    """{o}d = Div({i}, root) {o}e = Erf({o}d) {o}p = Add({o}e, one) {o}m = Mul({i}, {o}p) {o} = Mul({o}m, half)"""
)
GELU: dict[str, Any] = {"root": np.float32(2**0.5), "one": 1.0, "half": 0.5}
LAYER_NORM = """{o}u = ReduceMean<axes = [-1]>({i}) {o}s = Sub({i}, {o}u) {o}q = Pow({o}s, two)
    {o}v = ReduceMean<axes = [-1]>({o}q) {o}w = Add({o}v, eps) {o}r = Sqrt({o}w) {o}n = Div({o}s, {o}r)
    {o}g = Mul({o}n, gamma) {o} = Add({o}g, beta)"""


def norm(width: int) -> dict[str, Any]:
    """Constants of LAYER_NORM."""
    return {"two": 2.0, "eps": 1e-5, "gamma": np.ones(width, np.float32), "beta": np.zeros(width, np.float32)}


def attention(*, masked: bool = False, biased: bool = True, heads: int = 2, width: int = 32) -> onnx.ModelProto:
    """Multi-head self attention with its residual and LayerNormalization, as PyTorch's exporter writes it."""
    size = width // heads
    constants: dict[str, Any] = {f"W{k}": (width, width) for k in "qkvo"} | {f"b{k}": (width,) for k in "qkvo"}
    lines = []
    for kind in "qkv":
        lines.append(f"{kind}0 = MatMul(x, W{kind})")
        lines.append(f"{kind}1 = Add(b{kind}, {kind}0)" if biased else f"{kind}1 = Identity({kind}0)")
        lines.append(f"{kind}2 = Reshape({kind}1, split)")
        permutation = "0, 2, 3, 1" if kind == "k" else "0, 2, 1, 3"
        lines.append(f"{kind} = Transpose<perm = [{permutation}]>({kind}2)")
    lines.append("qk = MatMul(q, k) scaled = Div(qk, root)")
    lines.append("logits = Add(scaled, mask)" if masked else "logits = Identity(scaled)")
    lines.append("p = Softmax<axis = -1>(logits) c = MatMul(p, v) c1 = Transpose<perm = [0, 2, 1, 3]>(c)")
    lines.append("c2 = Reshape(c1, join) o = MatMul(c2, Wo) ob = Add(bo, o) s = Add(ob, x)")
    lines.append("y = LayerNormalization<axis = -1>(s, gamma, beta)")
    inputs = f"float[N, 8, {width}] x" + (", float[N, 1, 1, 8] mask" if masked else "")
    return pattern(
        f"({inputs}) => (float[N, 8, {width}] y) {{ {' '.join(lines)} }}",
        split=np.array([0, 0, heads, size]),
        join=np.array([0, 0, width]),
        root=np.float32(size**0.5),
        gamma=np.ones(width, np.float32),
        beta=np.zeros(width, np.float32),
        **constants,
    )
