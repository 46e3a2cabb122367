"""How much `low-rank` takes: what is asked for, and what the data and the budget allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import Budget, optimize
from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.report import write_json
from onnxcomp.runtime import Runtime
from onnxcomp_passes import LowRank, Simplify
from onnxcomp_passes._rank_options import rounded
from tests.models import Array, graph_model, mlp_model, random_weights, run
from tests.thin_weights import fading, few, weights_of

SAMPLES = Path(__file__).parent.parent / "sample_models"
LENET = SAMPLES / "fashion_lenet.onnx"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def network(sizes: Sequence[int] = (32, 48, 48, 24), powers: Sequence[float] = (0.5, 1, 2), **extra: Array) -> Any:
    """MatMul, Add and Relu in turn, with weights W0, W1, ... that fade, and biases b0, b1, ..."""
    weights, lines, source = dict(extra), [], "x"
    for number, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        if f"W{number}" not in extra:
            weights[f"W{number}"] = fading(rows, columns, powers[number % len(powers)], seed=number)
        weights[f"b{number}"] = random_weights(columns, seed=number, scale=0.3)
        lines.append(f"m{number} = MatMul({source}, W{number}) h{number} = Add(m{number}, b{number})")
        source = f"r{number}"
        lines.append(f"{source} = Relu(h{number})")
    body = " ".join(lines[:-1]).replace(f"h{len(sizes) - 2} =", "y =")
    return graph_model(f"g (float[N, {sizes[0]}] x) => (float[N, {sizes[-1]}] y) {{ {body} }}", weights)


def thinned(proto: onnx.ModelProto, context: Context | None = None, **options: Any) -> tuple[Model, Changes]:
    model = Model.load(proto)
    changes = LowRank(**{"min_elements": 1, **options}).rewrite(model, context or Context())
    return model, changes


def ranks(changes: Changes) -> dict[str, str]:
    return dict(text.split("=") for text in changes.resolved["ranks"])


def left(changes: Changes) -> dict[str, str]:
    return {each.where: each.why for each in changes.left}


# --- asked for --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "energy": 0.9}, "rank and energy both say how much"),
        ({"ratio": 2.0, "ranks": ("W=svd:4",)}, "ratio and ranks both say how much"),
        ({"ratio": 1.0}, "must be above 1"),
        ({"ratio": 0.5}, "must be above 1"),
        ({"energy": 1.5}, "energy must be"),
        ({"rank": -1}, "rank must be"),
        ({"conv": "qr"}, "conv must be one of"),
        *(
            ({"ranks": (text,)}, "NAME=FORM:RANK")
            for text in ("W", "W=4", "W=svd", "W=svd:0", "W=svd:2x2", "W=tucker:4", "W=qr:4", "=svd:4", "W=svd:-1")
        ),
    ],
)
def test_amounts_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        LowRank(**options)


def test_a_rank_is_that_of_every_weight():
    _, changes = thinned(network(), rank=7)

    assert ranks(changes) == dict.fromkeys(("W0", "W1", "W2"), "svd:7")


@pytest.mark.parametrize("ratio", [1.05, 1.5, 3.0, 8.0])
@pytest.mark.parametrize("powers", [(0.5, 1, 2), (3, 0.1)])
def test_a_ratio_is_that_of_the_whole_model(ratio: float, powers: tuple[float, ...]):
    proto = network((64, 128, 128, 64, 64), powers)

    model, changes = thinned(proto, ratio=ratio)

    reached = weights_of(proto) / weights_of(model)
    step = 4 * (128 + 128) / weights_of(model)  # one rank to the next in the widest layer
    assert ratio <= reached <= ratio * (1 + max(0.05, step))
    assert changes.notes == [f"{reached:.2f} times fewer weights in the whole model"]


@settings(max_examples=25, deadline=None)
@given(st.floats(1.1, 20), st.lists(st.floats(0.1, 3), min_size=1, max_size=4), st.integers(8, 200))
def test_a_ratio_is_kept_where_it_can_be(ratio: float, powers: list[float], side: int):
    proto = network((side,) * (len(powers) + 1), powers)
    most = side / 2  # at rank 1

    model, _ = thinned(proto, ratio=ratio)

    assert weights_of(proto) / weights_of(model) >= min(ratio, most) * (1 - 1e-9)


@pytest.mark.parametrize("ratio", [1.3, 3.0, 10.0, 30.0])
def test_of_a_large_weight_ranks_near_to_any_ratio_are_looked_at(ratio: float):
    proto = network((1024, 1024), (1.0,), W0=random_weights(1024, 1024))

    model, _ = thinned(proto, ratio=ratio)

    assert ratio <= weights_of(proto) / weights_of(model) <= 1.1 * ratio


def test_a_ratio_out_of_reach_takes_all_there_is_and_says_how_much_that_was():
    _, changes = thinned(network((64, 64, 64), (1.0, 2.5)), ratio=500.0)

    assert ranks(changes) == {"W0": "svd:1", "W1": "svd:1"}
    assert changes.notes == ["32.00 times fewer weights in the whole model"]


def test_a_ratio_takes_most_where_least_is_lost():
    _, changes = thinned(network((64, 64, 64), (0.1, 2.5)), ratio=1.6)

    found = ranks(changes)
    assert list(found) == ["W1"]


def test_no_other_allocation_with_so_few_weights_misses_less():
    proto = network((24, 24, 24), (0.5, 1.5))
    _, changes = thinned(proto, ratio=2.0, round_to=1)
    found = {name: int(text.partition(":")[2]) for name, text in ranks(changes).items()}
    energies = [np.square(np.arange(1, 25.0) ** -power) for power in (0.5, 1.5)]

    def missed(taken: Sequence[int]) -> float:
        shares = (each[rank:].sum() / each.sum() for each, rank in zip(energies, taken, strict=True) if rank)
        return float(sum(shares))

    def weights(taken: Sequence[int]) -> int:
        return sum(rank * 48 if rank else 24 * 24 for rank in taken)

    best = min(missed(each) for each in itertools.product(range(12), repeat=2) if weights(each) <= 24 * 24)
    assert missed([found.get("W0", 0), found.get("W1", 0)]) <= 1.05 * best


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.0])
def test_every_layer_keeps_its_energy(energy: float):
    proto = network()

    _, changes = thinned(proto, energy=energy)

    wanted = energy or 0.99
    for number, power in enumerate((0.5, 1, 2)):
        rows, columns = ((32, 48), (48, 48), (48, 24))[number]
        values = np.square(np.arange(1, min(rows, columns) + 1.0) ** -power)
        kept = np.cumsum(values) / values.sum()
        if f"W{number}" in ranks(changes):
            rank = int(ranks(changes)[f"W{number}"].partition(":")[2])
            assert kept[rank - 1] >= wanted
            less = [each for each in range(1, rank) if rounded(each, 4) == each and kept[each - 1] >= wanted]
            assert not less
        else:
            even = rows * columns / (rows + columns)
            assert kept[rounded(math.ceil(even) - 1, 4) - 1] < wanted
            assert left(changes)[f"W{number}"] == f"no fewer weights keep {wanted:.2%} of the energy of its output"


@pytest.mark.parametrize(("multiple", "expected"), [(0, 4), (1, 1), (8, 8), (16, 16)])
def test_ranks_are_a_multiple_of_what_kernels_like(multiple: int, expected: int):
    _, changes = thinned(network((96, 96, 96, 96), (0.5, 0.7, 0.8)), ratio=1.5, round_to=multiple)

    found = [int(text.partition(":")[2]) for text in ranks(changes).values()]
    assert found
    assert all(rank % expected == 0 for rank in found if rank >= 1.5 * expected)


@pytest.mark.parametrize("form", ["svd", "spatial", "tucker"])
def test_a_conv_takes_the_form_that_fits_it_tucker_on_request_alone(form: str):
    shape = (64, 48, 3, 3)
    graph = "g (float[1, 48, 6, 6] x) => (float[1, 64, 4, 4] y) { y = Conv(x, W) }"
    proto = graph_model(graph, W=few(form, shape, 1, count=12) + random_weights(*shape, scale=0.001))

    found = {conv: ranks(thinned(proto, energy=0.99, conv=conv)[1]).get("W", "") for conv in ("auto", form)}

    assert found["auto"].partition(":")[0] == ("svd" if form == "tucker" else form)
    assert found[form].partition(":")[0] == form


@pytest.mark.parametrize("options", [{"ratio": 6.0}, {"energy": 0.7}])
def test_weaker_forms_save_less(options: dict[str, float]):
    proto, asked = network(), LowRank(min_elements=1, **options)  # type: ignore[arg-type]

    sizes = []
    for each in (asked, *asked.weaker()):
        model = Model.load(proto)
        each.rewrite(model, Context())
        sizes.append(weights_of(model))

    assert len(sizes) == 3
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < weights_of(proto)


def test_a_rank_that_was_asked_for_has_no_weaker_form():
    for each in (LowRank(rank=4), LowRank(ranks=("W=svd:4",)), LowRank()):
        assert not list(each.weaker())


# --- fitted to data ---------------------------------------------------------------------------------------------------


def inputs(count: int = 512, size: int = 32, seed: int = 0) -> Array:
    """Rows about a mean, that vary much in some directions and hardly in others."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(size, size)))[0]
    return np.asarray((rng.normal(size=(count, size)) * np.geomspace(2, 0.02, size)) @ turn + 0.5, np.float32)


