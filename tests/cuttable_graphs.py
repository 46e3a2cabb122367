"""Graphs with channels that can be cut, of every kind, and the groups that are in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx

from tests.models import batch_norm_weights, graph_model, random_weights

__all__ = ["CASES", "Case"]

Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """A graph, and its groups as (name, kind, units)."""

    model: Callable[[], onnx.ModelProto]
    groups: set[tuple[str, str, int]]


def conv_model(
    body: str,
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, Array] | None = None,
    *,
    x: str = "N, 3, 8, 8",
    y: str = "N, 5, A, B",
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A model with random weights of these shapes, and with known ones."""
    weights = {
        name: random_weights(*shape, seed=seed, scale=float(np.prod(shape[1:])) ** -0.5)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    text = f"g (float[{x}] x) => (float[{y}] y) {{ {body} }}"
    return graph_model(text, {**weights, **(known or {})}, opset=opset, ir_version=ir_version)


def residual() -> onnx.ModelProto:
    body = """
        [stem] a = Conv<pads = [1, 1, 1, 1]>(x, W0, b0)
        n = BatchNormalization(a, scale, bias, mean, variance)
        r = Relu(n)
        [inner] c = Conv<pads = [1, 1, 1, 1]>(r, W1, b1)
        [outer] d = Conv<pads = [1, 1, 1, 1]>(c, W2)
        s = Add(d, r)
        [last] y = Conv(s, W3, b3)"""
    shapes: dict[str, tuple[int, ...]] = {
        "W0": (8, 3, 3, 3),
        "b0": (8,),
        "W1": (6, 8, 3, 3),
        "b1": (6,),
        "W2": (8, 6, 3, 3),
        "W3": (5, 8, 3, 3),
    }
    return conv_model(body, {**shapes, "b3": (5,)}, batch_norm_weights(8))


def depthwise() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        [twice] d = Conv<group = 6>(a, W1, b1)
        low = Constant<value = float {0.0}>()
        high = Constant<value = float {6.0}>()
        r = Clip(d, low, high)
        [last] y = Conv(r, W2)"""
    shapes: dict[str, tuple[int, ...]] = {"W0": (6, 3, 3, 3), "W1": (12, 1, 3, 3), "b1": (12,), "W2": (5, 12, 1, 1)}
    return conv_model(body, shapes)


def many_groups() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        [grouped] d = Conv<group = 6>(a, W1, b1)
        [last] y = Conv(d, W2)"""
    return conv_model(body, {"W0": (12, 3, 1, 1), "W1": (18, 2, 3, 3), "b1": (18,), "W2": (5, 18, 1, 1)})


def few_groups() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        [grouped] d = Conv<group = 2>(a, W1, b1)
        [last] y = Conv(d, W2)"""
    return conv_model(body, {"W0": (12, 3, 1, 1), "W1": (10, 6, 3, 3), "b1": (10,), "W2": (5, 10, 1, 1)})


def concat_and_parts() -> onnx.ModelProto:
    body = """
        [left] a = Conv(x, W0)
        [right] b = Conv(x, W1, b1)
        c = Concat<axis = 1>(a, b)
        sizes = Constant<value = int64[2] {4, 9}>()
        p, q = Split<axis = -3>(c, sizes)
        starts = Constant<value = int64[1] {2}>()
        ends = Constant<value = int64[1] {-1}>()
        axes = Constant<value = int64[1] {1}>()
        s = Slice(q, starts, ends, axes)
        picked = Constant<value = int64[3] {3, 0, -1}>()
        g = Gather<axis = 1>(p, picked)
        j = Concat<axis = 1>(s, g)
        [last] y = Conv(j, W2)"""
    return conv_model(body, {"W0": (6, 3, 1, 1), "W1": (7, 3, 1, 1), "b1": (7,), "W2": (5, 9, 1, 1)})


def equal_parts() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        p, q = Split<axis = 1, num_outputs = 2>(a)
        g = Sigmoid(q)
        m = Mul(p, g)
        [last] y = Conv(m, W1)"""
    return conv_model(body, {"W0": (12, 3, 1, 1), "W1": (5, 6, 1, 1)}, opset=18)


def old_operators() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        p, q = Split<axis = 1, split = [5, 7]>(a)
        s = Slice<axes = [1], starts = [1], ends = [4]>(p)
        c = Concat<axis = 1>(s, q)
        [pool] m = GlobalAveragePool(c)
        f = Flatten(m)
        [last] y = Gemm<transB = 1>(f, W1, b1)"""
    return conv_model(body, {"W0": (12, 3, 1, 1), "W1": (5, 10), "b1": (5,)}, y="N, 5", opset=9, ir_version=6)


def flattened() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
        shape = Constant<value = int64[2] {0, 96}>()
        f = Reshape(p, shape)
        [hidden] h = Gemm<transB = 1, alpha = 0.5>(f, W1, b1)
        r = PRelu(h, slope)
        [last] y = Gemm(r, W2, b2)"""
    shapes: dict[str, tuple[int, ...]] = {
        "W0": (6, 3, 1, 1),
        "W1": (9, 96),
        "b1": (9,),
        "slope": (9,),
        "W2": (9, 5),
        "b2": (1, 5),
    }
    return conv_model(body, shapes, y="N, 5")


def transposed_convolution() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        p = PRelu(a, slope)
        [up] u = ConvTranspose<strides = [2, 2]>(p, W1, b1)
        [depth] d = ConvTranspose<group = 7>(u, W2)
        n = InstanceNormalization(d, gain, shift)
        [last] y = Conv(n, W3)"""
    shapes: dict[str, tuple[int, ...]] = {
        "W0": (6, 3, 1, 1),
        "slope": (6, 1, 1),
        "W1": (6, 7, 2, 2),
        "b1": (7,),
        "W2": (7, 1, 3, 3),
    }
    return conv_model(body, {**shapes, "gain": (7,), "shift": (7,), "W3": (5, 7, 1, 1)})


def resized() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        pads = Constant<value = int64[8] {0, 0, 1, 1, 0, 0, 1, 1}>()
        p = Pad(a, pads)
        sizes = Constant<value = int64[4] {2, 6, 20, 20}>()
        r = Resize<mode = "nearest">(p, , , sizes)
        shape = Constant<value = int64[4] {2, 6, 1, 1}>()
        e = Expand(scale, shape)
        m = Mul(r, e)
        [last] y = Conv(m, W1)"""
    return conv_model(body, {"W0": (6, 3, 1, 1), "W1": (5, 6, 1, 1), "scale": (1, 6, 1, 1)}, x="2, 3, 8, 8")


def squeeze_and_excite() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        m = ReduceMean<axes = [2, 3]>(a)
        [down] d = Conv(m, W1)
        r = Relu(d)
        [up] u = Conv(r, W2)
        g = HardSigmoid(u)
        s = Mul(a, g)
        [gate] t = Conv(s, W4)
        z = Mul(s, t)
        [last] y = Conv(z, W3)"""
    shapes: dict[str, tuple[int, ...]] = {
        "W0": (8, 3, 1, 1),
        "W1": (4, 8, 1, 1),
        "W2": (8, 4, 1, 1),
        "W3": (5, 8, 1, 1),
        "W4": (1, 8, 1, 1),
    }
    return conv_model(body, shapes)


def shuffled() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        halves = Constant<value = int64[5] {0, 2, 6, 8, 8}>()
        h = Reshape(a, halves)
        t = Transpose<perm = [0, 2, 1, 3, 4]>(h)
        whole = Constant<value = int64[4] {0, -1, 8, 8}>()
        w = Reshape(t, whole)
        p, q = Split<axis = 1>(w)
        j = Concat<axis = 1>(p, q)
        [last] y = Conv(j, W1)"""
    return conv_model(body, {"W0": (12, 3, 1, 1), "W1": (5, 12, 1, 1)})


def space_and_depth() -> onnx.ModelProto:
    body = """
        [wide] a = Conv(x, W0)
        d = DepthToSpace<blocksize = 2>(a)
        e = DepthToSpace<blocksize = 2, mode = "CRD">(a)
        f = Add(d, e)
        [inner] b = Conv(f, W1)
        s = SpaceToDepth<blocksize = 2>(b)
        [last] y = Conv(s, W2)"""
    return conv_model(body, {"W0": (12, 3, 1, 1), "W1": (6, 3, 1, 1), "W2": (5, 24, 1, 1)})


def attention(qkv: str, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Pre-norm attention and feed-forward over 5 tokens of 12 features in 3 heads, behind a class token."""
    body = f"""
        n = LayerNormalization(x, gain, shift)
        four = Constant<value = int64[4] {{0, 0, 3, 4}}>()
        half = Constant<value = float {{0.5}}>()
        {qkv}
        raw = MatMul(q, k)
        scores = Mul(raw, half)
        masked = Add(scores, mask)
        p = Softmax(masked)
        mixed = MatMul(p, v)
        back = Transpose<perm = [0, 2, 1, 3]>(mixed)
        flat = Constant<value = int64[3] {{0, 0, 12}}>()
        joined = Reshape(back, flat)
        [project] o = MatMul(joined, Wo)
        r = Add(x, o)
        [up] u = MatMul(r, Wu)
        ub = Add(u, bu)
        act = Relu(ub)
        [down] d = MatMul(act, Wd)
        y = Add(r, d)"""
    vectors: dict[str, tuple[int, ...]] = {"gain": (12,), "shift": (12,), "mask": (1, 1, 5, 5)}
    feed_forward: dict[str, tuple[int, ...]] = {"Wo": (12, 12), "Wu": (12, 20), "bu": (20,), "Wd": (20, 12)}
    return conv_model(body, {**shapes, **vectors, **feed_forward}, x="N, 5, 12", y="N, 5, 12")


def fused_attention() -> onnx.ModelProto:
    qkv = """
        [qkv] all = MatMul(n, Wqkv)
        biased = Add(all, bqkv)
        five = Constant<value = int64[5] {0, 5, 3, 3, 4}>()
        parts = Reshape(biased, five)
        first = Transpose<perm = [2, 0, 3, 1, 4]>(parts)
        zero = Constant<value = int64 {0}>()
        one = Constant<value = int64 {1}>()
        two = Constant<value = int64 {2}>()
        q = Gather<axis = 0>(first, zero)
        k0 = Gather<axis = 0>(first, one)
        k = Transpose<perm = [0, 1, 3, 2]>(k0)
        v = Gather<axis = 0>(first, two)"""
    return attention(qkv, {"Wqkv": (12, 36), "bqkv": (36,)})


def split_attention() -> onnx.ModelProto:
    qkv = """
        [qkv] all = MatMul(n, Wqkv)
        q0, k0, v0 = Split<axis = 2>(all)
        q1 = Reshape(q0, four)
        q = Transpose<perm = [0, 2, 1, 3]>(q1)
        k1 = Reshape(k0, four)
        k = Transpose<perm = [0, 2, 3, 1]>(k1)
        v1 = Reshape(v0, four)
        v = Transpose<perm = [0, 2, 1, 3]>(v1)"""
    return attention(qkv, {"Wqkv": (12, 36)})


def separate_attention() -> onnx.ModelProto:
    """With a rotation of query and key, whose table goes along the features of each head."""
    qkv = """
        [query] q0 = MatMul(n, Wq)
        qb = Add(q0, bq)
        q1 = Reshape(qb, four)
        qt = Transpose<perm = [0, 2, 1, 3]>(q1)
        q = Mul(qt, turn)
        [key] k0 = MatMul(n, Wk)
        k1 = Reshape(k0, four)
        k = Transpose<perm = [0, 2, 3, 1]>(k1)
        [value] v0 = MatMul(n, Wv)
        v1 = Reshape(v0, four)
        v = Transpose<perm = [0, 2, 1, 3]>(v1)"""
    return attention(qkv, {"Wq": (12, 12), "bq": (12,), "Wk": (12, 12), "Wv": (12, 12), "turn": (5, 4)})


def single_head() -> onnx.ModelProto:
    body = """
        [query] q = MatMul(x, Wq)
        [key] k = MatMul(x, Wk)
        kt = Transpose<perm = [0, 2, 1]>(k)
        raw = MatMul(q, kt)
        p = Softmax(raw)
        [value] v = MatMul(x, Wv)
        mixed = MatMul(p, v)
        [project] y = MatMul(mixed, Wo)"""
    shapes: dict[str, tuple[int, ...]] = {"Wq": (12, 8), "Wk": (12, 8), "Wv": (12, 10), "Wo": (10, 12)}
    return conv_model(body, shapes, x="N, 5, 12", y="N, 5, 12")


def computed_shape() -> onnx.ModelProto:
    """The target of the Reshape takes batch and tokens from the input."""
    body = """
        [wide] h = MatMul(x, W0)
        shape = Shape(x)
        zero = Constant<value = int64 {0}>()
        one = Constant<value = int64 {1}>()
        first = Constant<value = int64[1] {0}>()
        n = Gather(shape, zero)
        t = Gather(shape, one)
        nu = Unsqueeze(n, first)
        tu = Unsqueeze(t, first)
        inner = Constant<value = int64[2] {12, 1}>()
        target = Concat<axis = 0>(nu, tu, inner)
        r = Reshape(h, target)
        last = Constant<value = int64[1] {3}>()
        s = Squeeze(r, last)
        [narrow] y = MatMul(s, W1)"""
    return conv_model(body, {"W0": (4, 12), "W1": (12, 6)}, x="N, T, 4", y="N, T, 6")


def shared_constants() -> onnx.ModelProto:
    """One bias for three layers: two lose different channels, the last one none; one shape for their results."""
    body = """
        [one] a = MatMul(x, W0)
        ab = Add(a, b)
        shape = Constant<value = int64[2] {0, 8}>()
        ar = Reshape(ab, shape)
        [two] c = MatMul(ar, W1)
        cb = Add(c, b)
        cr = Reshape(cb, shape)
        [three] d = MatMul(cr, W2)
        db = Add(d, b)
        y = Reshape(db, shape)"""
    return conv_model(body, {"W0": (4, 8), "W1": (8, 8), "W2": (8, 8), "b": (8,)}, x="N, 4", y="N, 8")


def stored_as_int8() -> onnx.ModelProto:
    body = """
        c0 = Cast<to = 1>(Q0)
        w0 = Mul(c0, s0)
        [wide] h = MatMul(x, w0)
        r = Relu(h)
        c1 = Cast<to = 1>(Q1)
        w1 = Mul(c1, s1)
        [narrow] y = MatMul(r, w1)"""
    codes = np.random.default_rng(0).integers(-127, 128, (4, 160)).astype(np.int8)
    weights = {"Q0": codes, "Q1": codes.reshape(160, 4), "s0": random_weights(1, 160), "s1": random_weights(1, 4)}
    return graph_model(f"g (float[N, 4] x) => (float[N, 4] y) {{ {body} }}", weights)


def computed_in_int8() -> onnx.ModelProto:
    body = """
        scale = Constant<value = float {0.05}>()
        zero = Constant<value = uint8 {128}>()
        q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        w0 = DequantizeLinear<axis = 0>(Q0, s0, z0)
        bias = DequantizeLinear<axis = 0>(Qb, s0)
        [wide] h = Conv(d, w0, bias)
        hq = QuantizeLinear(h, scale, zero)
        hd = DequantizeLinear(hq, scale, zero)
        w1 = DequantizeLinear<axis = 0>(Q1, s1)
        [narrow] y = Conv(hd, w1)"""
    rng = np.random.default_rng(0)
    weights = {
        "Q0": rng.integers(-127, 128, (16, 3, 1, 1)).astype(np.int8),
        "Qb": rng.integers(-127, 128, 16).astype(np.int32),
        "Q1": rng.integers(-127, 128, (5, 16, 1, 1)).astype(np.int8),
        **{"s0": np.full(16, 0.01, np.float32), "z0": np.zeros(16, np.int8), "s1": np.full(5, 0.01, np.float32)},
    }
    return graph_model(f"g (float[N, 3, 4, 4] x) => (float[N, 5, 4, 4] y) {{ {body} }}", weights)


def embedding_and_lstm() -> onnx.ModelProto:
    body = """
        [table] e = Gather(E, x)
        t = Transpose<perm = [1, 0, 2]>(e)
        [recurrent] h = LSTM<hidden_size = 4>(t, W, R)
        one = Constant<value = int64[1] {1}>()
        s = Squeeze(h, one)
        y = MatMul(s, V)"""
    weights = {"E": random_weights(20, 10), "W": random_weights(1, 16, 10), "R": random_weights(1, 16, 4, seed=1)}
    text = f"g (int64[N, T] x) => (float[T, N, 4] y) {{ {body} }}"
    return graph_model(text, weights, V=random_weights(4, 4, seed=2))


CASES: dict[str, Case] = {
    "residual": Case(residual, {("stem", "channels", 8), ("inner", "channels", 6)}),
    "depthwise": Case(depthwise, {("wide", "channels", 6)}),
    "many groups": Case(many_groups, {("wide", "channels", 6)}),
    "few groups": Case(few_groups, {("wide", "channels", 6), ("grouped", "channels", 5)}),
    "concat and parts": Case(
        concat_and_parts,
        {("left", "channels", 1), ("left #2", "channels", 2), ("left #3", "channels", 1), ("left #4", "channels", 2)}
        | {("right", "channels", 6), ("right #2", "channels", 1)},
    ),
    "equal parts": Case(equal_parts, {("wide", "channels", 6)}),
    "old operators": Case(
        old_operators, {("wide", "channels", 2), ("wide #2", "channels", 3), ("wide #3", "channels", 7)}
    ),
    "flattened": Case(flattened, {("wide", "channels", 6), ("hidden", "neurons", 9)}),
    "transposed convolution": Case(transposed_convolution, {("wide", "channels", 6), ("up", "channels", 7)}),
    "resized": Case(resized, {("wide", "channels", 6)}),
    "squeeze and excite": Case(squeeze_and_excite, {("wide", "channels", 8), ("down", "channels", 4)}),
    "shuffled": Case(shuffled, {("wide", "channels", 3), ("wide #2", "channels", 3)}),
    "space and depth": Case(space_and_depth, {("inner", "channels", 6)}),
    "fused attention": Case(fused_attention, {("qkv", "heads", 3), ("up", "neurons", 20)}),
    "split attention": Case(split_attention, {("qkv", "heads", 3), ("up", "neurons", 20)}),
    "separate attention": Case(separate_attention, {("query", "heads", 3), ("up", "neurons", 20)}),
    "single head": Case(single_head, {("query", "neurons", 8), ("value", "neurons", 10)}),
    "computed shape": Case(computed_shape, {("wide", "neurons", 12)}),
    "shared constants": Case(shared_constants, {("one", "neurons", 8), ("two", "neurons", 8)}),
    "stored as int8": Case(stored_as_int8, {("wide", "neurons", 160)}),
    "computed in int8": Case(computed_in_int8, {("wide", "channels", 16)}),
    "embedding and lstm": Case(embedding_and_lstm, {("table", "neurons", 10)}),
}
