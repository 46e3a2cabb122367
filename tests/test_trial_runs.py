"""Models that refuse inputs which their declared shapes allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxcomp import optimize
from onnxcomp.comparison import compare
from onnxcomp.errors import DataError, RuntimeFailure
from onnxcomp.verification import verify


def model(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return proto


def window(length: int) -> onnx.ModelProto:
    """A convolution over a signal, longer than the usual made-up one."""
    kernel = np.random.default_rng(0).standard_normal((2, 1, length)).astype(np.float32)
    text = "g (float[N, L] x) => (float[N, 2, M] y) { a = Constant<value_ints = [1]>()  c = Unsqueeze(x, a)  "
    return model(text + "i = Identity(c)  y = Conv(i, kernel) }", kernel=kernel)


def single() -> onnx.ModelProto:
    """Its batch is declared dynamic, and an inner shape makes it 1."""
    text = "g (float[N, 6] x) => (float[N, 6] y) { s = Constant<value_ints = [2, 3]>()  r = Reshape(x, s)  "
    return model(text + "t = Constant<value_ints = [1, 6]>()  u = Reshape(r, t)  i = Identity(u)  y = Relu(i) }")


def save(proto: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("from_file", [False, True])
def test_a_signal_is_made_longer_where_a_window_needs_it(tmp_path, from_file):
    proto = window(200)

    result = optimize(save(proto, tmp_path) if from_file else proto, timing=False, resume=False)

    assert "Identity" not in {node.op for node in result.model.graph.nodes}
    assert result.report.data["samples"] == 8


def test_samples_are_run_one_by_one_where_the_model_takes_no_more():
    result = optimize(single(), data={"x": np.ones((40, 6), np.float32)}, timing=False, resume=False)

    assert "Identity" not in {node.op for node in result.model.graph.nodes}
    assert result.report.data["samples"] == 40


@pytest.mark.parametrize("proto", [window(200), single()], ids=["window", "single"])
def test_such_models_are_compared_too(tmp_path, proto):
    path = save(proto, tmp_path)

    assert compare(path, path, timing=False).after.error == 0


def test_such_models_are_verified_too(tmp_path):
    path = save(single(), tmp_path)

    assert verify(path, path, layers=["cpu"]).passed


def test_a_model_that_refuses_every_size_is_an_error_that_names_the_first():
    with pytest.raises(DataError, match=r"does not run on inputs made up for it \(x=8,100\); give --data or --shape"):
        optimize(window(5000), resume=False)


def test_the_sizes_of_a_users_samples_stay(tmp_path):
    with pytest.raises(RuntimeFailure, match="Invalid input shape"):
        optimize(window(200), data={"x": np.ones((4, 100), np.float32)}, resume=False)


def test_what_is_made_up_keeps_the_shape_that_was_asked_for():
    with pytest.raises(DataError, match="x=1,120"):
        optimize(window(200), shapes={"x": (1, 120)}, resume=False)