def calibrated(proto: onnx.ModelProto, x: Array, runtime: Runtime, folder: Path, **options: Any) -> Model:
    data = open_data({"x": x}, input_specs(Model.load(proto).proto()))
    return thinned(proto, Context(data=data, runtime=runtime, workdir=folder), **options)[0]


def error(proto: onnx.ModelProto, model: Model, x: Array) -> float:
    wanted, got = (run(each, {"x": x})[0] for each in (proto, model))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


CONV_NET = """g (float[N, 4, 6, 6] x) => (float[N, 12, 2, 2] y) {
    a = Conv(x, W, b) r = Relu(a) y = Conv(r, V, c)
}"""


@pytest.mark.parametrize("form", ["gemm", "matmul", "conv"])
def test_the_mean_of_the_output_stays(form: str, runtime: Runtime, tmp_path: Path):
    x = inputs()
    if form == "conv":
        weights = {"W": random_weights(16, 4, 3, 3), "b": random_weights(16), "V": random_weights(12, 16, 3, 3)}
        proto, x = graph_model(CONV_NET, weights, c=random_weights(12)), random_weights(64, 4, 6, 6) + np.float32(0.5)
    else:
        proto = mlp_model((32, 48, 24)) if form == "gemm" else network()

    model = calibrated(proto, x, runtime, tmp_path, rank=3)
    plain, _ = thinned(proto, rank=3)

    axes = (0, 2, 3) if form == "conv" else (0,)
    wanted, got, before = (run(each, {"x": x})[0].mean(axis=axes) for each in (proto, model, plain))
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(before - wanted).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_with_data_the_output_is_nearer_at_equal_rank(rank: int, runtime: Runtime, tmp_path: Path):
    proto, x = network((32, 48, 48, 48, 24), (0.3,)), inputs()

    found = [
        error(proto, calibrated(proto, x, runtime, tmp_path, rank=rank, **options), inputs(seed=7))
        for options in ({}, {"refit": False}, {"whiten": False})
    ]

    assert np.isfinite(found).all()
    assert found[0] < found[1] < found[2]


