"""`low-rank` and then `quantize`: both factors in int8, at no more loss than the whole weights have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes import LowRank
from tests.models import Array, graph_model, random_weights, run
from tests.quantizing import Quantized, quantize
from tests.thin_weights import fading

SAMPLES = 128

NEAR_DB = 3.0
"""Twice as many roundings make half of the signal-to-noise ratio where none of them outweighs the others."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def correlated(*shape: int, seed: int = 0) -> Array:
    """Samples that vary much in some directions (the last axis), and hardly in others."""
    rng = np.random.default_rng(seed)
    size = shape[-1]
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return np.asarray((rng.normal(size=shape) * np.geomspace(1, 0.05, size)) @ turn, np.float32)


def mlp(op: str = "MatMul") -> tuple[onnx.ModelProto, dict[str, Array]]:
    lines: list[str] = []
    weights: dict[str, Array] = {}
    for number in range(3):
        source, target = f"r{number}", f"r{number + 1}" if number < 2 else "y"
        weights |= {f"W{number}": fading(64, 64, 0.8, seed=number), f"b{number}": random_weights(64, scale=0.1)}
        if op == "MatMul":
            lines.append(f"m{number} = MatMul({source}, W{number}) h{number} = Add(m{number}, b{number})")
        else:
            lines.append(f"h{number} = Gemm({source}, W{number}, b{number})")
        lines.append(f"{target} = {'Relu' if number < 2 else 'Identity'}(h{number})")
    proto = graph_model(f"g (float[N, 64] r0) => (float[N, 64] y) {{ {' '.join(lines)} }}", weights)
    return named(proto), {"r0": correlated(SAMPLES, 64)}


def conv_net() -> tuple[onnx.ModelProto, dict[str, Array]]:
    text = """g (float[N, 16, 12, 12] x) => (float[N, 32, 12, 12] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, W0, b0) r = Relu(a)
        b = Conv<pads = [1, 1, 1, 1]>(r, W1, b1) s = Relu(b)
        y = Conv(s, W2, b2)
    }"""
    weights = {f"b{number}": random_weights(32, scale=0.1, seed=number) for number in range(3)}
    for number, shape in enumerate([(32, 16, 3, 3), (32, 32, 3, 3), (32, 32, 1, 1)]):
        weights[f"W{number}"] = 0.3 * fading(32, math.prod(shape[1:]), 0.8, seed=number).reshape(shape)
    x = np.moveaxis(correlated(16, 12, 12, 16), 3, 1)
    return named(graph_model(text, weights)), {"x": np.ascontiguousarray(x)}


def named(proto: onnx.ModelProto) -> onnx.ModelProto:
    for node in proto.graph.node:
        node.name = f"n_{node.output[0]}"
    return proto


def thinned(
    proto: onnx.ModelProto, feed: dict[str, Array], runtime: Runtime, folder: Path, **options: Any
) -> onnx.ModelProto:
    model = Model.load(proto)
    data = open_data(feed, input_specs(model.proto()))
    context = Context(data=data, runtime=runtime, workdir=folder)
    assert LowRank(min_elements=1, **options).rewrite(model, context).count
    return model.to_proto()


def decibels(result: Quantized) -> float:
    """Signal over what rounding adds, in the model that was rounded."""
    return -20 * math.log10(max(result.errors))


INT8 = ("QLinearMatMul", "QGemm", "QLinearConv", "MatMulIntegerToFloat")

NETS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "matmul": (mlp, {"rank": 16}, "MatMul"),
    "gemm": (lambda: mlp("Gemm"), {"rank": 16}, "Gemm"),
    "svd": (conv_net, {"rank": 10, "conv": "svd"}, "Conv"),
    "spatial": (conv_net, {"rank": 20, "conv": "spatial"}, "Conv"),
    "tucker": (conv_net, {"rank": 16, "conv": "tucker"}, "Conv"),
}


