"""Histograms of weights, the factors that they were split into, and their singular values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp import weight_profiles
from onnxcomp.model import Model
from onnxcomp.passes import Context, Pass
from onnxcomp.weight_profiles import BINS, factors, histogram, ranks, singular_values
from onnxcomp.weight_values import WeightValues, weight_values
from onnxcomp_passes.low_rank import LowRank
from tests.models import graph_model, random_weights

MATMUL = "g (float[N,K] x) => (float[N,M] y) { [layer] y = MatMul(x, W) }"
CONV = "g (float[N,C,9,9] x) => (float[N,M,H,H] y) { [layer] y = Conv(x, W) }"
GEMM = "g (float[N,K] x) => (float[N,M] y) { [layer] y = Gemm<transB = 1>(x, W) }"


def rewritten(model: onnx.ModelProto, *passes: Pass) -> Model:
    loaded = Model.load(model)
    for each in passes:
        assert each.rewrite(loaded, Context()).count
    return loaded


def counted(before: WeightValues | None, after: list[WeightValues]) -> dict[str, Any]:
    found = histogram(before, after)
    assert found is not None
    return found


def singular(before: WeightValues, parts: list[WeightValues]) -> dict[str, Any]:
    found = singular_values(before, parts)
    assert found is not None
    return found


def weight_of(values: Any, text: str = MATMUL) -> WeightValues:
    [found] = weight_values(Model.load(graph_model(text, W=values))).values()
    return found


def split(text: str, weight: Any, thin: str) -> tuple[WeightValues, list[WeightValues]]:
    """A weight, and the factors that low-rank makes of it."""
    model = rewritten(graph_model(text, W=weight), LowRank(ranks=(f"W={thin}",), min_elements=1))
    known = weight_values(model)
    by_node = {id(values.node): values for values in known.values()}
    last = next(values for values in known.values() if values.node.name == "layer")
    new = {values.node.name for values in known.values()} - {"layer"}
    return weight_of(weight, text), factors(last, by_node, new)


# --- histograms -------------------------------------------------------------------------------------------------------


def test_both_models_are_counted_in_the_same_bins():
    one, other = random_weights(40, 30), random_weights(40, 30, seed=1, scale=0.5)
    found = counted(weight_of(one), [weight_of(other)])

    edges = np.linspace(found["low"], found["high"], BINS + 1)
    for side, weight in (("before", one), ("after", other)):
        inside = np.clip(weight, found["low"], found["high"])
        assert found[side] == np.histogram(inside, edges)[0].tolist()
        assert sum(found[side]) == found[f"{side}_values"] == 1200
    assert (found["least"], found["most"]) == (one.min(), one.max())


def test_a_value_far_out_does_not_hide_the_others_and_is_counted_in_the_last_bin():
    weight = random_weights(50, 50)
    weight[7, 7] = 1000
    found = counted(weight_of(weight), [])

    assert found["high"] < 2 * np.sort(weight.ravel())[-2]
    assert (found["most"], found["after"]) == (1000, None)
    assert sum(count > 0 for count in found["before"]) > BINS // 2
    assert found["before"][-1] >= 1


def test_what_is_no_number_is_in_no_bin():
    weight = random_weights(8, 8)
    weight[0, :3] = np.nan, np.inf, -np.inf
    found = counted(weight_of(weight), [])
    assert sum(found["before"]) == found["before_values"] == 61


def test_a_weight_of_one_value_has_a_bin_around_it():
    found = counted(weight_of(np.zeros((8, 8), np.float32)), [])
    assert found["low"] < 0 < found["high"]
    assert max(found["before"]) == 64


def test_a_weight_that_cannot_be_read_has_no_histogram():
    assert histogram(weight_of(np.full((4, 4), np.nan, np.float32)), []) is None
    assert histogram(None, []) is None


def test_of_a_large_weight_some_values_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_profiles, "MOST_VALUES", 500)
    weight = random_weights(100, 100)
    found = counted(weight_of(weight), [weight_of(weight)])

    assert found["before_values"] == found["after_values"] == sum(found["before"]) == 500
    assert found["before"] == found["after"]


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weight", "thin", "expected"),
    [
        (MATMUL, random_weights(24, 16), "svd:7", [7]),
        (GEMM, random_weights(24, 16), "svd:5", [5]),
        (CONV, random_weights(16, 12, 3, 3), "svd:6", [6]),
        (CONV, random_weights(16, 12, 3, 3), "spatial:10", [10]),
        (CONV, random_weights(16, 12, 3, 3), "cp:9", [9]),
    ],
)
def test_the_factors_of_a_layer_are_found_with_their_rank(text, weight, thin, expected):
    _, parts = split(text, weight, thin)
    assert len(parts) == {"svd": 2, "spatial": 2, "cp": 4}[thin.partition(":")[0]]
    assert ranks(parts) == expected


@pytest.mark.parametrize(
    ("text", "shape", "rank"),
    [(MATMUL, (24, 16), 3), (GEMM, (24, 16), 3), (CONV, (16, 12, 3, 3), 3)],
)
def test_the_histogram_of_factors_is_that_of_their_product(text, shape, rank):
    first, second = random_weights(shape[0], rank), random_weights(rank, int(np.prod(shape[1:])), seed=1)
    before, parts = split(text, (first @ second).reshape(shape), f"svd:{rank}")

    found = counted(before, parts)
    assert found["after_values"] == found["before_values"]
    moved = np.abs(np.subtract(found["before"], found["after"])).sum()
    assert moved <= 4  # of values that lie on an edge


def test_a_chain_of_kernels_of_one_axis_each_amounts_to_one_of_both():
    down, along = random_weights(2, 5, 3, 1), random_weights(8, 2, 1, 3, seed=1)
    before, parts = split(CONV, np.einsum("orw,rch->ochw", along[:, :, 0], down[..., 0]), "spatial:2")

    found = counted(before, parts)
    assert np.abs(np.subtract(found["before"], found["after"])).sum() <= 4


def test_a_layer_behind_another_that_the_original_has_too_is_not_split():
    text = "g (float[N,8] x) => (float[N,8] y) { [a] h = MatMul(x, A) [b] y = MatMul(h, B) }"
    known = weight_values(Model.load(graph_model(text, A=random_weights(8, 8), B=random_weights(8, 8))))
    by_node = {id(values.node): values for values in known.values()}
    assert factors(known["B"], by_node, set()) == [known["B"]]
    assert factors(known["B"], by_node, {"a"}) == [known["A"], known["B"]]


def test_a_vector_is_no_factor():
    text = "g (float[N,8,4] x) => (float[N] y) { [a] h = MatMul(x, A) [b] y = MatMul(h, B) }"
    known = weight_values(Model.load(graph_model(text, A=random_weights(4), B=random_weights(8, 1))))
    by_node = {id(values.node): values for values in known.values()}
    assert factors(known["B"], by_node, {"a"}) == [known["B"]]


# --- singular values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "weight"), [(MATMUL, random_weights(30, 100)), (CONV, random_weights(20, 6, 3, 3))])
def test_singular_values_are_those_of_the_original_with_the_rank_among_them(text, weight):
    before, parts = split(text, weight, "svd:9")
    found = singular(before, parts)

    wanted = np.linalg.svd(weight.reshape(len(weight), -1).astype(np.float64), compute_uv=False)
    numbers, values = np.transpose(found["values"])
    assert (found["kept"], found["total"]) == (9, len(wanted))
    assert 9 in numbers
    np.testing.assert_allclose(values, wanted[numbers.astype(int) - 1], rtol=1e-6)


def test_no_more_than_64_singular_values_are_told():
    found = singular(*split(MATMUL, random_weights(200, 150), "svd:50"))
    numbers = [number for number, _ in found["values"]]
    assert len(numbers) <= 64
    assert (numbers[0], numbers[-1]) == (1, 150)
    assert 50 in numbers


def test_where_there_are_no_more_than_64_singular_values_all_are_told():
    found = singular(*split(MATMUL, random_weights(64, 256), "svd:12"))
    assert [number for number, _ in found["values"]] == list(range(1, 65))


def test_of_kernels_of_one_axis_each_it_is_the_matrix_of_these_axes():
    weight = random_weights(8, 6, 3, 3)
    found = singular(*split(CONV, weight, "spatial:5"))
    wanted = np.linalg.svd(weight.transpose(1, 2, 0, 3).reshape(18, 24).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose([value for _, value in found["values"]], wanted, rtol=1e-5)


def test_a_weight_in_more_than_two_factors_or_in_one_or_too_large_has_none(monkeypatch: pytest.MonkeyPatch):
    assert singular_values(*split(CONV, random_weights(16, 12, 3, 3), "cp:9")) is None
    weight = weight_of(random_weights(8, 8))
    assert singular_values(weight, [weight]) is None
    pair = split(MATMUL, random_weights(24, 16), "svd:7")
    monkeypatch.setattr(weight_profiles, "LARGEST_SIDE", 15)
    assert singular_values(*pair) is None
