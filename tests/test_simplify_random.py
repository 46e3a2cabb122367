from __future__ import annotations

import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes.simplify import Simplify
from tests.models import assert_same_outputs, random_inputs
from tests.strategies import small_graphs

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(small_graphs())
@SETTINGS
def test_any_graph_computes_the_same_is_valid_and_not_bigger(proto):
    model = Model.load(proto)

    Simplify().rewrite(model, Context())

    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    assert result.ByteSize() <= proto.ByteSize()
    assert (result.graph.input, result.graph.output) == (proto.graph.input, proto.graph.output)
    assert_same_outputs(proto, result, random_inputs(proto))


@given(small_graphs())
@SETTINGS
def test_a_second_time_nothing_changes(proto):
    model = Model.load(proto)
    first = Simplify().rewrite(model, Context())
    once = model.to_proto()

    second = Simplify().rewrite(model, Context())

    assert second.count == 0
    assert model.to_proto() == once
    assert (first.count == 0) == (once == Model.load(proto).to_proto())


@given(small_graphs())
@SETTINGS
def test_the_result_is_always_the_same(proto):
    models = [Model.load(proto) for _ in range(2)]

    for model in models:
        Simplify().rewrite(model, Context())

    assert models[0].to_proto() == models[1].to_proto()


@given(small_graphs(max_nodes=6))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_graph_simplified_works_for_another_batch_size(proto):
    model = Model.load(proto)

    Simplify().rewrite(model, Context())

    assert_same_outputs(proto, model, random_inputs(proto, batch=1))


def test_the_comparison_fails_for_a_wrong_model():
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {y = Exp(x)}'
    )
    wrong = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {y = Neg(x)}'
    )

    with pytest.raises(AssertionError):
        assert_same_outputs(proto, wrong, random_inputs(proto))