@pytest.mark.parametrize("target", ["x86-vnni", "arm64"])
@pytest.mark.parametrize("net", NETS)
def test_every_factor_is_in_int8(net: str, target: str, runtime: Runtime, tmp_path: Path):
    make, options, op = NETS[net]
    proto, feed = make()
    thin = thinned(proto, feed, runtime, tmp_path, **options)
    layers = [node.op_type for node in thin.graph.node].count(op)
    assert layers > 3

    result = quantize(thin, runtime, tmp_path, feed=feed, target=target)

    assert not result.missed
    assert sum(result.count(*INT8)) == layers
    assert not sum(result.count("MatMul", "Gemm", "Conv", "FusedConv"))


@pytest.mark.parametrize("net", NETS)
def test_factors_lose_no_more_than_whole_weights(net: str, runtime: Runtime, tmp_path: Path):
    make, options, _ = NETS[net]
    proto, feed = make()
    thin = thinned(proto, feed, runtime, tmp_path, **options)

    whole, factored = (decibels(quantize(each, runtime, tmp_path, feed=feed)) for each in (proto, thin))

    assert factored > whole - NEAR_DB


def test_projections_read_one_int8_factor(runtime: Runtime, tmp_path: Path):
    text = """g (float[N, 8, 64] x) => (float[N, 8, 64] y) {
        r = Tanh(x) [q] q = MatMul(r, Q) [k] k = MatMul(r, K) [v] v = MatMul(r, V) [mul] m = Mul(q, k) y = Add(m, v)
    }"""
    common = fading(64, 64, 0.8)
    weights = {name: (common @ random_weights(64, 64, seed=n, scale=0.1)) for n, name in enumerate("QKV")}
    feed = {"x": correlated(32, 8, 64)}
    thin = thinned(graph_model(text, weights), feed, runtime, tmp_path, rank=24)
    assert [node.op_type for node in thin.graph.node].count("MatMul") == 4

    result = quantize(thin, runtime, tmp_path, feed=feed)

    assert not result.missed
    assert sum(result.count(*INT8)) == 4
    assert decibels(result) > 30


def test_the_rows_of_a_table_are_multiplied_in_int8(runtime: Runtime, tmp_path: Path):
    text = "g (int64[N, 8] words) => (float[N, 8, 64] y) { [look] e = Gather(table, words) y = Tanh(e) }"
    proto = graph_model(text, table=fading(200, 64, 0.8))
    feed = {"words": np.random.default_rng(0).integers(0, 200, (16, 8))}
    thin = thinned(proto, feed, runtime, tmp_path, rank=24)

    result = quantize(thin, runtime, tmp_path, feed=feed)

    assert not result.missed
    assert sum(result.count(*INT8)) == 1


def leaned(proto: onnx.ModelProto, power: float) -> onnx.ModelProto:
    """The same function, all of the scale of inner channels in the first factor (1), in the second (-1) or in both."""
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    held = {tensor.name: tensor for tensor in moved.graph.initializer}
    made = {node.output[0]: node for node in moved.graph.node}
    for node in moved.graph.node:
        before = made.get(node.input[0])
        if before is None or len(node.input) < 2 or ".thin" not in node.input[0]:
            continue
        first, second = (numpy_helper.to_array(held[each.input[1]]) for each in (before, node))
        conv = node.op_type == "Conv"
        if conv:
            first, second = (each.reshape(len(each), -1).T for each in (first, second))
        scale = np.linalg.norm(second, axis=1) ** power
        scaled = first * scale, second / scale[:, None]
        for each, value in zip((before, node), scaled, strict=True):
            tensor = held[each.input[1]]
            value = (value.T if conv else value).reshape(tensor.dims).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
    return moved


@pytest.mark.parametrize("net", ["matmul", "gemm", "svd"])
def test_scale_on_both_sides_loses_less_than_on_one(net: str, runtime: Runtime, tmp_path: Path):
    make, options, _ = NETS[net]
    proto, feed = make()
    thin = thinned(proto, feed, runtime, tmp_path, **options)
    for power in (1, -1):
        wanted, got = (run(each, feed)[0] for each in (thin, leaned(thin, power)))
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())

    even, first, second = (
        decibels(quantize(leaned(thin, power), runtime, tmp_path, feed=feed)) for power in (0, 1, -1)
    )

    assert even > first + 0.5
    assert even > second
