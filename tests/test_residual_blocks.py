"""Whole residual blocks: which there are, and what is left without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.budget import Budget
from onnxcomp.data import input_specs, open_data
from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.runtime import Runtime
from onnxcomp.targets import host_target
from onnxcomp_passes._constant_channels import ConstantChannels
from onnxcomp_passes._residual import choose_blocks, empty_blocks, removable_blocks, remove_blocks
from tests.models import assert_same_outputs, graph_model, ops, random_inputs, random_weights
from tests.patterns import attention

CHAIN = """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
    [stem] a = Conv<pads = [1, 1, 1, 1]>(x, W0)
    r = Relu(a)
    [c1] b = Conv<pads = [1, 1, 1, 1]>(r, W1)
    [c2] c = Conv<pads = [1, 1, 1, 1]>(b, W2, b2)
    [first] s = Add(c, r)
    t = Relu(s)
    [c3] d = Conv<pads = [1, 1, 1, 1]>(t, W3)
    e = Sigmoid(d)
    f = Mul(d, e)
    [second] u = Add(t, f)
    y = Conv<pads = [1, 1, 1, 1]>(u, W4)
}"""


def chain(**changed: Any) -> onnx.ModelProto:
    """Two residual blocks in a row."""
    weights = {f"W{n}": random_weights(4, 4, 3, 3, seed=n, scale=0.2) for n in range(5)}
    return graph_model(CHAIN, {**weights, "b2": np.zeros(4, np.float32), **changed})


def test_finds_the_blocks_of_a_chain():
    blocks = removable_blocks(Model.load(chain()))

    assert [(block.name, block.kept) for block in blocks] == [("first", "r"), ("second", "t")]
    assert blocks[0].nodes == {"c1", "c2"}


def test_blocks_in_a_row_go_together():
    model = Model.load(chain())

    remove_blocks(model, removable_blocks(model))

    assert ops(model) == ["Conv", "Relu", "Relu", "Conv"]
    proto = chain()
    shorter = graph_model(
        """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, W0) r = Relu(a) y = Conv<pads = [1, 1, 1, 1]>(r, W4) }""",
        {name: random_weights(4, 4, 3, 3, seed=int(name[1]), scale=0.2) for name in ("W0", "W4")},
    )
    assert_same_outputs(shorter, model, random_inputs(proto))


def test_a_block_whose_last_layer_is_zero_goes_exactly():
    proto = chain(W2=np.zeros((4, 4, 3, 3), np.float32))
    model = Model.load(proto)

    blocks = empty_blocks(model, ConstantChannels(model))
    remove_blocks(model, blocks)

    assert [block.name for block in blocks] == ["first"]
    assert ops(model) == ["Conv", "Relu", "Relu", "Conv", "Sigmoid", "Mul", "Add", "Conv"]
    assert_same_outputs(proto, model, random_inputs(proto))


@pytest.mark.parametrize("bias", [np.full(4, 0.5, np.float32), np.array([0, 0, 0, 1], np.float32)])
def test_a_block_that_adds_a_constant_is_not_empty(bias):
    model = Model.load(chain(W2=np.zeros((4, 4, 3, 3), np.float32), b2=bias))

    assert empty_blocks(model, ConstantChannels(model)) == []


def test_a_sum_of_two_branches_is_no_block():
    text = """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
        r = Relu(x) a = Conv(r, W1) b = Conv(r, W2) y = Add(a, b) }"""
    model = Model.load(graph_model(text, {f"W{n}": random_weights(4, 4, 1, 1, seed=n) for n in (1, 2)}))

    assert removable_blocks(model) == []


def test_a_sum_that_broadcasts_is_no_block():
    text = """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
        r = Relu(x) m = GlobalAveragePool(r) y = Add(r, m) }"""

    assert removable_blocks(Model.load(graph_model(text))) == []


def test_attention_with_a_mask_is_a_block():
    blocks = removable_blocks(Model.load(attention(masked=True)))

    assert [(block.output, block.kept) for block in blocks] == [("s", "x")]


def test_a_branch_that_is_an_output_stays():
    text = """g (float[N, 4] x) => (float[N, 4] y, float[N, 4] f) { r = Relu(x) f = Tanh(r) y = Add(r, f) }"""

    assert removable_blocks(Model.load(graph_model(text))) == []


def test_a_block_whose_sum_is_the_output_leaves_what_it_kept():
    proto = graph_model(
        "g (float[N, 4] x) => (float[N, 4] y) { f = Gemm(x, W) y = Add(x, f) }", W=np.zeros((4, 4), "f")
    )
    model = Model.load(proto)

    remove_blocks(model, empty_blocks(model, ConstantChannels(model)))

    assert ops(model) == ["Identity"]
    assert_same_outputs(proto, model, random_inputs(proto))


def test_chooses_the_blocks_that_the_budget_allows(tmp_path):
    proto = chain(W2=1e-4 * random_weights(4, 4, 3, 3, seed=2))
    data = open_data({"x": random_weights(64, 4, 6, 6, seed=9)}, input_specs(proto))
    with Runtime() as runtime:
        settings: dict[str, Any] = {"metric": None, "budget": Budget(), "target": host_target(), "runtime": runtime}
        judge = Judge(Model.load(proto), select=data, confirm=data, workdir=tmp_path, **settings)
        chosen = choose_blocks(Model.load(proto), Context(judge=judge))

    assert [block.name for block in chosen] == ["first"]
