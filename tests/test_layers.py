"""Errors by layer: each tensor of a model against the same tensor of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxcomp.data import input_specs, open_data
from onnxcomp.deviation import TensorError
from onnxcomp.errors import ModelError, RuntimeFailure
from onnxcomp.layers import channel_axes, layer_errors, tensor_pairs
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.runtime import Array, Feed, Runtime, observing
from onnxcomp.targets import find_target
from onnxcomp_passes.quantize import Quantize
from onnxcomp_passes.simplify import Simplify
from tests.models import graph_model, if_model, loop_model, mlp_model, random_inputs, random_weights

FLOAT64_SUMS = 1e-9
"""Relative: sums of some thousands of float64 squares in another order."""

SAMPLES = Path(__file__).parent.parent / "sample_models"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


@pytest.fixture
def errors(runtime: Runtime, tmp_path: Path) -> Callable[..., dict[str, TensorError]]:
    def measure(one: onnx.ModelProto, other: onnx.ModelProto, feeds: Iterable[Feed], *names: str):
        paths = tmp_path / "original.onnx", tmp_path / "candidate.onnx"
        for model, path in zip((one, other), paths, strict=True):
            onnx.save(model, path)
        kept = list(feeds)
        return layer_errors(runtime, *paths, lambda: kept, names or None)

    return measure


def batches(*rows: int, columns: int = 8, seed: int = 0) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(count, columns)).astype(np.float32)} for count in rows]


def with_weight(model: onnx.ModelProto, name: str, change: Callable[[Array], Array]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))
    return copy


def noisy(weight: Array) -> Array:
    return weight + random_weights(*weight.shape, seed=9, scale=0.1)


def values(model: onnx.ModelProto, name: str, feeds: Iterable[Feed]) -> Array:
    """A tensor over all feeds, as ONNX Runtime gives it when it is a graph output beside the model's own."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {info.name for info in copy.graph.output}
    copy.graph.output.extend(
        onnx.ValueInfoProto(name=output) for node in model.graph.node for output in node.output if output not in present
    )
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run([name], dict(feed))[0], np.float64) for feed in feeds])


# --- the sums ---------------------------------------------------------------------------------------------------------


def test_sums_over_runs_are_those_of_all_values_together():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(n, 3, 5)).astype(np.float32), rng.normal(size=(n, 3, 5)).astype(np.float32))
             for n in (2, 7)]  # fmt: skip
    error = TensorError(axis=1)
    for pair in pairs:
        error.update(*pair)

    a, b = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    assert error.count == a.size
    assert error.noise == pytest.approx(np.square(b - a).sum(), rel=FLOAT64_SUMS)
    assert error.relative_error == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=FLOAT64_SUMS)
    assert error.mean_shift == pytest.approx((b - a).mean(), rel=1e-6)
    assert error.max_abs_error == np.abs(b - a).max()
    assert (error.low, error.high) == (a.min(), a.max())
    assert (error.candidate_low, error.candidate_high) == (b.min(), b.max())
    assert error.channels is not None
    np.testing.assert_allclose(error.channels.noise, np.square(b - a).sum(axis=(0, 2)), rtol=FLOAT64_SUMS)
    np.testing.assert_allclose(error.channels.shift, (b - a).sum(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_array_equal(error.channels.peak, np.abs(a).max(axis=(0, 2)))


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 100, 7), (1, 3, 1000), (4, 6)])
def test_large_tensors_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]):
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=shape) for _ in range(2))
    whole, pieces = TensorError(axis=1), TensorError(axis=1)
    whole.update(a, b)
    monkeypatch.setattr("onnxcomp.deviation.BLOCK", 32)
    pieces.update(a, b)

    assert pieces.count == whole.count
    assert pieces.noise == pytest.approx(whole.noise, rel=FLOAT64_SUMS)
    assert pieces.max_abs_error == whole.max_abs_error
    assert pieces.clip_noise == pytest.approx(whole.clip_noise, rel=FLOAT64_SUMS)
    assert whole.channels is not None
    assert pieces.channels is not None
    np.testing.assert_allclose(pieces.channels.noise, whole.channels.noise, rtol=FLOAT64_SUMS)
    np.testing.assert_array_equal(pieces.channels.high, whole.channels.high)


