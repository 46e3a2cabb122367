"""What samples tell of a candidate: nothing, where any model would give the same on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxcomp import optimize
from onnxcomp.budget import Budget
from onnxcomp.ledger import Report
from onnxcomp.telling import are_constant, constant_drop
from onnxcomp_passes import QuantizeWeights
from tests.test_judge import loss

Array = np.ndarray[Any, Any]
SAMPLES = 32


def rows(*values: float) -> Array:
    return np.array(values, np.float32).reshape(-1, 1) * np.ones((1, 3), np.float32)


def banded(above: float, *, labels_only: bool = False) -> Any:
    """A dense layer whose result counts only where its sum is above a limit; else the output is 1."""
    end = "k = Cast<to=7>(m) s = ReduceSum(k, axes) y = Add(s, one)" if labels_only else "y = Where(m, h, rest)"
    kind = "int64[N,1]" if labels_only else "float[N,64]"
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 64] x) => ({kind} y)'
        f"{{ i = Identity(x) h = MatMul(i, W) m = Greater(h, limit) {end} }}"
    )
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    constants = {
        "W": weight,
        "limit": np.float32(above),
        "rest": np.float32(1),
        "axes": np.array([1], np.int64),
        "one": np.int64(1),
    }
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in read)
    return proto


def report_of(proto: Any, *, data: bool, **options: Any) -> Report:
    values = np.random.default_rng(1).normal(size=(SAMPLES, 64)).astype(np.float32)
    return optimize(proto, data={"x": values} if data else None, timing=False, resume=False, **options).report


@pytest.mark.parametrize(
    ("outputs", "constant"),
    [
        ([rows(2, 2), rows(2)], True),
        ([rows(2, 2), rows(3)], False),
        ([rows(2, 2 + 1e-7), rows(2)], True),
        ([rows(np.nan, np.nan), rows(np.nan)], True),
        ([np.array([[4], [4]]), np.array([[4]])], True),
        ([np.array([[4], [5]]), np.array([[4]])], False),
        ([np.array(["cat", "cat"], object), np.array(["cat"], object)], True),
        ([np.array(["cat", "dog"], object), np.array(["cat"], object)], False),
        ([np.zeros((0, 6), np.float32), np.zeros((0, 6), np.float32)], True),
        ([np.ones((2, 6), np.float32), np.ones((3, 6), np.float32)], False),
    ],
)
def test_outputs_are_constant_where_all_samples_give_the_same(outputs: list[Array], constant: bool) -> None:
    assert are_constant([[output] for output in outputs], [2, 1]) is constant


def test_one_output_that_moves_is_enough_to_tell() -> None:
    assert not are_constant([[rows(1, 1), rows(1, 2)]], [2])


def test_one_sample_alone_does_not_show_that_an_output_is_constant() -> None:
    assert not are_constant([[rows(1)]], [1])


def test_one_answer_for_all_loses_the_classes_that_it_never_names() -> None:
    sequences = np.stack([np.eye(4)[[0, 0, 1]], np.eye(4)[[0, 2, 1]]])
    assert constant_drop(sequences) == pytest.approx(1 / 6)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("labels_only", [True, False])
def test_where_the_outputs_never_move_only_lossless_stages_are_kept(data: bool, labels_only: bool) -> None:
    report = report_of(banded(1e9, labels_only=labels_only), data=data)

    kept = [entry.name for entry in report.stages if entry.verdict == "kept"]
    assert kept == ["simplify"]
    assert report.stages[1].reason == "the model's outputs are the same for all samples, so no loss can be measured"
    assert any("give --data that moves the outputs" in warning for warning in report.warnings)


def test_where_the_outputs_move_weights_are_stored_small() -> None:
    report = report_of(banded(0.0), data=False)

    assert "quantize-weights" in [entry.name for entry in report.stages if entry.verdict == "kept"]


@pytest.mark.parametrize(("constant", "allowed"), [(0.004, False), (0.006, True), (None, True)])
def test_a_drop_that_one_answer_for_all_would_hold_is_no_proof_of_class_scores(
    constant: float | None, allowed: bool
) -> None:
    ruined = loss(kind="expected-drop", drop=0.001, plain_error=0.03, error=1.5, constant_drop=constant)

    assert Budget().allows(ruined) is allowed


def test_the_report_warns_of_scores_that_hardly_differ() -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 64] x) => (float[N, 8] y)'
        "{ h = MatMul(x, W) s = Mul(h, little) y = Softmax(s) }"
    )
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    constants = {"W": weight, "little": np.float32(1e-3)}
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())

    report = report_of(proto, data=True, passes=[QuantizeWeights()])

    assert report.stages[0].reason.endswith(f"relative error {report.stages[0].attempts[0].error:.2%}")
    assert any("one answer for all samples would lose" in warning for warning in report.warnings)
