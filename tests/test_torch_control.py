"""Control flow and sequences in the bridge: weights inside of subgraphs are trained and written back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import parser

from onnxcomp.model import Model
from onnxcomp.torch_bridge import load

Array = np.ndarray[Any, Any]

BRANCHES = """<ir_version: 8, opset_import: ["": 17]>
g (bool c, float[N, 2] x) => (float[N, 2] y) <float[2, 2] outer = {1, 2, 3, 4}> {
    h = MatMul(x, outer)
    y = If(c) <
        then_branch = t () => (float[N, 2] a) <float[2] w = {0.5, 2}> { a = Mul(h, w) },
        else_branch = e () => (float[N, 2] b) <float[2] v = {3, -1}> { b = Add(h, v) }
    >
}"""

ROUNDS = """<ir_version: 8, opset_import: ["": 17]>
g (int64 n, float[N, 2] x) => (float[N, 2] y, float[M, N, 2] all) {
    y, all = Loop(n, , x) <
        body = b (int64 i, bool go, float[N, 2] s) => (bool more, float[N, 2] t, float[N, 2] u)
        <float[2, 2] w = {0.5, 0.25, -0.5, 1}> {
            more = Identity(go)
            m = MatMul(s, w)
            t = Tanh(m)
            u = Identity(t)
        }
    >
}"""

SCAN = """<ir_version: 8, opset_import: ["": 17]>
g (float[2] start, float[M, 2] x) => (float[2] y, float[M, 2] all) {
    y, all = Scan <
        num_scan_inputs = 1,
        body = b (float[2] s, float[2] r) => (float[2] t, float[2] u)
        <float[2] w = {0.5, -2}> { m = Mul(s, w)  t = Add(m, r)  u = Identity(t) }
    > (start, x)
}"""

ROUNDING = 1e-6
"""Some float32 roundings (6e-8) of values below ten."""


def expected(text: str, feed: dict[str, Array]) -> list[Array]:
    session = onnxruntime.InferenceSession(parser.parse_model(text).SerializeToString())
    return list(session.run(None, feed))


def check_trains(text: str, feed: dict[str, Array], weights: list[str]) -> None:
    """The outputs are those of ONNX Runtime, before a step of training and, written back, after it."""
    model = Model.load(parser.parse_model(text))
    module = load(model)
    given = {name: torch.from_numpy(value) for name, value in feed.items()}
    for wanted, got in zip(expected(text, feed), module.run(given).values(), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), wanted, atol=ROUNDING)
    assert module.write_back(model) == []

    sum((value**2).sum() for value in module.run(given).values()).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    trained = [value.detach().numpy() for value in module.run(given).values()]

    assert sorted(module.write_back(model)) == sorted(weights)
    session = onnxruntime.InferenceSession(model.to_proto().SerializeToString())
    for wanted, got in zip(session.run(None, feed), trained, strict=True):
        np.testing.assert_allclose(got, wanted, atol=ROUNDING)


@pytest.mark.parametrize(("chosen", "weights"), [(True, ["outer", "w"]), (False, ["outer", "v"])])
def test_weights_in_the_branch_that_runs_are_trained(chosen, weights):
    feed = {"c": np.array(chosen), "x": np.array([[0.5, -1]], np.float32)}

    check_trains(BRANCHES, feed, weights)


def test_weights_in_the_body_of_a_loop_are_trained():
    check_trains(ROUNDS, {"n": np.array(3), "x": np.array([[0.5, -1], [1, 2]], np.float32)}, ["w"])


def test_weights_in_the_body_of_a_scan_are_trained():
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)

    check_trains(SCAN, {"start": np.ones(2, np.float32), "x": x}, ["w"])


def test_a_loop_ends_when_its_condition_does():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float x, float limit) => (float y) {
        yes = Constant<value = bool {1}>()
        y = Loop(, yes, x) <body = b (int64 i, bool go, float s) => (bool more, float t) {
            t = Add(s, s)
            more = Less(t, limit)
        }>
    }"""

    assert load(parser.parse_model(text))(torch.tensor(1.0), torch.tensor(9.0)).item() == 16


def test_gradients_pass_through_sequences():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[4, 2] x) => (float[2, 2] y) {
        two = Constant<value = int64 {2}>()
        last = Constant<value = int64 {-1}>()
        parts = SplitToSequence(x, two)
        part = SequenceAt(parts, last)
        seen = SequenceConstruct(part)
        y = ConcatFromSequence<axis = 0>(seen)
    }"""
    x = torch.ones(4, 2, requires_grad=True)

    load(parser.parse_model(text))(x).sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_an_empty_sequence_of_constants_alone_is_made_in_each_run():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[1, 2] y) {
        none = SequenceEmpty()
        one = SequenceInsert(none, x)
        y = ConcatFromSequence<axis = 0, new_axis = 1>(one)
    }"""

    assert load(parser.parse_model(text))(torch.ones(2)).tolist() == [[1, 1]]


def test_an_input_with_a_default_need_not_be_given():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[2] b) => (float[2] y)
        <float[2] b = {1, 2}> { y = Add(x, b) }"""
    module = load(parser.parse_model(text))

    assert module(torch.ones(2)).tolist() == [2, 3]
    assert module(torch.ones(2), torch.zeros(2)).tolist() == [1, 1]
    assert module.run({"x": torch.ones(2), "b": torch.ones(2)})["y"].tolist() == [2, 2]
