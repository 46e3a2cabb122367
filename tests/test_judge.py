"""The judge measures candidates against the original, and cannot be fooled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxcomp.budget import Budget
from onnxcomp.data import Dataset, generate, input_specs, open_data
from onnxcomp.errors import OptionError
from onnxcomp.judge import SAME_KERNELS, Judge
from onnxcomp.metrics import get_metric
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.quality import Quality
from onnxcomp.runtime import Runtime
from onnxcomp.targets import TARGETS, host_target
from onnxcomp_passes import Quantize, QuantizeWeights
from tests.models import graph_model


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def dense_model(final: str = "y = Softmax(h)") -> Model:
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 128] x) => (float[N, 8] y) {{ h = MatMul(x, W) {final} }}'
    )
    proto = parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.ClearField("domain")
        node.name = f"node{index}"
    weight = np.random.default_rng(0).standard_normal((128, 8)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    return Model.load(proto)


def samples(model: Model, count: int = 48) -> Dataset:
    values = np.random.default_rng(1).standard_normal((count, 128)).astype(np.float32)
    return open_data({"x": values}, input_specs(model.proto()))


def make_judge(model: Model, data: Dataset, runtime: Runtime, folder: Path, **options: Any) -> Judge:
    settings: dict[str, Any] = {"metric": None, "budget": Budget(), "target": host_target(), **options}
    return Judge(model, select=data, confirm=data, runtime=runtime, workdir=folder, **settings)


def loss(**values: Any) -> Quality:
    given = {"kind": "metric", "drop": 0.0, "interval": (0.0, 0.0), "error": 0.0, "plain_error": 0.0, "sqnr_db": 99.0}
    made = {**given, "agreement": None, "metric": None, "samples": 10, **values}
    sure = {f"{kind}_interval": (made[key],) * 2 for kind, key in (("error", "error"), ("plain", "plain_error"))}
    return Quality(**{**sure, **made})


def scaled(model: Model, factor: float) -> Model:
    fork = model.fork()
    fork.set_weight("W", model.weight("W") * np.float32(factor))
    return fork


@pytest.mark.parametrize("limits", [{"max_drop": float("nan")}, {"max_drop": -0.1}, {"max_error": float("nan")}])
def test_a_budget_that_would_allow_all_or_nothing_is_refused(limits):
    with pytest.raises(OptionError, match=r"max_(drop|error) must be at least 0, got (nan|-0\.1)"):
        Budget(**limits)


def test_the_original_loses_nothing_and_is_as_fast_as_itself(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()
    judge = make_judge(model, samples(model), runtime, tmp_path)

    score = judge.score(model)

    assert (score.speed, score.size, score.evidence) == (1.0, 1.0, SAME_KERNELS)
    assert (score.drop, score.quality.error) == (0.0, 0.0)


def test_a_wrong_model_is_not_lossless_and_not_allowed(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model("y = Relu(h)")
    judge = make_judge(model, samples(model), runtime, tmp_path)

    quality = judge.quality(scaled(model, 1.3))

    assert quality.error == pytest.approx(0.3 / np.sqrt(1 - 1 / np.pi), rel=0.1)  # of a half-normal without its mean
    assert not judge.is_lossless(quality)
    assert not judge.allows(quality)


def test_float_rounding_is_lossless(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model("y = Relu(h)")
    judge = make_judge(model, samples(model), runtime, tmp_path)

    assert judge.is_lossless(judge.quality(scaled(model, 1 + 2**-20)))


def test_probabilities_are_judged_by_expected_drop(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()
    judge = make_judge(model, samples(model), runtime, tmp_path)

    flipped = model.fork()
    flipped.set_weight("W", -model.weight("W"))

    assert judge.kind == "expected-drop"
    assert judge.quality(scaled(model, 1.5)).drop == 0.0
    assert (judge.quality(flipped).drop or 0.0) > 0.5


def test_stored_weights_have_the_same_kernels(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()
    judge = make_judge(model, samples(model), runtime, tmp_path)
    stored = model.fork()
    QuantizeWeights().rewrite(stored, Context())

    score = judge.score(stored)

    assert score.evidence == SAME_KERNELS
    assert score.size > 2
    assert score.value == pytest.approx(score.size)


def test_a_part_of_the_kernels_is_no_more(runtime: Runtime, tmp_path: Path) -> None:
    more, fewer = dense_model("r = Relu(h) y = Softmax(r)"), dense_model()
    census = {}
    for name, model in {"more": more, "fewer": fewer}.items():
        model.save(tmp_path / f"{name}.onnx")
        census[name] = runtime.census(tmp_path / f"{name}.onnx")

    assert Judge.no_more_kernels(census["fewer"], census["more"])
    assert not Judge.no_more_kernels(census["more"], census["fewer"])


def test_macs_in_int8_kernels_are_counted(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()
    data = samples(model)
    judge = make_judge(model, data, runtime, tmp_path, timing=False)
    int8 = model.fork()
    Quantize().rewrite(int8, Context(data=data, runtime=runtime, workdir=tmp_path))

    score = judge.score(int8)

    assert (score.macs, score.int8_macs) == (128 * 8, 128 * 8)
    assert score.evidence == "estimated"
    assert judge.score(model).int8_macs == 0


def test_scores_are_remembered_by_contents(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()
    judge = make_judge(model, samples(model), runtime, tmp_path)

    assert judge.score(model) is judge.score(model.fork())


def test_forgetting_a_candidate_deletes_its_file_but_never_the_original(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()
    judge = make_judge(model, samples(model), runtime, tmp_path)
    other = scaled(model, 2)
    path = judge.path_of(other)

    judge.forget(other)
    judge.forget(model)

    assert not path.exists()
    assert judge.original_path.exists()


def test_another_target_is_never_timed(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()
    other = next(target for target in TARGETS.values() if not target.is_host)

    assert not make_judge(model, samples(model), runtime, tmp_path, target=other).timed


def test_generated_inputs_are_never_taken_for_classes(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model()

    assert make_judge(model, generate(model.proto()), runtime, tmp_path).kind == "relative-error"


@pytest.mark.parametrize(
    ("quality", "allowed"),
    [
        (loss(drop=0.004), True),
        (loss(drop=0.006), False),
        (loss(drop=-0.1, error=5.0), True),
        (loss(drop=0.0, error=float("inf")), False),
        (loss(kind="expected-drop", error=0.3), True),
        (loss(kind="expected-drop", plain_error=0.11), False),
        (loss(kind="expected-drop", error=0.3, guessed=True), False),
        (loss(kind="expected-drop", error=0.1, guessed=True), True),
        (loss(kind="expected-drop", plain_error=0.09, plain_interval=(0.07, 0.11), guessed=True, samples=31), False),
        (loss(kind="expected-drop", plain_error=0.09, plain_interval=(0.07, 0.11), guessed=True, samples=32), True),
        (loss(kind="expected-drop", plain_error=0.09, plain_interval=(0.07, 0.11), samples=31), True),
        (loss(kind="expected-drop", error=0.09, score_error=0.3), True),
        (loss(kind="expected-drop", error=0.11, score_error=0.0), False),
        (loss(kind="expected-drop", drop=0.002, score_error=0.1), True),
        (loss(kind="expected-drop", drop=0.003, score_error=0.1), False),
        (loss(kind="relative-error", drop=None, error=0.1), True),
        (loss(kind="relative-error", drop=None, error=0.21), False),
        (loss(kind="relative-error", drop=None, error=0.1, plain_error=0.11), False),
        (loss(kind="relative-error", drop=None, error=0.1, error_interval=(0.05, 0.21)), False),
        (loss(kind="relative-error", drop=None, plain_error=0.05, plain_interval=(0.01, 0.11)), False),
    ],
)
def test_a_budget_allows_what_it_says(quality: Quality, allowed: bool) -> None:
    assert Budget().allows(quality) is allowed


def test_a_share_of_the_budget_is_smaller() -> None:
    assert not Budget().allows(loss(drop=0.004), share=0.5)


def test_float_rounding_is_never_held_against_a_candidate() -> None:
    assert Budget().allows(loss(drop=None, error=0.3), rounding=0.4)


def test_a_cautious_judge_takes_labels_and_the_expected_drop(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model("y = Softmax(h)")
    values = np.random.default_rng(1).standard_normal((48, 128)).astype(np.float32)
    data = open_data({"x": values, "label": np.zeros(48, np.int64)}, input_specs(model.proto()))
    judge = make_judge(model, data, runtime, tmp_path, metric=get_metric("top1"), classifier=True, timing=False)
    coarser = judge.quality(scaled(model, 1.3))
    free = replace(coarser, drop=0.0)

    assert coarser.kind == "metric"
    assert coarser.expected_drop is not None
    assert judge.allows(free)
    judge.cautious = True
    assert judge.allows(free)
    assert not judge.allows(replace(free, expected_drop=0.006))


def test_tells_which_part_of_the_budget_is_used_up(runtime: Runtime, tmp_path: Path) -> None:
    model = dense_model("y = Identity(h)")
    judge = make_judge(model, samples(model), runtime, tmp_path, timing=False)

    assert judge.used(model) == 0.0
    used = judge.used(scaled(model, 1.05))
    assert used == pytest.approx(0.5, abs=0.011)  # 5 % of the whole output, of which 10 % are allowed
    assert judge.used(scaled(model, 2.0)) == 1.0


def int8_model(ends: str) -> Model:
    """A model of another tool's: QLinearConv in it already, or nodes that ONNX Runtime makes such kernels of."""
    text = """g (float[N, 4, 8, 8] x) => (float[N, 8, 8, 8] y) {
        q = QuantizeLinear(x, s, z) c = QLinearConv(q, s, z, W, w, o, s, z) h = DequantizeLinear(c, s, z) %s }"""
    weight = np.random.default_rng(0).integers(-127, 128, (8, 4, 1, 1)).astype(np.int8)
    scales: dict[str, Any] = {
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "w": np.full(8, 0.01, np.float32),
        "o": np.zeros(8, np.int8),
    }
    return Model.load(graph_model(text % ends, W=weight, **scales))


def test_the_operators_of_quantized_models_count_as_int8_without_nodes_around_them(
    runtime: Runtime, tmp_path: Path
) -> None:
    model = int8_model("y = Relu(h)")
    judge = make_judge(model, generate(model.proto()), runtime, tmp_path)

    assert judge.score(model).int8_macs == judge.score(model).macs == 8 * 4 * 8 * 8


def test_what_was_int8_already_is_no_gain_in_an_estimated_speed(runtime: Runtime, tmp_path: Path) -> None:
    model, other = int8_model("n = Sqrt(h) y = Relu(n)"), int8_model("y = Relu(h)")
    judge = make_judge(model, generate(model.proto()), runtime, tmp_path, timing=False)

    assert (judge.score(other).speed, judge.score(other).evidence) == (1.0, "estimated")
