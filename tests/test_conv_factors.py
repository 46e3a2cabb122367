"""A Conv as several thin ones: that they are the same Conv, and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tensorly.decomposition import parafac

from onnxcomp.macs import mac_counts
from onnxcomp.model import Model
from onnxcomp_passes import _cp
from onnxcomp_passes._conv_factors import (
    FORMS,
    ConvFactors,
    factor,
    factor_shapes,
    full_ranks,
    has_form,
    ranks_for,
)
from onnxcomp_passes._cp import cp_factors
from onnxcomp_passes._pruning import as_matrices
from onnxcomp_passes._views import find_views
from tests.models import random_weights, run

Array = np.ndarray[Any, Any]

SUM_ROUNDING = 1e-4
"""Relative to the largest output: float32 sums one after another, with values between that exceed what comes out."""


def convs(weights: Sequence[Array], attributes: Sequence[dict[str, Any]], shape: Sequence[int]) -> onnx.ModelProto:
    """Convs in a row on x, the last with the bias b = 1, 2, ..."""
    names = ["x", *(f"t{index}" for index in range(len(weights) - 1)), "y"]
    nodes = [
        helper.make_node("Conv", [name, f"W{index}"], [names[index + 1]], name=f"c{index}", **each)
        for index, (name, each) in enumerate(zip(names, attributes, strict=False))
    ]
    nodes[-1].input.append("b")
    values = {f"W{index}": weight for index, weight in enumerate(weights)}
    values["b"] = np.arange(1, len(weights[-1]) + 1, dtype=np.float32)
    graph = helper.make_graph(
        nodes,
        "convs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def few_components(shape: Sequence[int], group: int, count: int, seed: int) -> Array:
    """A weight that is a sum of a few outer products in each group; their vectors are orthogonal where they can be."""
    rng, blocks = np.random.default_rng(seed), []
    for _ in range(group):
        sizes = (shape[0] // group, *shape[1:])
        made = [np.linalg.qr(rng.normal(size=(size, max(size, count))))[0] for size in sizes]
        terms = [[each[:, index % size] for each, size in zip(made, sizes, strict=True)] for index in range(count)]
        blocks.append(sum(_outer_product(term) for term in terms))
    return np.concatenate(blocks).astype(np.float32)


def _outer_product(vectors: Sequence[Array]) -> Array:
    made = vectors[0]
    for each in vectors[1:]:
        made = np.multiply.outer(made, each)
    return made


@st.composite
def weights_of(draw: st.DrawFn, form: str) -> tuple[Array, int]:
    """A weight that has the form, and its groups."""
    axes = 2 if form == "spatial" else draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = st.integers(1, 5) if form == "spatial" else st.integers(2, 6)
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    shape = (group * draw(sizes), draw(sizes), *kernel)
    assume(has_form(form, shape, group))
    return random_weights(*shape, seed=draw(st.integers(0, 99))), group


@st.composite
def cases(draw: st.DrawFn, form: str) -> tuple[Array, dict[str, Any], Array]:
    """A weight, the attributes of its Conv and an input."""
    weight, group = draw(weights_of(form))
    kernel, axes = weight.shape[2:], weight.ndim - 2
    several = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    attrs: dict[str, Any] = {"group": group, "kernel_shape": list(kernel), "strides": draw(several)}
    sizes = draw(st.lists(st.integers(5, 8), min_size=axes, max_size=axes))
    mode = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if not mode.startswith("SAME"):  # ONNX Runtime has no dilation there
        attrs["dilations"] = draw(several)
    if mode == "NOTSET":
        attrs["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    else:
        attrs["auto_pad"] = mode
    for name in draw(st.sets(st.sampled_from(["strides", "dilations", "pads"]))):
        attrs.pop(name, None)
    pads, dilations = attrs.get("pads", [0] * 2 * axes), attrs.get("dilations", [1] * axes)
    assume(all(size + sum(pads[a::axes]) > (kernel[a] - 1) * dilations[a] for a, size in enumerate(sizes)))
    return weight, attrs, random_weights(2, group * weight.shape[1], *sizes, seed=7)


def ranks_within(draw: st.DrawFn, form: str, weight: Array, group: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(1, min(6, most))) for most in full_ranks(form, weight.shape, group))


def matrices(weight: Array, group: int) -> Array:
    """A Conv's weight as the other passes have it."""
    proto = convs([weight], [{"group": group}], (1, group * weight.shape[1], *[8] * (weight.ndim - 2)))
    return as_matrices(find_views(Model.load(proto))[0], weight)


