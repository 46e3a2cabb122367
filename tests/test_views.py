"""Weights in every form that a model holds them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnxcomp import Changes, Context, Model
from onnxcomp.weights import Spool
from onnxcomp_passes import Float16, QuantizeWeights
from onnxcomp_passes._views import find_views, wanted_views

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(5)
WEIGHT = RNG.normal(size=(64, 48)).astype(np.float32)


def matmul(weight: Array = WEIGHT, nodes: tuple[onnx.NodeProto, ...] = (), **more: Array) -> Model:
    """A MatMul whose weight is called W."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["x", "W"], ["y"], name="layer")],
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["N", 64])],
        [info("y", onnx.TensorProto.FLOAT, ["N", 48])],
        [numpy_helper.from_array(value, name) for name, value in {"W": weight, **more}.items() if value.size],
    )
    return Model.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def qdq(codes: Array, scale: Array, zero: Array | None = None, axis: int = 1) -> Model:
    """A MatMul behind a DequantizeLinear."""
    inputs = ["q", "s"] + ([] if zero is None else ["z"])
    node = helper.make_node("DequantizeLinear", inputs, ["W"], axis=axis)
    more = {"q": codes, "s": scale} | ({} if zero is None else {"z": zero})
    return matmul(np.empty(0, np.float32), (node,), **more)


def stored(**options: Any) -> Model:
    model = matmul()
    QuantizeWeights(**options).rewrite(model, Context())
    return model


def half() -> Model:
    model = matmul()
    Float16(storage_only=True).rewrite(model, Context())
    return model


CODES = RNG.integers(-127, 128, (64, 48)).astype(np.int8)
SCALE = RNG.uniform(0.01, 0.02, 48).astype(np.float32)
FORMS: dict[str, Callable[[], Model]] = {
    "float": matmul,
    "float16": half,
    "stored": stored,
    "stored, blocks": lambda: stored(block=16),
    "stored, zero points": lambda: stored(symmetric=False),
    "qdq": lambda: qdq(CODES, SCALE),
    "qdq, per tensor": lambda: qdq(CODES, np.array(0.01, np.float32)),
    "qdq, rows": lambda: qdq(CODES, RNG.uniform(0.01, 0.02, 64).astype(np.float32), axis=0),
    "qdq, zero points": lambda: qdq(CODES.astype(np.uint8), SCALE, RNG.integers(100, 150, 48).astype(np.uint8)),
}


def weight_of(model: Model) -> Array:
    """The weight that the operator sees, by ONNX Runtime's own arithmetic: the product with the identity.

    Not optimized, since MatMulNBits would round the identity's product.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.to_proto().SerializeToString(), options)
    return np.asarray(session.run(None, {"x": np.eye(64, dtype=np.float32)})[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_read_as_its_operator_sees_it(form: str) -> None:
    model = FORMS[form]()
    [view] = find_views(model)
    assert view.form == form.partition(",")[0]
    assert (view.node.name, view.index, view.shape) == ("layer", 1, (64, 48))
    np.testing.assert_allclose(view.read(), weight_of(model), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_writing_back_what_was_read_changes_nothing(form: str) -> None:
    model = FORMS[form]()
    before = model.digest
    [view] = find_views(model)
    view.write(view.read(), Spool())
    assert model.digest == before


@pytest.mark.parametrize("form", [form for form in FORMS if form != "stored, zero points"])
def test_zeros_are_written_as_exact_zeros_and_the_rest_stays(form: str) -> None:
    model = FORMS[form]()
    [view] = find_views(model)
    value = view.read()
    pruned = np.where(np.abs(value) < 0.5, np.float32(0), value)
    view.write(pruned, Spool())
    found = weight_of(model)
    np.testing.assert_array_equal(found == 0, pruned == 0)
    np.testing.assert_allclose(found, pruned, rtol=1e-6, atol=1e-7)


def test_a_grid_knows_whether_it_has_a_zero() -> None:
    [view] = find_views(qdq(CODES.astype(np.uint8), SCALE, np.full(48, 128, np.uint8)))
    grid = view.grid()
    assert grid is not None
    assert grid.zero_code is not None
    assert (grid.zero_code == 128).all()
    assert (grid.encode(np.zeros(view.shape, np.float32)) == 128).all()


def test_codes_stay_in_the_range_that_they_had() -> None:
    narrow = np.clip(CODES, -63, 63)
    [view] = find_views(qdq(narrow, SCALE))
    grid = view.grid()
    assert grid is not None
    assert np.abs(grid.encode(view.read() * 2)).max() == 63


def test_codes_with_other_readers_have_no_view() -> None:
    nodes = (
        helper.make_node("DequantizeLinear", ["q", "s"], ["W"], axis=1),
        helper.make_node("Cast", ["q"], ["other"], to=onnx.TensorProto.FLOAT),
    )
    assert not find_views(matmul(np.empty(0, np.float32), nodes, q=CODES, s=SCALE))


def test_what_is_not_wanted_is_left_with_a_reason() -> None:
    changes = Changes()
    assert not wanted_views(matmul(WEIGHT.astype(np.float64)), Context(), changes)
    assert not wanted_views(matmul(), Context(exclude=("lay*",)), changes)
    assert not wanted_views(matmul(), Context(), changes, min_elements=10_000)
    assert [left.why for left in changes.left] == [
        "is float64, not float32",
        "excluded",
        "has fewer than 10000 elements",
    ]