def test_a_clipped_tail_is_told_from_noise():
    a = np.random.default_rng(0).normal(size=(64, 16))
    clipped, rounded = TensorError(), TensorError()
    clipped.update(a, a.clip(-1, 1))
    rounded.update(a, np.round(a, 1))

    assert clipped.clip_share == pytest.approx(1, rel=FLOAT64_SUMS)
    assert rounded.clip_share < 0.05


def test_a_shift_of_each_channel_is_told_from_noise():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(64, 16))
    shifted, shaken = TensorError(), TensorError()
    shifted.update(a, a + rng.normal(size=16))
    shaken.update(a, a + rng.normal(size=a.shape))

    assert shifted.shift_share == pytest.approx(1, rel=FLOAT64_SUMS)
    assert shaken.shift_share < 0.05


def test_the_worst_channel_has_the_least_signal_to_noise():
    a = np.random.default_rng(0).normal(size=(32, 4))
    b = a.copy()
    b[:, 2] *= 1.1
    error = TensorError()
    error.update(a, b)

    assert error.channels is not None
    decibels = error.channels.sqnr_db
    assert decibels[2] == pytest.approx(20)
    assert np.isinf(decibels[[0, 1, 3]]).all()


def test_nan_in_both_models_is_left_out_and_nan_in_one_is_an_infinite_error():
    a = np.array([[1.0, np.nan, np.inf, 2.0]], np.float32)
    same, other = TensorError(), TensorError()
    same.update(a, np.array([[1.0, np.nan, np.inf, 2.5]], np.float32))
    other.update(a, np.array([[1.0, 0.0, -np.inf, 2.0]], np.float32))

    assert (same.count, same.nonfinite, same.mismatched) == (2, 2, 0)
    assert same.relative_error == pytest.approx(0.5 / math.sqrt(5))
    assert (same.low, same.high) == (1, 2)
    assert (other.nonfinite, other.mismatched) == (2, 2)
    assert (other.relative_error, other.sqnr_db) == (math.inf, -math.inf)


def test_all_nan_has_no_extremes():
    error = TensorError()
    error.update(np.full((2, 3), np.nan), np.full((2, 3), np.nan))

    assert error.count == 0
    assert error.low > error.high
    assert error.channels is not None
    np.testing.assert_array_equal(error.channels.peak, 0)


def test_another_shape_is_an_infinite_error():
    error = TensorError()
    error.update(np.ones((2, 3)), np.ones((3, 2)))

    assert error.misshapen == 1
    assert error.relative_error == math.inf


def test_noise_without_signal_is_an_infinite_error():
    error = TensorError()
    error.update(np.zeros((2, 3)), np.ones((2, 3)))

    assert error.relative_error == math.inf