def test_what_is_missed_is_made_up_for_behind(runtime: Runtime, tmp_path: Path):
    """The last layer has full rank left to it, and no weights of its own to save: only refit changes what it does."""
    proto, x = network((32, 48, 24), (0.1, 3)), inputs()
    options: dict[str, Any] = {"ranks": ("W0=svd:6", "W1=svd:12")}

    refit, fixed = (
        error(proto, calibrated(proto, x, runtime, tmp_path, refit=refit, **options), x) for refit in (True, False)
    )

    assert refit < fixed


def test_layers_whose_inputs_cannot_be_seen_are_split_by_themselves(runtime: Runtime, tmp_path: Path):
    text = """g (float[N, 32] x) => (float[N, 16] y) {
        t = Transpose<perm = [1, 0]>(x) a = MatMul(W, t) r = Relu(a) y = Gemm<transA = 1>(r, V, b)
    }"""
    proto = graph_model(text, W=fading(48, 32), V=fading(48, 16), b=random_weights(16))

    seen = calibrated(proto, inputs(), runtime, tmp_path, rank=6)

    assert seen.digest == thinned(proto, rank=6)[0].digest


def test_inputs_that_never_vary_do_no_harm(runtime: Runtime, tmp_path: Path):
    proto, x = network(), np.full((64, 32), 0.7, np.float32)

    model = calibrated(proto, x, runtime, tmp_path, rank=4)

    np.testing.assert_allclose(run(model, {"x": x})[0], run(proto, {"x": x})[0], atol=1e-4)
    assert np.isfinite(run(model, {"x": inputs()})[0]).all()


