"""`prune-channels` where it takes what adds something: how much, which, what the layers behind make up for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp import Budget, Model, OptionError, RequirementError, compare, optimize
from onnxcomp.report import write_json
from onnxcomp_passes import PruneChannels, Simplify
from onnxcomp_passes._channel_choice import kept_units
from onnxcomp_passes._channel_scores import Consumer, compensated_rows, order_units
from onnxcomp_passes._channels_groups import find_channels
from onnxcomp_passes._views import find_views
from tests.models import graph_model, random_weights, run

SAMPLES = Path(__file__).parent.parent / "sample_models"
MOBILENET = SAMPLES / "fashion_mobilenet.onnx"
CALIB = SAMPLES / "fashion_calib.npz"
TEST = SAMPLES / "fashion_test.npz"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images(count: int = 64) -> dict[str, Any]:
    return {"image": np.load(CALIB)["image"][:count]}


def narrowed(**options: Any) -> Any:
    """The sample MobileNet with channels taken out, whatever that costs."""
    passes = [Simplify(), PruneChannels(**options)]
    return optimize(MOBILENET, data=images(), passes=passes, force=True, timing=False, resume=False)


def against_test_images(model: Model, tmp_path: Path) -> Any:
    """What is lost on labelled images that no fit has seen."""
    model.save(tmp_path / "narrow.onnx")
    return compare(MOBILENET, tmp_path / "narrow.onnx", data=TEST, metric="top1", timing=False).after


def test_a_quarter_of_the_work_goes_at_little_loss_once_the_layers_behind_are_fitted(tmp_path: Path) -> None:
    fitted, plain = narrowed(ratio=0.25), narrowed(ratio=0.25, refit=False)
    for result in (fitted, plain):
        assert result.report.after.macs <= 0.75 * result.report.before.macs
        onnx.checker.check_model(result.model.to_proto(), full_check=True)
    assert against_test_images(fitted.model, tmp_path).drop <= 0.02
    error = against_test_images(fitted.model, tmp_path).error
    assert error < 0.5 * against_test_images(plain.model, tmp_path).error


def test_what_stays_is_a_multiple_of_eight_unless_another_is_asked_for() -> None:
    for options, multiple in (({}, 8), ({"round_to": 16}, 16)):
        result = narrowed(ratio=0.3, scope="group", **options)
        groups = find_channels(result.model).groups
        assert groups
        assert all(group.units % multiple == 0 for group in groups if group.units >= 2 * multiple)


def test_what_was_asked_for_by_group_is_what_goes() -> None:
    model = Model.load(MOBILENET)
    name = find_channels(model).groups[-1].name
    before = {group.name: group.units for group in find_channels(model).groups}
    result = narrowed(removed=(f"{name}=24",))
    after = {group.name: group.units for group in find_channels(result.model).groups}
    assert {key: before[key] - after[key] for key in before if before[key] != after[key]} == {name: 24}


def test_a_choice_stays_within_the_budget_and_is_replayed(tmp_path: Path) -> None:
    passes = [Simplify(), PruneChannels(choose=True)]
    budget = Budget(max_drop=0.02)
    result = optimize(MOBILENET, data=images(256), passes=passes, budget=budget, timing=False, resume=False)
    report = result.report
    assert report.stages[1].verdict == "kept"
    assert report.budget_met
    assert report.before.macs is not None
    assert report.after.macs is not None
    assert report.after.macs < report.before.macs
    assert report.stages[1].attempts[-1].passes[0].tables
    write_json(report, tmp_path / "report.json")
    again = optimize(MOBILENET, data=images(256), replay=tmp_path / "report.json", budget=budget, resume=False)
    assert again.model.digest == result.model.digest


def test_an_amount_is_given_in_one_way_and_a_choice_needs_data() -> None:
    with pytest.raises(OptionError, match="ratio and choose both say how much"):
        PruneChannels(ratio=0.5, choose=True)
    with pytest.raises(RequirementError, match="needs data"):
        optimize(MOBILENET, passes=[PruneChannels(choose=True)])
    with pytest.raises(OptionError, match="NAME=COUNT"):
        PruneChannels(removed=("first",))


@pytest.mark.parametrize("criterion", ["l1", "l2", "activation", "median", "output"])
def test_every_criterion_takes_the_silent_units_first(criterion: str) -> None:
    text = "g (float[N, 8] x) => (float[N, 4] y) { [wide] a = MatMul(x, A) b = Relu(a) [narrow] y = MatMul(b, B) }"
    weights = {"A": random_weights(8, 24), "B": random_weights(24, 4, seed=1)}
    silent = [3, 11, 12, 20]
    weights["A"][:, silent] = 0
    if criterion == "median":  # what is nearest to the others: here all alike
        weights["A"][:, silent] = weights["A"].mean(axis=1, keepdims=True)
    model = Model.load(graph_model(text, weights))
    [group] = find_channels(model).groups
    data = random_weights(500, 8, seed=2)
    inputs = np.maximum(data @ weights["A"], 0).astype(np.float64)
    rows = np.concatenate([inputs, np.ones((500, 1))], axis=1)
    view = next(view for view in find_views(model) if view.name == "B")
    consumer = Consumer(view, np.arange(24)[:, None], weights["B"].astype(np.float64), rows.T @ rows / 500)
    order = order_units(group, [consumer], criterion, [weights["A"].T.astype(np.float64)])
    assert set(order.units[:4].tolist()) == set(silent)
    assert np.all(np.diff(order.errors) >= 0)


def test_units_that_others_repeat_cost_nothing_once_these_stand_in() -> None:
    text = "g (float[N, 6] x) => (float[N, 3] y) { a = MatMul(x, A) b = Relu(a) y = MatMul(b, B) }"
    weights = {"A": random_weights(6, 10), "B": random_weights(10, 3, seed=1)}
    weights["A"][:, 7] = 2 * weights["A"][:, 2]
    model = Model.load(graph_model(text, weights))
    view = next(view for view in find_views(model) if view.name == "B")
    inputs = np.maximum(random_weights(800, 6, seed=3) @ weights["A"], 0).astype(np.float64)
    rows = np.concatenate([inputs, np.ones((800, 1))], axis=1)
    consumer = Consumer(view, np.arange(10)[:, None], weights["B"].astype(np.float64), rows.T @ rows / 800)
    matrix, shift = compensated_rows(consumer, np.array([7]))
    wanted = inputs @ weights["B"]
    plain = np.where(np.arange(10)[:, None] == 7, 0, weights["B"])
    error = np.linalg.norm(inputs @ matrix + shift - wanted)
    assert not matrix[7].any()
    assert error < 0.1 * np.linalg.norm(inputs @ plain - wanted)


@pytest.mark.parametrize(("units", "ratio", "stay"), [(64, 0.25, 48), (64, 0.3, 48), (16, 0.9, 8), (10, 0.5, 5)])
def test_units_that_stay_are_rounded_up(units: int, ratio: float, stay: int) -> None:
    assert kept_units(units, ratio, 8) == stay


def silent(count: int) -> onnx.ModelProto:
    """Of 24 channels so many are always zero."""
    text = "g (float[N, 4, 6, 6] x) => (float[N, 5, 4, 4] y) { [wide] a = Conv(x, A) b = Relu(a) y = Conv(b, B) }"
    weights = {"A": random_weights(24, 4, 3, 3), "B": random_weights(5, 24, 1, 1, seed=1)}
    weights["A"][:count] = 0
    return graph_model(text, weights)


@pytest.mark.parametrize(("dead", "stay"), [(7, 24), (8, 16), (15, 16)])
def test_the_weaker_form_of_the_exact_one_leaves_counts_that_kernels_like(dead: int, stay: int) -> None:
    exact = PruneChannels()
    [weaker] = exact.weaker()
    assert exact.lossless
    assert weaker.lossless
    for form, left in ((exact, 24 - dead), (weaker, stay)):
        proto = silent(dead)
        result = optimize(proto, passes=[form], force=True, timing=False)
        [group] = find_channels(result.model).groups
        assert group.units == left
        x = random_weights(2, 4, 6, 6, seed=9)
        np.testing.assert_allclose(run(result.model, {"x": x})[0], run(proto, {"x": x})[0], rtol=1e-5, atol=1e-5)


def test_residual_blocks_that_do_next_to_nothing_go_when_asked_and_are_replayed(tmp_path: Path) -> None:
    text = """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, W0)
        f = Conv<pads = [1, 1, 1, 1]>(a, W1)
        [faint] b = Add(a, f)
        c = Relu(b)
        h = Conv<pads = [1, 1, 1, 1]>(c, W2)
        [loud] y = Add(c, h)
    }"""
    weights = {f"W{n}": random_weights(4, 4, 3, 3, seed=n) for n in range(3)}
    weights["W1"] *= np.float32(1e-4)
    proto, data = graph_model(text, weights), {"x": random_weights(64, 4, 6, 6, seed=9)}
    result = optimize(proto, data=data, passes=[PruneChannels(blocks=True)], timing=False, resume=False)
    assert [node.op for node in result.model.graph.nodes].count("Conv") == 2
    assert result.report.stages[0].verdict == "kept"
    write_json(result.report, tmp_path / "report.json")
    again = optimize(proto, data=data, replay=tmp_path / "report.json", resume=False)
    assert again.model.digest == result.model.digest