def largest(array: Array) -> float:
    return float(np.abs(array).max())


# --- the same Conv ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_chain_is_the_conv_with_the_dense_weight_at_any_rank(form: str, data: st.DataObject):
    weight, attrs, x = data.draw(cases(form))
    thin = factor(weight, attrs["group"], form, data.draw(st.composite(ranks_within)(form, weight, attrs["group"])))

    made = run(convs(thin.weights, thin.attributes(attrs), x.shape), {"x": x})[0]

    wanted = run(convs([thin.dense()], [attrs], x.shape), {"x": x})[0]
    np.testing.assert_allclose(made, wanted, rtol=0, atol=SUM_ROUNDING * largest(wanted))


@pytest.mark.parametrize("form", ["svd", "tucker", "spatial"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_full_ranks_give_the_weight_itself(form: str, data: st.DataObject):
    weight, group = data.draw(weights_of(form))

    thin = factor(weight, group, form, full_ranks(form, weight.shape, group))

    np.testing.assert_allclose(thin.dense(), weight, rtol=0, atol=1e-5 * largest(weight))


@pytest.mark.parametrize(
    ("shape", "group"), [((8, 6, 3, 3), 1), ((8, 6, 5), 1), ((12, 4, 1, 5), 2), ((6, 5, 3, 3, 3), 1)]
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sum_of_few_outer_products_is_recovered_by_cp(shape: tuple[int, ...], group: int, count: int):
    weight = few_components(shape, group, count, seed=count)

    thin = factor(weight, group, "cp", (count,))

    np.testing.assert_allclose(thin.dense(), weight, rtol=0, atol=1e-2 * largest(weight))


def test_cp_comes_as_near_as_tensorly_does():
    weight = random_weights(24, 16, 3, 3).astype(np.float64)

    factors = cp_factors(weight, 30)

    found = np.einsum("ar,br,cr,dr->abcd", *factors)
    _, others = parafac(weight, 30, init="random", random_state=0, tol=1e-6)
    other = np.einsum("ar,br,cr,dr->abcd", *others)
    assert np.linalg.norm(found - weight) < 1.03 * np.linalg.norm(other - weight)


def limit_of_rank_two() -> Array:
    """Sums of two outer products come as near as one likes, with norms that grow without bound; three are needed."""
    one, other = np.eye(3)[:2]
    terms = ([one, one, other], [one, other, one], [other, one, one])
    return np.asarray(sum(_outer_product(each) for each in terms))


def test_cp_of_axes_whose_singular_vectors_do_not_fit_is_found():
    tensor = limit_of_rank_two()

    factors = cp_factors(tensor, 2)

    assert np.linalg.norm(np.einsum("ar,br,cr->abc", *factors) - tensor) < 0.05 * np.linalg.norm(tensor)


def test_components_of_cp_do_not_grow_to_undo_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_cp, "TOLERANCE", 0)
    norms = []
    for rounds in (2000, 6000):
        monkeypatch.setattr(_cp, "ROUNDS", rounds)
        norms.append(np.linalg.norm(cp_factors(limit_of_rank_two(), 2)[-1]))

    assert norms[1] < 1.02 * norms[0]


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_all_vectors_of_cp_but_the_last_have_the_norm_one(rank: int):
    factors = cp_factors(random_weights(6, 5, 3).astype(np.float64), rank)

    for each in factors[:-1]:
        np.testing.assert_allclose(np.linalg.norm(each, axis=0), 1, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_more_ranks_come_nearer(form: str):
    weight = random_weights(12, 10, 3, 3)

    errors = []
    for share in (0.2, 0.4, 0.6, 0.8):
        ranks = ranks_for(form, weight.shape, 1, int(share * weight.size))
        assert ranks is not None
        errors.append(float(np.linalg.norm(factor(weight, 1, form, ranks).dense() - weight)))

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * np.linalg.norm(weight)


def test_svd_of_a_one_by_one_conv_is_the_nearest_matrix():
    weight = random_weights(12, 9, 1, 1)

    found = factor(weight, 1, "svd", (3,)).dense()

    values = np.linalg.svd(weight.reshape(12, 9).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(found - weight), np.linalg.norm(values[3:]), rtol=1e-5)


# --- groups, scales and odd weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_each_group_is_factored_as_if_alone(form: str):
    weight = random_weights(12, 6, 3, 3)
    ranks = (2, 3) if form == "tucker" else (3,)

    thin = factor(weight, 2, form, ranks)

    alone = np.concatenate([factor(half, 1, form, ranks).dense() for half in np.split(weight, 2)])
    np.testing.assert_allclose(thin.dense(), alone, rtol=0, atol=1e-5 * largest(weight))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_makes_a_channel_has_the_norm_of_what_reads_it(form: str, data: st.DataObject):
    weight, group = data.draw(weights_of(form))

    thin = factor(weight, group, form, data.draw(st.composite(ranks_within)(form, weight, group)))

    for index, own in enumerate(thin.groups()[1:]):
        made, following = thin.weights[index], thin.weights[index + 1]
        parts = following.reshape(own, -1, following.shape[1], math.prod(following.shape[2:]))
        read = np.sqrt(np.square(parts).sum(axis=(1, 3))).reshape(-1)
        norms = np.linalg.norm(made.reshape(len(made), -1), axis=1)
        np.testing.assert_allclose(norms, read, rtol=1e-4, atol=1e-6 * largest(weight))


def test_balancing_leaves_the_dense_weight():
    thin = factor(random_weights(8, 6, 3, 3), 1, "tucker", (3, 4))
    uneven = thin.with_last(thin.last() * np.logspace(-3, 3, 4)[:, None])

    balanced = uneven.balanced()

    np.testing.assert_allclose(balanced.dense(), uneven.dense(), rtol=0, atol=1e-5 * largest(uneven.dense()))
    assert largest(balanced.weights[-1]) < 0.1 * largest(uneven.weights[-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_the_scale_of_a_weight_does_not_matter(form: str, scale: float):
    weight = random_weights(6, 4, 3, 3)
    ranks = (2, 2) if form == "tucker" else (2,)

    found = factor(np.float32(scale) * weight, 1, form, ranks).dense()

    wanted = np.float32(scale) * factor(weight, 1, form, ranks).dense()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * largest(wanted))


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form: str):
    weight = random_weights(8, 6, 3, 3)
    weight[:4] = 0  # all of the first group

    thin = factor(weight, 2, form, (2, 2) if form == "tucker" else (2,))

    assert all(np.isfinite(each).all() for each in thin.weights)
    assert not thin.dense()[:4].any()
    assert thin.dense()[4:].any()


@pytest.mark.parametrize("form", FORMS)
def test_constant_weights_are_found_with_any_rank(form: str):
    weight = np.ones((6, 4, 3, 3), np.float32)

    for rank in (1, 2, 4):
        found = factor(weight, 1, form, (rank, rank) if form == "tucker" else (rank,)).dense()
        np.testing.assert_allclose(found, weight, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_weight_gives_the_same_factors(form: str):
    weight, ranks = random_weights(6, 4, 3, 3), (2, 3) if form == "tucker" else (7,)

    one, other = (factor(weight, 1, form, ranks) for _ in range(2))

    assert all(np.array_equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


def test_ranks_beyond_the_full_ones_are_cut():
    thin = factor(random_weights(6, 4, 3), 1, "tucker", (100, 100))

    assert [weight.shape for weight in thin.weights] == [(4, 4, 1), (6, 4, 3), (6, 6, 1)]


@pytest.mark.parametrize(
    ("weight", "form", "ranks"),
    [
        (random_weights(6, 4, 1, 1), "tucker", (2, 2)),
        (random_weights(6, 4, 3), "spatial", (2,)),
        (random_weights(6, 4, 3, 3), "svd", (0,)),
        (np.full((6, 4, 3, 3), np.nan, np.float32), "cp", (2,)),
    ],
    ids=["no such form", "one axis", "rank 0", "NaN"],
)
def test_what_cannot_be_factored_is_refused(weight: Array, form: str, ranks: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"does not have the form|must be positive"):
        factor(weight, 1, form, ranks)


# --- features, counts and ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_features_times_the_last_weight_is_the_dense_one(form: str, data: st.DataObject):
    weight, group = data.draw(weights_of(form))
    thin = factor(weight, group, form, data.draw(st.composite(ranks_within)(form, weight, group)))

    found = thin.features() @ thin.last()

    wanted = matrices(thin.dense(), group)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * largest(weight))


@pytest.mark.parametrize("form", FORMS)
def test_the_last_weight_can_be_put_back(form: str):
    thin = factor(random_weights(8, 3, 3, 3), 2, form, (2, 2) if form == "tucker" else (2,))

    again = thin.with_last(thin.last())

    assert all(np.array_equal(a, b) for a, b in zip(thin.weights, again.weights, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_last_weight_fitted_to_data_loses_less_on_them(form: str):
    weight = random_weights(8, 6, 3, 3)
    thin = factor(weight, 1, form, (3, 3) if form == "tucker" else (3,))
    windows = np.random.default_rng(1).normal(size=(200, 54)) * np.linspace(0.1, 2, 54)

    seen, wanted = windows @ thin.features()[0], windows @ matrices(weight, 1)[0]
    fitted = thin.with_last(np.linalg.lstsq(seen, wanted, rcond=None)[0][None])

    losses = [np.linalg.norm(windows @ matrices(each.dense(), 1)[0] - wanted) for each in (fitted, thin)]
    assert losses[0] < 0.99 * losses[1]
    assert all(weight.dtype == np.float32 for weight in fitted.weights)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_parameters_and_macs_are_those_of_the_model(form: str, data: st.DataObject):
    weight, attrs, x = data.draw(cases(form))
    x = x[:1]
    thin = factor(weight, attrs["group"], form, data.draw(st.composite(ranks_within)(form, weight, attrs["group"])))
    proto = convs(thin.weights, thin.attributes(attrs), x.shape)

    macs = thin.macs(x.shape[2:], run(proto, {"x": x})[0].shape[2:])

    assert macs == sum(mac_counts(Model.load(proto)).values())
    assert thin.parameters == sum(math.prod(each.dims) for each in proto.graph.initializer if each.name != "b")


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_weights_have_the_shapes_foretold(form: str, data: st.DataObject):
    weight, group = data.draw(weights_of(form))
    ranks = ranks_for(form, weight.shape, group, data.draw(st.integers(1, weight.size)))
    assume(ranks is not None)
    assert ranks is not None

    thin = factor(weight, group, form, ranks)

    assert [each.shape for each in thin.weights] == factor_shapes(form, weight.shape, group, ranks)
    assert thin.kernel == weight.shape[2:]
    assert thin.dense().shape == weight.shape


@pytest.mark.parametrize("form", ["svd", "spatial", "cp"])
@pytest.mark.parametrize("group", [1, 2])
def test_one_rank_more_would_be_too_many_parameters(form: str, group: int):
    shape, most = (32, 12, 3, 3), 1000

    ranks = ranks_for(form, shape, group, most)

    assert ranks is not None
    sizes = [sum(map(math.prod, factor_shapes(form, shape, group, (each,)))) for each in (ranks[0], ranks[0] + 1)]
    assert sizes[0] <= most < sizes[1]


def test_the_ranks_of_tucker_are_as_inputs_and_outputs_are():
    ranks = ranks_for("tucker", (64, 16, 3, 3), 1, 4000)

    assert ranks is not None
    assert abs(ranks[1] / ranks[0] - 4) < 0.5
    assert 3000 < sum(map(math.prod, factor_shapes("tucker", (64, 16, 3, 3), 1, ranks))) <= 4000


@pytest.mark.parametrize(
    ("parameters", "wanted"), [(8 * 340, (8,)), (11 * 340, (11,)), (13 * 340, (8,)), (47 * 340, (40,))]
)
def test_ranks_are_multiples_unless_that_would_take_much_from_them(parameters: int, wanted: tuple[int, ...]):
    assert ranks_for("svd", (52, 32, 3, 3), 1, parameters, 8) == wanted


@pytest.mark.parametrize("form", FORMS)
def test_too_few_parameters_have_no_ranks(form: str):
    assert ranks_for(form, (8, 6, 3, 3), 1, 10) is None


@pytest.mark.parametrize(
    ("shape", "group", "forms"),
    [
        ((64, 32, 3, 3), 1, FORMS),
        ((64, 32, 1, 1), 1, ("svd",)),
        ((64, 32, 1, 7), 1, ("svd", "tucker", "cp")),
        ((64, 32, 5), 1, ("svd", "tucker", "cp")),
        ((64, 32, 3, 3, 3), 1, ("svd", "tucker", "cp")),
        ((64, 1, 3, 3), 64, ("spatial", "cp")),  # depthwise
        ((2, 1, 1, 1), 1, ()),
    ],
)
def test_forms_are_those_that_can_have_fewer_parameters(shape: tuple[int, ...], group: int, forms: tuple[str, ...]):
    assert tuple(form for form in FORMS if has_form(form, shape, group)) == forms


def test_a_chain_made_by_hand_is_understood():
    first, last = random_weights(2, 3, 3, 1), random_weights(4, 2, 1, 3, seed=1)

    thin = ConvFactors("spatial", 1, (first, last))

    wanted = np.einsum("nrj,rci->ncij", last[:, :, 0], first[..., 0])
    np.testing.assert_allclose(thin.dense(), wanted, rtol=1e-5)
