"""What `quantize` does for accuracy before a layer goes back to float."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.budget import Budget
from onnxcomp.calibration import Percentile
from onnxcomp.channels import ChannelMoments
from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.pipeline import optimize
from onnxcomp.relative_error import relative_error
from onnxcomp.report import to_json
from onnxcomp.runtime import Runtime
from onnxcomp.targets import find_target
from onnxcomp_passes import Quantize, QuantizeWeights
from onnxcomp_passes._causes import find_cause
from onnxcomp_passes._equalize import equalize
from onnxcomp_passes._placement import find_layers
from onnxcomp_passes._ranges import best_range, response
from onnxcomp_passes._weights import LayerWeights
from tests import models

Array = np.ndarray[Any, Any]
SAMPLES = 64


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def uneven(channels: int = 16, *, worst: float = 100.0) -> Array:
    """Factors from 1 to `worst`, one a channel."""
    return np.geomspace(1.0, worst, channels).astype(np.float32)


def conv_pair(activation: str = "Relu") -> Model:
    """Two Convs; the channels between them are a hundred times apart."""
    between, read = (f"h = {activation}(c)", "h") if activation else ("", "c")
    text = (
        "g (float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y)"
        f"{{ c = Conv<pads = [1, 1, 1, 1]>(x, W, b) {between} y = Conv<pads = [1, 1, 1, 1]>({read}, V) }}"
    )
    factors = uneven()
    first = models.random_weights(16, 3, 3, 3) * factors[:, None, None, None]
    second = models.random_weights(8, 16, 3, 3, seed=1) / factors[None, :, None, None]
    return Model.load(models.graph_model(text, W=first, b=models.random_weights(16, seed=2) * factors, V=second))


def norm_model() -> Model:
    """LayerNormalization with an uneven scale, read by a MatMul alone."""
    text = "g (float[N, 16] x) => (float[N, 8] y) { n = LayerNormalization<axis = -1>(x, s, b) y = MatMul(n, V) }"
    factors = uneven()
    second = models.random_weights(16, 8) / factors[:, None]
    return Model.load(models.graph_model(text, s=factors, b=models.random_weights(16) * factors, V=second))


def shared_input() -> Model:
    """A MatMul on an uneven tensor that the graph gives out too, so nothing before it takes factors over."""
    text = "g (float[N, 16] x) => (float[N, 16] h, float[N, 8] y) { h = Mul(x, f) y = MatMul(h, V) }"
    factors = uneven()
    return Model.load(models.graph_model(text, f=factors, V=models.random_weights(16, 8) / factors[:, None]))


def calibration(model: Model, seed: int = 1) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: generator.standard_normal((SAMPLES, *(int(dim) for dim in spec.shape[1:] if dim))).astype(np.float32)
        for spec in input_specs(model.proto())
    }


def moments_of(model: Model, runtime: Runtime, path: Path) -> dict[str, ChannelMoments]:
    """The channels of each layer's input over the calibration data."""
    model.save(path)
    axes = {
        layer.node.inputs[0].name: 1 if layer.node.op == "Conv" else -1 for layer in find_layers(model.graph, Context())
    }
    watches = {name: ChannelMoments(axis) for name, axis in axes.items()}
    return runtime.observe(path, lambda: [calibration(model)], watches)


def quantized(model: Model, runtime: Runtime, folder: Path, **options: Any) -> tuple[Model, Changes]:
    data = open_data(calibration(model), input_specs(model.proto()))
    context = Context(data=data, runtime=runtime, workdir=folder, target=find_target("x86-vnni"))
    result = model.fork()
    return result, Quantize(choose=False, **options).rewrite(result, context)


def error(model: Model, result: Model) -> float:
    feeds = calibration(model, seed=7)
    pairs = zip(models.run(model, feeds), models.run(result, feeds), strict=True)
    return max(relative_error([pair]) for pair in pairs)


# --- equalization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [conv_pair(), conv_pair(""), conv_pair("LeakyRelu"), norm_model(), shared_input()],
    ids=["relu", "linear", "leaky", "norm", "divided"],
)
def test_an_equalized_model_computes_the_same(model: Model, runtime: Runtime, tmp_path: Path) -> None:
    result = model.fork()
    layers = find_layers(result.graph, Context())

    done = equalize(result, layers, moments_of(model, runtime, tmp_path / "m.onnx"), LayerWeights())

    assert done
    models.assert_same_outputs(model, result, calibration(model, seed=3))


