from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from onnxcomp.errors import DataError, ModelError, OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.resume import cache_folder
from onnxcomp.train import Loss, Pruning, Trained, TrainOptions, distill
from onnxcomp_passes import Prune
from tests.models import graph_model, random_weights
from tests.training import LENET, QUICK, WEIGHTS, arrays, clustered, halved, pruned


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(model: Model) -> dict[str, bytes]:
    return {name: model.weight(name).tobytes() for name in (*WEIGHTS, "1.bias", "3.bias", "5.bias")}


def test_a_student_comes_nearer_to_its_teacher_without_labels():
    found = distill(LENET, pruned(), arrays(), options=QUICK)

    assert found.kept
    assert found.after.drop is not None
    assert found.before.drop is not None
    assert found.after.drop < 0.5 * found.before.drop


def test_neither_model_is_changed():
    teacher, student = Model.load(LENET), pruned()
    digests = teacher.digest, student.digest

    distill(teacher, student, arrays(), options=QUICK)

    assert (teacher.digest, student.digest) == digests


def test_the_graph_is_the_same_but_for_its_weights():
    student = halved()
    found = distill(LENET, student, arrays(), options=QUICK)

    before, after = student.proto(), found.model.proto()
    assert before.graph.node == after.graph.node
    assert before.graph.input == after.graph.input
    assert [(each.name, each.dims) for each in before.graph.initializer] == [
        (each.name, each.dims) for each in after.graph.initializer
    ]


def test_zeros_of_the_student_stay_zeros():
    student = pruned()
    found = distill(LENET, student, arrays(), options=QUICK)

    for name in WEIGHTS:
        before, after = student.weight(name), found.model.weight(name)
        np.testing.assert_array_equal(after[before == 0], 0)
        moved = (after[before != 0] != before[before != 0]).mean()
        assert moved > 0.5  # pixels at the edges are always black, and teach nothing


def test_a_pattern_of_zeros_stays():
    student = Model.load(LENET)
    Prune(pattern="2:4", keep_ends="false").rewrite(student, Context())
    found = distill(LENET, student, arrays(), options=QUICK)

    weight = found.model.weight("1.weight")
    assert found.kept
    assert (np.count_nonzero(weight.reshape(len(weight), -1, 4), axis=-1) <= 2).all()


def test_codebooks_are_trained_and_codes_are_kept():
    student = clustered()
    found = distill(LENET, student, arrays(), options=QUICK)

    for name in WEIGHTS:
        before, after = student.weight(name), found.model.weight(name)
        pairs = {(old, new) for old, new in zip(before.ravel().tolist(), after.ravel().tolist(), strict=True)}
        assert len(pairs) == len(np.unique(before))
        assert any(old != new for old, new in pairs)


def test_frozen_weights_are_not_trained():
    student = halved()
    found = distill(LENET, student, arrays(), options=QUICK, freeze=("1.*", "*.bias"))

    assert set(found.changed) == {"3.weight", "5.weight"}
    assert weights(found.model)["1.weight"] == weights(student)["1.weight"]


def test_a_student_that_training_makes_worse_stays_as_it_was():
    found = distill(LENET, LENET, arrays(), options=dataclasses.replace(QUICK, learning_rate=0.5))

    assert not found.kept
    assert found.changed == []
    assert weights(found.model) == weights(Model.load(LENET))


def test_one_seed_gives_one_result():
    one, other = (distill(LENET, pruned(), arrays(), options=QUICK) for _ in range(2))
    third = distill(LENET, pruned(), arrays(), options=dataclasses.replace(QUICK, seed=1))

    assert weights(one.model) == weights(other.model) != weights(third.model)


def test_parts_of_a_step_give_what_the_whole_does():
    one, other = (
        distill(LENET, pruned(), arrays(), options=dataclasses.replace(QUICK, epochs=1, accumulate=parts)).model
        for parts in (1, 4)
    )
    for name in WEIGHTS:
        np.testing.assert_allclose(one.weight(name), other.weight(name), atol=2e-5)


