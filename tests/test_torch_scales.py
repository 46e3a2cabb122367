"""Scales of int32 biases, which kernels take for the product of the scales of a layer's input and weight."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.model import Model
from onnxcomp.torch_bridge import load
from tests.models import graph_model

LAYER = """wd{n} = DequantizeLinear(w, ws{n}) bd{n} = DequantizeLinear(b, bs{n})
    {y} = Gemm<transB = 1>(xd, wd{n}, {b})"""
CONSTANTS = {
    "xs": np.asarray(0.05, np.float32),
    "xz": np.asarray(0, np.int8),
    "w": np.asarray([[1, 2, 3], [-4, 5, -127]], np.int8),
    "b": np.asarray([9, -7], np.int32),
}


def learnt(layers: str, *, ws: str = "", **scales: float) -> set[str]:
    """Names of the scales that are learnt, and those that follow; of layers behind one quantized input."""
    text = f"""g (float[N, 3] x) => (float[N, 2] y0)
        {{ {ws} q = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(q, xs, xz) {layers} }}"""
    floats = {name: np.asarray(value, np.float32) for name, value in scales.items()}
    module = load(Model.load(graph_model(text, CONSTANTS | floats)), learn_scales=True)
    return {*module.scale_names, *module._products}


def layer(number: int, *, bias: str = "") -> str:
    return LAYER.format(n=number, y=f"y{number}", b=bias or f"bd{number}")


def test_a_bias_follows_scales_that_constant_nodes_hold_too():
    found = learnt(layer(0), ws="ws0 = Constant <value = float {0.1}> ()", bs0=0.005)

    assert found == {"xs", "ws0", "bs0"}


def test_scales_stay_where_the_layer_of_a_bias_is_not_seen():
    found = learnt(layer(0) + " bd1 = DequantizeLinear(b, bs0) s = Relu(bd1)", ws0=0.1, bs0=0.005)

    assert found == set()


@pytest.mark.parametrize("shared", ["ws0", "ws1"])
def test_scales_stay_where_a_bias_would_have_to_follow_two_layers(shared):
    second = layer(1, bias="bd0").replace("ws1", shared)
    found = learnt(layer(0) + second, ws0=0.1, ws1=0.2, bs0=0.005, bs1=0.005)

    assert found == ({"xs", "ws0", "bs0"} if shared == "ws0" else set())


def test_scales_stay_where_another_that_stays_is_a_part_of_the_same_bias():
    chain = f"""{layer(0)} {layer(1)} vd = DequantizeLinear(w, ws1) vb = DequantizeLinear(b, bs2)
        ud = DequantizeLinear(w, us) y2 = Gemm<transB = 1>(ud, vd, vb)
        td = DequantizeLinear(w, ws3) y3 = Gemm<transB = 1>(xd, td, bd1)"""
    found = learnt(chain, ws0=0.1, ws1=0.1, ws3=0.1, bs0=0.005, bs1=0.005, bs2=0.005, us=0.1)

    assert found == set()