@pytest.mark.parametrize("model", [conv_pair(), norm_model(), shared_input()], ids=["conv", "norm", "divided"])
def test_equalizing_uneven_channels_brings_the_error_down(model: Model, runtime: Runtime, tmp_path: Path) -> None:
    plain, _ = quantized(model, runtime, tmp_path)
    treated, changes = quantized(model, runtime, tmp_path, remedies=("equalize",))

    assert error(model, treated) < 0.6 * error(model, plain)
    assert any("outlier channel" in change.what for change in changes.changed)


def test_factors_that_nothing_takes_over_become_one_mul(runtime: Runtime, tmp_path: Path) -> None:
    model = shared_input()
    treated, _ = quantized(model, runtime, tmp_path, remedies=("equalize",))

    assert models.ops(treated).count("Mul") == models.ops(model).count("Mul") + 1
    treated.save(tmp_path / "treated.onnx")
    assert "MatMulIntegerToFloat" in runtime.census(tmp_path / "treated.onnx").counts()


@pytest.mark.parametrize("activation", ["Sigmoid", "Tanh"])
def test_factors_do_not_pass_functions_that_do_not_commute(activation: str, runtime: Runtime, tmp_path: Path) -> None:
    model = conv_pair(activation)
    result = model.fork()

    assert not equalize(
        result, find_layers(result.graph, Context()), moments_of(model, runtime, tmp_path / "m.onnx"), LayerWeights()
    )


def test_even_channels_are_left_alone(runtime: Runtime, tmp_path: Path) -> None:
    text = "g (float[N, 16] x) => (float[N, 8] y) { y = MatMul(x, V) }"
    model = Model.load(models.graph_model(text, V=models.random_weights(16, 8)))
    result = model.fork()

    assert not equalize(
        result, find_layers(result.graph, Context()), moments_of(model, runtime, tmp_path / "m.onnx"), LayerWeights()
    )


def test_stored_weights_are_equalized_from_the_exact_ones(runtime: Runtime, tmp_path: Path) -> None:
    exact = conv_pair()
    stored = exact.fork()
    QuantizeWeights(min_elements=1, choose=False).rewrite(stored, Context())
    result = stored.fork()
    layers = find_layers(result.graph, Context())
    weights = LayerWeights(exact)

    equalize(result, layers, moments_of(exact, runtime, tmp_path / "m.onnx"), weights)

    second = next(layer for layer in layers if layer.key == "y")
    ratio = weights.get(second) / exact.weight("V")
    np.testing.assert_allclose(ratio, ratio[:1, :, :1, :1].repeat(8, 0).repeat(3, 2).repeat(3, 3), rtol=1e-5)
    assert error(exact, result) < 0.02  # rounded once: 8 bits of each weight


# --- ranges -----------------------------------------------------------------------------------------------------------


def histogram(values: Array) -> Percentile:
    watch = Percentile()
    watch.update(values)
    return watch


