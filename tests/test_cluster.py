from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp import Budget, optimize
from onnxcomp.errors import OptionError
from onnxcomp.model import Model, value_of
from onnxcomp.pass_options import make_pass
from onnxcomp.passes import Changes, Context
from onnxcomp_passes import Cluster, Float16, QuantizeWeights
from onnxcomp_passes._kmeans import code_book
from onnxcomp_passes._views import find_views
from tests.models import graph_model, matmul_model, mlp_model, random_weights
from tests.small import save_classifier, save_samples

Array = np.ndarray[Any, Any]


def clustered(source: onnx.ModelProto | Model, **options: Any) -> tuple[Model, Changes]:
    """Apply the pass."""
    model = Model.load(source)
    changes = Cluster(**options).rewrite(model, Context())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def left(changes: Changes) -> dict[str, str]:
    return {item.where: item.why for item in changes.left}


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
    model, _ = clustered(mlp_model((24, 32, 24)), bits=4)
    digest = model.digest

    _, again = clustered(model, bits=4)

    assert (again.count, model.digest) == (0, digest)
    assert left(again) == dict.fromkeys(["W0", "W1"], "has no more than 16 values already")


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

    model, _ = clustered(graph_model(text, W=random_weights(24, 24)), bits=4)

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
    model, changes = clustered(matmul_model(weight), bits=4)

    assert (changes.count, left(changes)) == (0, {"W": why})
    np.testing.assert_array_equal(model.weight("W"), weight)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"bits": 9}, "bits must be from 0 to 8, got 9"),
        ({"widths": ("W",)}, "widths must be NAME=BITS with 1 to 8 bits, got 'W'"),
        ({"widths": ("W=9",)}, "widths must be NAME=BITS with 1 to 8 bits, got 'W=9'"),
    ],
)
def test_refuses_bits_that_no_codebook_has(options: dict[str, Any], what: str):
    with pytest.raises(OptionError, match=f"cluster: {what}"):
        Cluster(**options)


# --- integers ---------------------------------------------------------------------------------------------------------


def stored(weight: Array, **options: Any) -> Model:
    model = matmul_model(weight)
    QuantizeWeights(**options).rewrite(model, Context())
    return model


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_integers_the_codes_take_few_values(symmetric: bool):
    model = stored(random_weights(64, 48) * np.float32(3), symmetric=symmetric, per_channel=symmetric)
    [before] = find_views(model)
    held = value_of(before.holder)

    after, changes = clustered(model, bits=4)

    [view] = find_views(after)
    assert (view.form, view.holder.dtype) == ("stored", held.dtype)
    assert len(np.unique(value_of(view.holder))) <= 16
    assert changes.changed[0].what == f"64x48 {held.dtype} takes at most 16 values"


def test_an_error_counts_with_the_scale_of_its_channel():
    codes = np.array([[-100, 100], [-98, 80], [-96, 60]], np.int8)
    large = code_book(codes, np.array([[1.0, 1e-4]]), 4)
    assert {-100, -98, -96} <= {int(code) for code in large}


@pytest.mark.parametrize("form", ["float", "float16", "int8", "qdq", "zero points"])
def test_zeros_stay_zeros_in_every_form(form: str):
    weight = random_weights(64, 48)
    weight[np.random.default_rng(1).random(weight.shape) < 0.7] = 0
    weight[0] = np.where(weight[0] == 0, np.float32(0.1), weight[0])
    model = matmul_model(weight)
    if form == "float16":
        Float16(storage_only=True).rewrite(model, Context())
    elif form == "qdq":
        QuantizeWeights(form="compute").rewrite(model, Context())
    elif form != "float":
        QuantizeWeights(symmetric=form == "int8", per_channel=form == "int8").rewrite(model, Context())
    [view] = find_views(model)
    zeros = view.read() == 0
    assert zeros.any()

    after, _ = clustered(model, bits=3)

    [view] = find_views(after)
    found = view.read()
    assert len(np.unique(value_of(view.holder))) <= 8
    np.testing.assert_array_equal(found[zeros], 0)
    assert np.linalg.norm(found - weight) < 0.35 * np.linalg.norm(weight)


def test_zero_points_that_differ_leave_a_sparse_weight_alone():
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((64, 48)) < 0.5, 0, rng.uniform(-1, 2, (64, 48)) * rng.uniform(1, 5, 48))
    weight[0], weight[1] = -np.arange(1, 49) / 10, 5.0
    model = stored(weight.astype(np.float32), symmetric=False)

    _, changes = clustered(model, bits=4)

    assert left(changes) == {"W": "its zeros have different codes"}


def test_widths_are_given_by_name():
    model, _ = clustered(mlp_model((24, 32, 24)), widths=("W0=2",), bits=3)

    assert [len(np.unique(model.weight(name))) for name in ("W0", "W1")] == [4, 8]


# --- choosing ---------------------------------------------------------------------------------------------------------


def chosen(max_drop: float, tmp_path: Path) -> dict[str, Any]:
    """What is chosen for the small classifier within a budget."""
    result = optimize(
        save_classifier(tmp_path / "model.onnx"),
        data=save_samples(tmp_path / "data.npz", 512),
        passes=[Cluster()],
        budget=Budget(max_drop=max_drop),
        timing=False,
        force=True,
    )
    [entry] = result.report.stages[0].attempts[0].passes
    widths = dict(item.split("=") for item in entry.options["widths"])
    for name, bits in widths.items():
        assert len(np.unique(result.model.weight(name))) <= 2 ** int(bits)
    return {"drop": result.report.stages[0].attempts[0].drop, "widths": widths, "options": entry.options}


def test_bits_are_as_few_as_the_budget_holds(tmp_path: Path):
    strict, loose = chosen(0.005, tmp_path), chosen(0.2, tmp_path)

    assert strict["drop"] <= 0.005
    assert loose["drop"] <= 0.2
    total = [sum(int(bits) for bits in found["widths"].values()) for found in (strict, loose)]
    assert total[1] < total[0]


def test_a_choice_is_repeated_without_measuring(tmp_path: Path):
    found = chosen(0.05, tmp_path)

    again = make_pass("cluster", found["options"])
    model = Model.load(tmp_path / "model.onnx")
    again.rewrite(model, Context())

    for name, bits in found["widths"].items():
        assert len(np.unique(model.weight(name))) <= 2 ** int(bits)


def test_without_data_bits_are_not_chosen(tmp_path: Path):
    report = optimize(save_classifier(tmp_path / "model.onnx"), passes=[Cluster()], timing=False, resume=False).report

    [entry] = report.stages[0].attempts[0].passes
    assert (report.stages[0].verdict, entry.changed) == ("unchanged", [])
    assert entry.left[-1]["why"] == "how few values do is measured on data; give --data, or bits=BITS"
