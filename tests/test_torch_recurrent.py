"""LSTM, GRU and RNN of the bridge: all their options against ONNX Runtime, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.torch_bridge import NodeCall, load
from onnxcomp.torch_bridge.registry import find_operator

Array = np.ndarray[Any, Any]

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 3
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FUNCTIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}

ROUNDING = 2e-5
"""Of values up to some units after five steps, each a sum of some ten products; ONNX Runtime's own sigmoid and tanh are
approximations within 1e-6."""

BOUNDED = ("Sigmoid", "Tanh", "HardSigmoid", "Softsign", "ScaledTanh")
"""Activations that keep the state in range, so that rounding does not grow."""


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A node's operator and attributes, and which of its optional inputs it has."""
    op = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    count = 2 if direction == "bidirectional" else 1
    attrs: dict[str, Any] = {"hidden_size": HIDDEN, "direction": direction}
    if draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(BOUNDED), min_size=FUNCTIONS[op], max_size=FUNCTIONS[op]))
        attrs["activations"] = names * count
        with_alpha = [name for name in names * count if name in {"HardSigmoid", "ScaledTanh"}]
        if with_alpha:
            attrs["activation_alpha"] = [0.3 if name == "HardSigmoid" else 1.2 for name in with_alpha]
            attrs["activation_beta"] = [0.4 if name == "HardSigmoid" else 0.8 for name in with_alpha]
    if draw(st.booleans()):
        attrs["clip"] = 0.7
    if op == "GRU":
        attrs["linear_before_reset"] = draw(st.integers(0, 1))
    if op == "LSTM" and draw(st.booleans()):
        attrs["input_forget"] = 1
    optional = draw(st.sets(st.sampled_from(["bias", "lengths", "hidden", *(["cell", "peepholes"] * (op == "LSTM"))])))
    return {"op": op, "attrs": attrs, "optional": optional, "seed": draw(st.integers(0, 1000))}


def model_of(case: dict[str, Any]) -> tuple[Any, dict[str, Array]]:
    """The model of a case, its weights initializers, and its inputs."""
    op, attrs = case["op"], case["attrs"]
    rng = np.random.default_rng(case["seed"])
    count = 2 if attrs["direction"] == "bidirectional" else 1
    gates = GATES[op]

    def weight(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32) * np.float32(0.6)

    weights = {"W": weight(count, gates * HIDDEN, INPUTS), "R": weight(count, gates * HIDDEN, HIDDEN)}
    inputs = {"x": weight(STEPS, BATCH, INPUTS)}
    if "bias" in case["optional"]:
        weights["B"] = weight(count, 2 * gates * HIDDEN)
    if "peepholes" in case["optional"]:
        weights["P"] = weight(count, 3 * HIDDEN)
    if "lengths" in case["optional"]:
        inputs["lengths"] = np.array([STEPS, 2, 3], np.int32)
    for name, key in (("hidden", "h"), ("cell", "c")):
        if name in case["optional"]:
            inputs[key] = weight(count, BATCH, HIDDEN)
    names = ["x", "W", "R", "B", "lengths", "h", *(["c", "P"] if op == "LSTM" else [])]
    given = [name if name in weights or name in inputs else "" for name in names]
    outputs = ["y", "y_h", *(["y_c"] if op == "LSTM" else [])]
    graph = helper.make_graph(
        [helper.make_node(op, given, outputs, **attrs)],
        "g",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), inputs


@seed(7)
@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_all_options_give_what_onnxruntime_gives(case):
    model, inputs = model_of(case)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, inputs)

    with torch.no_grad():
        got = load(model).run({name: torch.from_numpy(value) for name, value in inputs.items()})

    for wanted, value in zip(expected, got.values(), strict=True):
        np.testing.assert_allclose(value.numpy(), wanted, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_a_layout_with_the_batch_first_is_the_same_turned_around(op, direction):
    case = {"op": op, "attrs": {"hidden_size": HIDDEN, "direction": direction}, "optional": {"hidden"}, "seed": 1}
    model, inputs = model_of(case)
    feed = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        y, *states = load(model).run(feed).values()
    model.graph.node[0].attribute.append(helper.make_attribute("layout", 1))
    turned = {name: value.transpose(0, 1) for name, value in feed.items()}

    with torch.no_grad():
        y_turned, *states_turned = load(model).run(turned).values()

    torch.testing.assert_close(y_turned, y.permute(2, 0, 1, 3))
    torch.testing.assert_close(states_turned, [state.transpose(0, 1) for state in states])


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("LSTM", {}),
        ("LSTM", {"input_forget": 1}),
        ("LSTM", {"direction": "bidirectional"}),
        ("GRU", {}),
        ("GRU", {"linear_before_reset": 1, "direction": "reverse"}),
        ("RNN", {}),
        ("RNN", {"activations": ["Softsign"]}),
    ],
)
def test_gradients_are_those_of_small_changes(op, attrs):
    function = find_operator("", op)
    assert function is not None
    generator = torch.Generator().manual_seed(3)
    count = 2 if attrs.get("direction") == "bidirectional" else 1
    rows = GATES[op] * HIDDEN
    shapes = [(STEPS, 2, INPUTS), (count, rows, INPUTS), (count, rows, HIDDEN), (count, 2 * rows)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    assert torch.autograd.gradcheck(lambda *each: function(NodeCall("n", op, attrs=attrs), *each), inputs)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_usual_options_run_in_the_kernels_of_torch(op, monkeypatch):
    case = {"op": op, "attrs": {"hidden_size": HIDDEN, "direction": "forward"}, "optional": {"bias"}, "seed": 1}
    case["attrs"] |= {"linear_before_reset": 1} if op == "GRU" else {}
    model, inputs = model_of(case)
    module = load(model)
    monkeypatch.setattr("onnxcomp.torch_bridge.operators.recurrent._unrolled", None)

    assert len(module.run({name: torch.from_numpy(value) for name, value in inputs.items()})) == 3 - (op == "GRU")


def test_an_unknown_activation_is_named():
    case = {"op": "RNN", "attrs": {"hidden_size": HIDDEN, "direction": "forward"}, "optional": set(), "seed": 1}
    model, inputs = model_of(case)
    model.graph.node[0].attribute.append(helper.make_attribute("activations", ["Sine"]))
    module = load(model)

    with pytest.raises(Exception, match=r"\(RNN\).*: the activation 'sine'"):
        module.run({"x": torch.from_numpy(inputs["x"])})