@given(seed=st.integers(0, 100), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_a_fitted_range_is_never_worse_than_all_that_was_seen(seed: int, scale: float) -> None:
    values = (np.random.default_rng(seed).standard_t(3, 20_000) * scale).astype(np.float32)

    def cost(low: float, high: float) -> float:
        step = (high - low) / 255
        zero = np.rint(-low / step)
        return float(np.mean(np.square((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step - values)))

    low, high = best_range(histogram(values))

    assert values.min() <= low <= 0 <= high <= values.max()
    assert cost(low, high) <= cost(values.min(), values.max()) * 1.05  # the search sees bins, not values


def test_a_range_before_silu_gives_up_what_silu_maps_to_nothing() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { s = Sigmoid(x) y = Mul(x, s) }"
    tensor = Model.load(models.graph_model(text)).graph.inputs[0]
    values = np.concatenate([np.full(2000, -60.0), np.random.default_rng(0).normal(0, 2, 20_000)]).astype(np.float32)

    low, _ = best_range(histogram(values), response(tensor))

    assert -20 < low < -5  # SiLU(-60) and SiLU(-10) are both nothing to 8 bits


def test_no_function_is_assumed_where_readers_differ() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Sigmoid(x) z = Relu(x) }"

    assert response(Model.load(models.graph_model(text)).graph.inputs[0]) is None


# --- weights and biases -----------------------------------------------------------------------------------------------


def test_biases_take_back_the_mean_error_of_coarse_weights(runtime: Runtime, tmp_path: Path) -> None:
    text = "g (float[N, 64] x) => (float[N, 8] y) { h = Relu(x) y = Gemm(h, V, b) }"
    second = models.random_weights(64, 8)
    second[0] = 40.0  # makes the steps of the other weights coarse
    model = Model.load(models.graph_model(text, V=second, b=np.zeros(8, np.float32)))

    plain, _ = quantized(model, runtime, tmp_path)
    treated, _ = quantized(model, runtime, tmp_path, remedies=("correct-biases",))

    feeds = calibration(model, seed=5)
    wanted = models.run(model, feeds)[0]
    shifts = [np.abs((models.run(one, feeds)[0] - wanted).mean(axis=0)).mean() for one in (plain, treated)]
    assert shifts[1] < 0.5 * shifts[0]


def test_a_weight_scale_gives_up_weights_that_meet_small_inputs(runtime: Runtime, tmp_path: Path) -> None:
    text = "g (float[N, 64] x) => (float[N, 8] y) { h = Mul(x, f) y = MatMul(h, V) }"
    second, factors = models.random_weights(64, 8), np.ones(64, np.float32)
    second[0], factors[0] = 4.5, 1e-3
    model = Model.load(models.graph_model(text, f=factors, V=second))

    plain, _ = quantized(model, runtime, tmp_path)
    treated, changes = quantized(model, runtime, tmp_path, remedies=("round-weights",))

    assert any("weights rounded" in change.what for change in changes.changed)
    assert error(model, treated) < error(model, plain)


def test_an_unknown_remedy_is_refused() -> None:
    with pytest.raises(OptionError, match="no remedy is called 'prayer'"):
        Quantize(remedies=("prayer",))


# --- causes -----------------------------------------------------------------------------------------------------------


def cause_of(model: Model, runtime: Runtime, path: Path, ranges: dict[str, tuple[float, float]]) -> str | None:
    layer = find_layers(model.graph, Context())[-1]
    return find_cause(layer, ranges, moments_of(model, runtime, path), LayerWeights().get(layer))


def test_names_an_outlier_channel(runtime: Runtime, tmp_path: Path) -> None:
    cause = cause_of(shared_input(), runtime, tmp_path / "m.onnx", {})

    assert cause is not None
    assert cause.startswith("outlier channel: ")
    assert cause.endswith("times the median channel")


def test_names_a_scale_that_unlike_ranges_share(runtime: Runtime, tmp_path: Path) -> None:
    text = "g (float[N, 8] a, float[N, 8] b) => (float[N, 8] y) { h = Concat<axis = 1>(a, b) y = MatMul(h, V) }"
    model = Model.load(models.graph_model(text, V=models.random_weights(16, 8)))

    cause = cause_of(model, runtime, tmp_path / "m.onnx", {"a": (0.0, 1.0), "b": (-300.0, 300.0), "h": (-300, 300)})

    assert cause is not None
    assert "joins ranges 600 times apart" in cause


def test_names_a_clipped_tail(runtime: Runtime, tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { y = MatMul(x, V) }"
    model = Model.load(models.graph_model(text, V=models.random_weights(8, 8)))

    cause = cause_of(model, runtime, tmp_path / "m.onnx", {"x": (-0.5, 0.5)})

    assert cause is not None
    assert cause.startswith("clipped tail")


def test_names_a_bias_that_does_not_fit(runtime: Runtime, tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 4] y) { y = Gemm(x, V, b) }"
    second = models.random_weights(8, 4)
    second[:, 2] = 1e-9
    model = Model.load(models.graph_model(text, V=second, b=np.ones(4, np.float32)))

    cause = cause_of(model, runtime, tmp_path / "m.onnx", {"x": (-3.0, 3.0)})

    assert cause == "saturated bias: 1 channels have weights too small beside their bias"


def test_a_healthy_layer_has_no_cause(runtime: Runtime, tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { y = MatMul(x, V) }"
    model = Model.load(models.graph_model(text, V=models.random_weights(8, 8)))

    assert cause_of(model, runtime, tmp_path / "m.onnx", {"x": (-4.0, 4.0)}) is None


# --- in a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_says_what_helped_and_is_replayed_to_the_same_model(tmp_path: Path) -> None:
    model = norm_model()
    data = {"x": np.concatenate([calibration(model, seed)["x"] for seed in (1, 2, 3)])}

    first = optimize(model, data=data, budget=Budget(max_error=0.04), timing=False, resume=False)
    (tmp_path / "report.json").write_text(to_json(first.report))
    again = optimize(model, data=data, replay=tmp_path / "report.json", resume=False)

    entry = next(stage for stage in first.report.stages if stage.name == "quantize")
    told = entry.attempts[-1].passes[0]
    assert entry.verdict == "kept"
    assert told.options["remedies"] == ["equalize"]
    assert any(note.startswith("equalize: relative error") and note.endswith("kept") for note in told.notes)
    assert again.model.digest == first.model.digest