def test_labels_alone_teach_too():
    found = distill(
        LENET,
        pruned(0.95),
        arrays(400, labels=True),
        loss=Loss(alpha=0.0),
        options=dataclasses.replace(QUICK, epochs=8),
    )

    assert found.before.kind == "metric"
    assert found.after.drop is not None
    assert found.before.drop is not None
    assert found.after.drop < found.before.drop


def test_labels_that_are_no_classes_only_judge():
    data = arrays()
    wanted = np.asarray(ort.InferenceSession(str(LENET)).run(None, {"image": data["image"]})[0])
    found = distill(LENET, pruned(), {**data, "label": wanted}, metric="mse", options=QUICK)

    assert found.before.kind == "metric"
    assert found.kept


@pytest.mark.parametrize("term", ["features", "relational", "graph"])
def test_inner_tensors_can_be_learnt_from_alone(term: str):
    tensors = ("/2/Relu_output_0", "/4/Relu_output_0")
    weights: Any = {term: 1.0}
    loss = Loss(output_weight=0.0, tensors=tensors, **weights)
    found = distill(LENET, pruned(), arrays(), loss=loss, options=QUICK)

    losses = [each.loss for each in found.history.evaluations[1:]]
    assert losses[-1] < 0.7 * losses[0]


def test_vectors_have_no_attention_maps():
    with pytest.raises(OptionError, match="attention"):
        distill(LENET, pruned(), arrays(), loss=Loss(attention=1.0), options=QUICK)


def test_weights_become_zeros_on_the_way():
    found = distill(LENET, LENET, arrays(), options=QUICK, pruning=Pruning(sparsity=0.8))

    zeros = sum(int((found.model.weight(name) == 0).sum()) for name in WEIGHTS)
    assert zeros / sum(found.model.weight(name).size for name in WEIGHTS) == pytest.approx(0.8, abs=0.001)


def test_zeros_are_made_in_matrices_and_not_in_what_is_added_or_scales():
    text = """g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, V) b = Mul(a, scale) c = Add(b, mask)
        d = DequantizeLinear(W, s) e = Transpose(d) y = MatMul(c, e) }"""
    weights = {"V": random_weights(8, 8), "scale": random_weights(1, 8), "mask": random_weights(1, 8)}
    codes = np.random.default_rng(0).integers(-127, 128, (8, 8)).astype(np.int8)
    model = Model.load(graph_model(text, weights, W=codes, s=np.asarray(0.01, np.float32)))

    found = distill(model, model, {"x": random_weights(64, 8)}, pruning=Pruning(sparsity=0.9), options=QUICK)

    zeros = {name: int((found.model.weight(name) == 0).sum()) for name in ("V", "W", "scale", "mask")}
    assert zeros["V"] + zeros["W"] == round(0.9 * 128)
    assert zeros["scale"] == zeros["mask"] == 0


def test_an_average_of_the_weights_keeps_zeros():
    options = dataclasses.replace(QUICK, ema=0.9)
    found = distill(LENET, LENET, arrays(), options=options, pruning=Pruning(sparsity=0.8, end=0.5))

    zeros = sum(int((found.model.weight(name) == 0).sum()) for name in WEIGHTS)
    assert zeros / sum(found.model.weight(name).size for name in WEIGHTS) == pytest.approx(0.8, abs=0.001)


def test_a_learning_rate_that_is_too_high_is_lowered():
    told: list[str] = []
    options = dataclasses.replace(QUICK, learning_rate=0.3, evaluations=20)
    found = distill(LENET, halved(), arrays(), options=options, progress=told.append)

    assert any("goes back" in line for line in told)
    assert found.kept
    assert found.history.best is not None
    assert found.history.best.score < found.history.evaluations[0].score


def test_training_ends_early_without_gain():
    options = TrainOptions(epochs=40, learning_rate=0.3, patience=2, evaluations=20)
    found = distill(LENET, LENET, arrays(), options=options)

    assert found.history.steps < 40 * 3


def test_sequences_among_outputs_are_left_out_of_the_loss():
    text = """g (float[N, 6] x) => (seq(float[N, 2]) y, float[N, 4] h) <int64[2] sizes = {1, 3}>
        { h = MatMul(x, W) y = SplitToSequence<axis = 1>(h, sizes) }"""
    original, student = (graph_model(text, W=random_weights(6, 4, scale=scale)) for scale in (1.0, 0.5))

    found = distill(original, student, {"x": random_weights(64, 6)}, options=QUICK)

    assert found.after.error < found.before.error