@pytest.mark.parametrize("shape", [(), (0, 3), (5,)])
def test_scalars_vectors_and_empty_tensors_have_no_channels(shape: tuple[int, ...]):
    error = TensorError()
    error.update(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    assert error.count == math.prod(shape)
    assert error.channels is None
    assert error.sqnr_db == math.inf


def test_a_number_of_channels_that_changes_leaves_only_the_whole():
    error = TensorError()
    for width in (3, 4, 3):
        error.update(np.ones((2, width)), np.ones((2, width)))

    assert error.channels is None
    assert error.count == 20


# --- two models -------------------------------------------------------------------------------------------------------


def test_equal_models_have_no_error(errors: Callable[..., Any]):
    model = mlp_model((8, 16, 16, 4))
    found = errors(model, model, batches(5, 5))

    assert list(found) == ["x", "h0", "r0", "h1", "r1", "y"]
    assert {error.sqnr_db for error in found.values()} == {math.inf}
    assert {error.relative_error for error in found.values()} == {0.0}


def test_a_changed_weight_shows_from_its_layer_on_with_the_exact_error(errors: Callable[..., Any]):
    model = mlp_model((8, 16, 16, 4))
    other = with_weight(model, "W1", noisy)
    feeds = batches(5, 3)
    found = errors(model, other, feeds)

    assert found["h0"].noise == found["r0"].noise == 0
    for name in ("h1", "r1", "y"):
        a, b = (values(each, name, feeds) for each in (model, other))
        wanted = 10 * math.log10(np.square(a).sum() / np.square(b - a).sum())
        assert found[name].sqnr_db == pytest.approx(wanted, rel=FLOAT64_SUMS)
        np.testing.assert_allclose(found[name].channels.noise, np.square(b - a).sum(axis=0), rtol=FLOAT64_SUMS)


def test_only_what_is_asked_for_is_measured(errors: Callable[..., Any]):
    model = mlp_model()
    assert list(errors(model, model, batches(2), "y", "h0")) == ["y", "h0"]


def test_refuses_a_tensor_that_is_not_in_both(errors: Callable[..., Any]):
    one = graph_model("g (float[N,8] x) => (float[N,8] y) { a = Abs(x) y = Relu(a) }")
    other = graph_model("g (float[N,8] x) => (float[N,8] y) { b = Abs(x) y = Relu(b) }")

    with pytest.raises(ModelError, match="main graph of the other model has no tensor 'a'"):
        errors(one, other, batches(2), "a")
    assert list(errors(one, other, batches(2))) == ["x", "y"]


def test_batches_may_have_any_number_of_rows(errors: Callable[..., Any]):
    model = mlp_model()
    other = with_weight(model, "W0", noisy)
    feeds = batches(1, 7, 2)
    parted, whole = errors(model, other, feeds), errors(model, other, [{"x": np.concatenate([f["x"] for f in feeds])}])

    for name, error in parted.items():
        assert error.count == whole[name].count
        assert error.relative_error == pytest.approx(whole[name].relative_error, rel=1e-4)


def test_a_nan_of_one_model_is_an_infinite_error_and_not_a_failure(errors: Callable[..., Any]):
    one = graph_model("g (float[N,8] x) => (float[N,8] y) { y = Abs(x) }")
    other = graph_model("g (float[N,8] x) => (float[N,8] y) { y = Sqrt(x) }")
    error = errors(one, other, batches(4))["y"]

    assert error.mismatched > 0
    assert error.sqnr_db == -math.inf


def test_shapes_indices_and_sequences_have_no_error(errors: Callable[..., Any]):
    model = graph_model(
        """g (float[N,8] x) => (float[N,8] y) {
            s = Shape(x) r = Reshape(x, s) l = SplitToSequence<axis = 0>(r) c = ConcatFromSequence<axis = 0>(l)
            i = ArgMax<axis = 1>(c) y = Relu(c)
        }"""
    )
    assert list(errors(model, model, batches(3))) == ["x", "r", "c", "y"]


@pytest.mark.parametrize("model", [if_model(), loop_model()], ids=["if", "loop"])
def test_models_with_subgraphs_are_seen_from_outside(errors: Callable[..., Any], model: onnx.ModelProto):
    found = errors(model, model, [{name: np.asarray(value) for name, value in random_inputs(model).items()}])

    assert {"x", "y"} <= set(found)
    assert {error.sqnr_db for error in found.values()} == {math.inf}


def test_no_feeds_give_nothing(errors: Callable[..., Any]):
    assert errors(mlp_model(), mlp_model(), []) == {}


def test_a_model_that_fails_is_named(errors: Callable[..., Any]):
    model = mlp_model()
    narrow = graph_model("g (float[N,8] x) => (float[N,4] y) { y = Gemm(x, W0) }", W0=random_weights(9, 4))
    with pytest.raises(RuntimeFailure, match=r"candidate\.onnx: "):
        errors(model, narrow, batches(2))


def test_tensors_that_do_not_fit_together_take_more_passes(runtime: Runtime, tmp_path: Path):
    count = observing.GROUP_BYTES // 4 // 4 + 1  # two of these, from both models, are just over the limit
    model = graph_model("g (float[1] x, int64[1] n) => (float[N] a, float[N] b) { a = Expand(x, n) b = Expand(x, n) }")
    onnx.save(model, tmp_path / "large.onnx")
    passes = []

    def feeds() -> list[Feed]:
        passes.append(True)
        return [{"x": np.ones(1, np.float32), "n": np.array([count], np.int64)}]

    found = layer_errors(runtime, tmp_path / "large.onnx", tmp_path / "large.onnx", feeds)

    assert len(passes) == 2
    assert found["a"].count == found["b"].count == count


def test_memory_does_not_grow_with_the_data(tmp_path: Path):
    model = mlp_model((8, 2048, 2048, 4))
    onnx.save(model, tmp_path / "m.onnx")
    (feed,) = batches(256)

    def peak(count: int) -> int:
        with Runtime() as own:
            layer_errors(own, tmp_path / "m.onnx", tmp_path / "m.onnx", lambda: (feed for _ in range(count)))
            return own.peak_memory_bytes

    assert peak(16) < 1.1 * peak(2)


# --- quantized models -------------------------------------------------------------------------------------------------


def test_a_tensor_behind_a_quantize_linear_is_what_its_readers_see():
    model = graph_model(
        """g (float[N,8] x) => (float[N,8] y) {
            c = Abs(x) q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) y = Neg(d)
        }""",
        s=np.float32(0.1),
        z=np.uint8(0),
    )
    plain = graph_model("g (float[N,8] x) => (float[N,8] y) { c = Abs(x) y = Neg(c) }")

    assert tensor_pairs(plain, model) == {"x": ("x", "x"), "c": ("c", "d"), "y": ("y", "y")}


def test_tensors_inside_of_an_int8_kernel_are_not_looked_at():
    text = """g (float[N,3,8,8] x) => (float[N,4,6,6] y) {
        xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear(w, s)
        c = Conv(xd, wd) r = Relu(c) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)
    }"""
    weights = {"s": np.float32(0.1), "z": np.uint8(0), "w": np.ones((4, 3, 3, 3), np.int8)}
    model = graph_model(text, weights)

    assert set(tensor_pairs(model, model)) == {"x", "xd", "r", "y"}
    assert tensor_pairs(model, model, ["c"]) == {"c": ("c", "c")}


def test_channels_are_on_axis_1_behind_convolutions_and_last_behind_products():
    model = graph_model(
        """g (float[N,3,8,8] x) => (float[N,2] y) {
            c = Conv(x, w) r = Relu(c) f = Flatten(r) m = MatMul(f, v) y = Sigmoid(m)
        }""",
        w=random_weights(4, 3, 3, 3),
        v=random_weights(144, 2),
    )
    assert channel_axes(model.graph) == {"c": 1, "r": 1, "f": -1, "m": -1, "y": -1}


@pytest.fixture(scope="module", params=["fashion_lenet", "fashion_mobilenet", "fashion_vit"])
def int8_pair(request: pytest.FixtureRequest, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory):
    """A sample model, simplified and then also quantized, and the data."""
    folder = tmp_path_factory.mktemp(request.param)
    model = Model.load(SAMPLES / f"{request.param}.onnx")
    data = open_data(SAMPLES / "fashion_calib.npz", input_specs(model.proto())).subset(range(16))
    context = Context(data=data, runtime=runtime, workdir=folder, target=find_target("x86-vnni"))
    Simplify().rewrite(model, context)
    model.save(folder / "float.onnx")
    model = Model.load(folder / "float.onnx")
    Quantize().rewrite(model, context)
    model.save(folder / "int8.onnx")
    return folder / "float.onnx", folder / "int8.onnx", data


def test_every_layer_of_a_quantized_model_is_measured_and_none_is_lost(int8_pair, runtime: Runtime):
    original, int8, data = int8_pair
    found = layer_errors(runtime, original, int8, data.feeds)

    layers = [node for node in onnx.load(original).graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}]
    absorbed = {node.input[0] for node in onnx.load(original).graph.node if node.op_type in {"Relu", "Clip"}}
    assert {node.output[0] for node in layers} - absorbed <= set(found)
    assert all(error.sqnr_db > 15 for error in found.values())
    assert any(error.sqnr_db < 60 for error in found.values())


def test_observing_leaves_the_integers_of_a_quantized_model_as_they_are(int8_pair, runtime: Runtime):
    """The promise of `layer_errors`: what is measured is what runs."""
    original, int8, data = int8_pair
    pairs = tensor_pairs(onnx.load(original), onnx.load(int8))
    output = onnx.load(int8).graph.output[0].name
    observed = tuple(dict.fromkeys(candidate for _, candidate in pairs.values()))
    copy = onnx.load(int8)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in observed if name != output)
    onnx.save(copy, int8.parent / "observed.onnx")

    for alone, beside in zip(
        runtime.run(int8, data.feeds()), runtime.run(int8.parent / "observed.onnx", data.feeds()), strict=True
    ):
        np.testing.assert_array_equal(beside[0], alone[0])
    int8_kernels = [
        sum(node.int8 for node in runtime.census(path).nodes) for path in (int8, int8.parent / "observed.onnx")
    ]
    assert int8_kernels[0] == int8_kernels[1]