def test_inputs_whose_squares_overflow_are_not_looked_at(runtime: Runtime, tmp_path: Path):
    proto, x = network((32, 48, 24)), inputs() * np.float32(1e25)

    model = calibrated(proto, x, runtime, tmp_path, rank=4)

    assert weights_of(model) < weights_of(proto)
    assert model.digest == thinned(proto, rank=4)[0].digest


# --- chosen -----------------------------------------------------------------------------------------------------------


def images(count: int = 256) -> dict[str, Any]:
    return {"image": np.load(SAMPLES / "fashion_calib.npz")["image"][:count]}


def chosen(**more: Any) -> Any:
    passes = [Simplify(), LowRank()]
    return optimize(LENET, data=images(), passes=passes, budget=Budget(max_drop=0.02), resume=False, **more)


def test_a_choice_within_the_budget_saves_and_is_the_same_each_time_and_replayed(tmp_path: Path):
    result, again = chosen(timing=False), chosen(timing=False)

    report = result.report
    assert report.stages[1].verdict == "kept"
    assert report.budget_met
    assert report.after.macs < 0.7 * report.before.macs
    assert again.model.digest == result.model.digest
    onnx.checker.check_model(result.model.to_proto(), full_check=True)
    write_json(report, tmp_path / "report.json")
    replayed = optimize(LENET, data=images(), replay=tmp_path / "report.json", timing=False, resume=False)
    assert replayed.model.digest == result.model.digest


def test_with_a_clock_only_what_runs_faster_is_split():
    report = chosen().report

    [entry] = [entry for entry in report.stages[1].attempts[-1].passes if entry.name == "low-rank"]
    speeds = [row[-1] for row in entry.tables[0]["rows"]]
    assert report.stages[1].verdict == "kept"
    assert speeds
    assert min(speeds) > 1


def test_where_nothing_pays_all_stays_and_each_layer_has_a_reason():
    proto = mlp_model((64, 64, 64, 64))
    data = {"x": random_weights(128, 64, seed=5)}

    budget = Budget(max_drop=1e-5, max_error=1e-4)

    result = optimize(proto, data=data, passes=[LowRank()], budget=budget, timing=False, resume=False)

    assert result.model.to_proto().graph == Model.load(proto).to_proto().graph
    stage = result.report.stages[0]
    assert stage.verdict != "kept"
    assert {each["where"] for each in stage.attempts[-1].passes[0].left} == {"W0", "W1", "W2"}


def test_generated_data_tell_nothing_of_what_may_go():
    result = optimize(mlp_model((64, 64, 64)), passes=[LowRank()], timing=False, resume=False)

    assert result.model.to_proto().graph == Model.load(mlp_model((64, 64, 64))).to_proto().graph