def test_too_few_samples_are_refused():
    with pytest.raises(DataError, match="at least 4"):
        distill(LENET, LENET, arrays(3), options=QUICK)


def test_a_tensor_that_is_not_there_is_refused():
    with pytest.raises((ModelError, OptionError), match="nowhere"):
        distill(LENET, LENET, arrays(), loss=Loss(features=1.0, tensors=("nowhere",)), options=QUICK)


def test_a_loss_that_is_no_number_is_an_error():
    with pytest.raises(OptionError, match="smaller learning rate"):
        distill(LENET, LENET, arrays(), options=dataclasses.replace(QUICK, learning_rate=1e30, epochs=10))


def test_weights_that_no_gradient_reaches_are_told_of():
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        cast = CastLike(bound, x)
        low = Less(x, cast)
        z = Neg(x)
        y = Where(low, z, x)
    }"""
    model = graph_model(text, bound=np.zeros(4, np.float32))

    with pytest.raises(ModelError, match="no gradient of the loss reaches the weights that are to be trained: bound"):
        distill(model, model, {"x": random_weights(16, 4)}, options=TrainOptions(epochs=1), resume=False)


def test_outputs_that_are_not_finite_are_told_of_before_any_step():
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, W) y = Sqrt(a) }"
    student = graph_model(text, W=random_weights(4, 4))
    teacher = graph_model(text.replace("Sqrt", "Relu"), W=random_weights(4, 4))

    with pytest.raises(OptionError, match="from the start: look for outputs that are not finite"):
        distill(teacher, student, {"x": random_weights(64, 4)}, options=QUICK)


# --- going on after an interruption -----------------------------------------------------------------------------------

SCRIPT = """
import sys
from onnxcomp.train import Pruning, TrainOptions, distill
from onnxcomp_passes import Prune
from tests.models import graph_model, random_weights
from tests.training import LENET, arrays

found = distill(LENET, LENET, arrays(), options=TrainOptions(
    epochs=float(sys.argv[2]), batch_size=16, ema=0.9, checkpoint_seconds=0.02, optimizer=sys.argv[3],
), pruning=Pruning(sparsity=0.8))
found.model.save(sys.argv[1])
print("resumed at", found.history.resumed_at)
"""


def run(tmp_path: Path, name: str, optimizer: str) -> subprocess.Popen[str]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / name), "12", optimizer]
    paths = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in (".", "passes"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_to_the_same_result(tmp_path: Path, optimizer: str):
    whole = run(tmp_path, "whole.onnx", optimizer)
    assert whole.communicate()[0].strip() == "resumed at 0"

    killed = run(tmp_path, "resumed.onnx", optimizer)
    folder = cache_folder() / "training"
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "resumed.onnx").exists()

    said = run(tmp_path, "resumed.onnx", optimizer).communicate()[0]
    assert int(said.split()[-1]) > 0
    assert (tmp_path / "resumed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not list(folder.glob("*"))


def test_a_damaged_checkpoint_is_told_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxcomp.train.distilling.run_key", lambda *_: "x" * 64)
    folder = cache_folder() / "training"
    folder.mkdir(parents=True)
    (folder / f"{'x' * 32}.safetensors").write_bytes(b"no checkpoint")

    with pytest.raises(OptionError, match="is not a checkpoint"):
        distill(LENET, pruned(), arrays(), options=QUICK)
    assert distill(LENET, pruned(), arrays(), options=QUICK, resume=False).kept


def test_a_log_for_tensorboard_is_written(tmp_path: Path):
    distill(LENET, pruned(), arrays(), options=QUICK, log_dir=tmp_path / "log")

    assert [path.stat().st_size > 100 for path in (tmp_path / "log").glob("events.*")] == [True]


def test_results_are_plain_data():
    found: Trained = distill(LENET, pruned(), arrays(), options=QUICK)

    told = found.to_dict()
    assert told["kept"] is True
    assert next(each["step"] for each in told["history"]["evaluations"]) == 0
    assert told["size_bytes"] == found.model.size_bytes
