from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp_passes import Cluster
from onnxcomp_passes.cluster import codebook
from tests.models import graph_model, matmul_model, mlp_model, random_weights

Array = np.ndarray[Any, Any]


def clustered(source: onnx.ModelProto | Model, **options: Any) -> tuple[Model, Changes]:
    """Apply the pass."""
    model = Model.load(source)
    changes = Cluster(**options).rewrite(model, Context())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def left(changes: Changes) -> dict[str, str]:
    return {item.where: item.why for item in changes.left}


def squared_error(weight: Array, centres: Array) -> float:
    nearest = centres[np.argmin(np.abs(weight.reshape(-1, 1) - centres), axis=1)]
    return float(np.sum((weight.reshape(-1) - nearest) ** 2))


# --- the codebook -----------------------------------------------------------------------------------------------------


def test_finds_clusters_that_lie_apart():
    rng = np.random.default_rng(0)
    truth = np.array([-3.0, -1.0, 0.5, 4.0], np.float32)
    values = rng.permutation(np.repeat(truth, 200)) + rng.normal(0, 0.01, 800).astype(np.float32)

    np.testing.assert_allclose(codebook(values.astype(np.float32), 4), truth, atol=0.005)


@pytest.mark.parametrize("size", [2, 4, 16, 64])
def test_is_near_the_best_codebook_of_normal_weights(size: int):
    weight = random_weights(128, 256)
    best = {2: 0.3634, 4: 0.1175, 16: 0.009497, 64: 0.0006642}
    # Max 1960, "Quantizing for Minimum Distortion", table I (2, 4, 16); 64: Panter and Dite's limit, 2.7207 / size**2.

    error = squared_error(weight, codebook(weight, size)) / weight.size

    assert error <= 1.04 * best[size]


def test_an_outlier_costs_one_value():
    weight = np.concatenate([random_weights(4096), np.array([1e6], np.float32)])

    centres = codebook(weight, 16)

    assert centres[-1] == 1e6
    assert squared_error(weight, centres) / weight.size <= 1.1 * 0.0108  # 15 values for the others


@given(
    values=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32)),
    size=st.sampled_from([2, 3, 16]),
    keep_zeros=st.booleans(),
)
def test_the_codebook_is_small_sorted_and_inside_the_range(values: Array, size: int, keep_zeros: bool):
    centres = codebook(values, size, keep_zeros=keep_zeros)

    assert centres.dtype == np.float32
    assert 1 <= len(centres) <= size
    assert np.all(np.diff(centres) > 0)
    low, high = (
        min(values.min(), 0) if keep_zeros else values.min(),
        max(values.max(), 0) if keep_zeros else values.max(),
    )
    assert low <= centres[0]
    assert centres[-1] <= high
    assert np.any(centres == 0) or not (keep_zeros and np.any(values == 0))


def test_zeros_do_not_draw_the_other_values_to_them():
    weight = random_weights(1000)
    sparse = np.concatenate([weight, np.zeros(19000, np.float32)])

    kept = squared_error(weight, codebook(sparse, 16))

    assert kept <= 1.1 * squared_error(weight, codebook(weight, 16))


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_weight_takes_few_values_and_each_is_the_nearest(bits: int):
    weight = random_weights(32, 48)

    model, changes = clustered(matmul_model(weight), bits=bits)

    assert [change.where for change in changes.changed] == ["W"]
    found = model.weight("W")
    centres = np.unique(found)
    assert len(centres) <= 2**bits
    distance = np.abs(weight.reshape(-1, 1) - centres)
    np.testing.assert_allclose(np.abs(weight - found).reshape(-1), distance.min(axis=1), atol=1e-6)


def test_zeros_stay_zeros():
    weight = random_weights(32, 48)
    weight[np.random.default_rng(1).random(weight.shape) < 0.7] = 0

    model, _ = clustered(matmul_model(weight), bits=3)

    np.testing.assert_array_equal(model.weight("W")[weight == 0], 0)


def test_a_codebook_a_channel_when_asked():
    weight = random_weights(32, 48) * (10.0 ** np.linspace(-10, 10, 48)).astype(np.float32)

    model, _ = clustered(matmul_model(weight), bits=4, per_channel=True)

    found = model.weight("W")
    assert all(len(np.unique(column)) <= 16 for column in found.T)
    error = np.linalg.norm(found - weight, axis=0) / np.linalg.norm(weight, axis=0)
    assert error.max() < 0.2


def test_a_second_time_changes_nothing():
    model, _ = clustered(mlp_model((24, 32, 24)))
    digest = model.digest

    _, again = clustered(model)

    assert (again.count, model.digest) == (0, digest)
    assert left(again) == dict.fromkeys(["W0", "W1"], "has no more than 16 values already")


def test_says_that_the_file_does_not_shrink():
    _, changes = clustered(mlp_model((24, 32, 24)))

    assert changes.notes == ["clustered weights are still float32: the file shrinks only where they are packed"]


def test_a_shared_weight_stays_shared():
    text = "g (float[N, 24] x) => (float[N, 24] y) { h = MatMul(x, W) y = MatMul(h, W) }"

    model, changes = clustered(graph_model(text, W=random_weights(24, 24)))

    assert changes.count == 1
    assert [tensor.name for tensor in model.to_proto().graph.initializer] == ["W"]


def test_a_weight_that_a_subgraph_reads_changes_for_it_too():
    text = """g (bool c, float[N, 24] x) => (float[N, 24] z) {
        y = MatMul(x, W)
        z = If(c) <
            then_branch = yes () => (float[N, 24] a) { a = MatMul(y, W) },
            else_branch = no () => (float[N, 24] b) { b = Identity(y) }
        >
    }"""

    model, _ = clustered(graph_model(text, W=random_weights(24, 24)))

    assert len(np.unique(model.weight("W"))) <= 16
    assert [tensor.name for tensor in model.to_proto().graph.initializer] == ["W"]


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (np.full((24, 24), np.nan, np.float32), "holds NaN or infinity"),
        (np.zeros((24, 24), np.float32), "has no more than 16 values already"),
        (np.ones((24, 24), np.float32), "has no more than 16 values already"),
        (random_weights(2, 3), "has fewer than 128 elements"),
    ],
    ids=["nan", "zeros", "constant", "tiny"],
)
def test_leaves_what_clusters_would_not_help(weight: Array, why: str):
    model, changes = clustered(matmul_model(weight))

    assert (changes.count, left(changes)) == (0, {"W": why})
    np.testing.assert_array_equal(model.weight("W"), weight)


def test_refuses_a_codebook_without_bits():
    with pytest.raises(OptionError, match="cluster: bits must be from 1 to 8, got 0"):
        Cluster(bits=0)
