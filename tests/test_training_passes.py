from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch

from onnxcomp import Budget, optimize
from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError, RequirementError
from onnxcomp.model import Model
from onnxcomp.packed import unpack
from onnxcomp.passes import Context, find_pass
from onnxcomp.runtime import Runtime
from onnxcomp.stages import joined
from onnxcomp.torch_bridge import load
from onnxcomp_passes import Distill, FineTune, Pack, Prune, PruneChannels, Qat, Quantize, Simplify
from tests.models import graph_model, random_weights
from tests.training import LENET, WEIGHTS, arrays, dataset


def names(*passes: str) -> list[str]:
    return [stage.name for stage in joined([find_pass(name)() for name in passes])]


def test_distillation_is_judged_with_what_it_mends():
    passes = [Simplify(), PruneChannels(ratio=0.5), Distill()]
    assert [stage.name for stage in joined(passes)] == ["simplify", "prune-channels + distill"]


def test_all_lossy_passes_before_it_are_judged_with_it():
    assert names("prune", "low-rank", "quantize", "distill") == ["prune + low-rank + quantize + distill"]


def test_a_second_distillation_mends_what_came_after_the_first():
    assert names("low-rank", "distill", "quantize", "qat") == ["low-rank + distill", "quantize + qat"]


def test_pruning_is_judged_once_it_is_distilled_and_packed():
    assert names("prune", "distill", "pack") == ["prune + distill + pack"]


def test_zeros_made_on_the_way_are_judged_once_packed():
    passes = [Distill(sparsity=0.9), *(find_pass(name)() for name in ("cluster", "pack"))]
    assert [stage.name for stage in joined(passes)] == ["distill + cluster + pack"]


def test_weights_become_zeros_in_a_pipeline():
    result = optimize(LENET, data=arrays(400), passes=[Distill(sparsity=0.8, epochs=4.0), Pack()], force=True)

    assert result.model.size_bytes < 0.4 * Model.load(LENET).size_bytes
    unpacked = result.model.fork()
    unpack(unpacked)
    zeros = sum(int((unpacked.weight(name) == 0).sum()) for name in WEIGHTS)
    assert zeros / sum(unpacked.weight(name).size for name in WEIGHTS) == pytest.approx(0.8, abs=0.001)


def accuracy(path: Path) -> float:
    samples = arrays(1000, labels=True)
    logits = ort.InferenceSession(str(path)).run(None, {"image": samples["image"]})[0]
    return float((logits.argmax(axis=1) == samples["label"]).mean())


def test_a_pipeline_distils_what_it_pruned(tmp_path: Path):
    passes = [Prune(sparsity=0.9, criterion="magnitude"), Distill(epochs=20.0)]
    result = optimize(LENET, data=arrays(1000), passes=passes, budget=Budget(max_drop=0.05), force=True, resume=False)
    result.save(tmp_path / "student.onnx")
    alone = optimize(LENET, data=arrays(1000), passes=passes[:1], force=True, resume=False)
    alone.save(tmp_path / "pruned.onnx")

    zeros = sum(int((result.model.weight(name) == 0).sum()) for name in WEIGHTS)
    assert zeros > 0.85 * sum(result.model.weight(name).size for name in WEIGHTS)
    assert accuracy(tmp_path / "student.onnx") > accuracy(tmp_path / "pruned.onnx") + 0.02


def test_the_report_tells_how_training_went():
    passes = [Prune(sparsity=0.8), Distill(epochs=4.0)]
    result = optimize(LENET, data=arrays(), passes=passes, force=True, resume=False)

    entry = result.report.stages[0].attempts[-1].passes[1]
    assert entry.name == "distill"
    assert [table["title"] for table in entry.tables] == ["training"]


def test_fine_tuning_needs_labels():
    with pytest.raises(RequirementError, match="labels"):
        optimize(LENET, data=arrays(), passes=[FineTune()])


def test_training_needs_data():
    with pytest.raises(RequirementError, match="data"):
        optimize(LENET, passes=[Distill()])


def test_training_needs_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequirementError, match="needs torch"):
        optimize(LENET, data=arrays(), passes=[Distill()])


def test_a_model_that_cannot_be_trained_keeps_what_other_stages_gained():
    text = """g (float[N, 8, 1] x) => (float[N, 8, 2] y) {
        h = Mul(x, W)
        y = DFT<axis = 1>(h)
    }"""
    model = graph_model(text, W=np.linspace(0.5, 1.5, 8, dtype=np.float32)[:, None])
    samples = np.random.default_rng(0).normal(size=(40, 8, 1)).astype(np.float32)
    result = optimize(model, data={"x": samples}, passes=[Simplify(), Distill()])

    stage = result.report.stages[1]
    assert stage.verdict == "dropped"
    assert "no torch operator for DFT" in stage.reason


# --- quantization-aware training --------------------------------------------------------------------------------------


SPOILT = [Prune(sparsity=0.9, criterion="magnitude"), Quantize(choose=False), Qat(epochs=10.0)]


@pytest.fixture
def context(tmp_path: Path):
    with Runtime() as runtime:
        yield Context(data=dataset(400), runtime=runtime, workdir=tmp_path)


def test_a_float_model_gets_grids_of_four_bits(context: Context):
    model = Model.load(LENET)
    Qat(weight_bits=4, activation_bits=4, epochs=4.0).rewrite(model, context)

    kinds = [model.weight(name).dtype for name in WEIGHTS]
    assert kinds == [np.dtype(np.int8), np.dtype(ml_dtypes.int4), np.dtype(np.int8)]


def middle_codes(model: Model) -> np.ndarray:
    """The codes of the second layer."""
    return next(model.weight(each.name) for each in model.constants() if sorted(each.shape) == [100, 300])


def test_codes_of_four_bits_are_trained_and_stay_in_four_bits():
    def codes(epochs: float, rate: float) -> np.ndarray:
        qat = Qat(weight_bits=4, epochs=epochs, learning_rate=rate)
        result = optimize(LENET, data=arrays(600), passes=[SPOILT[0], qat], force=True, resume=False)
        return middle_codes(result.model)

    before, after = codes(0.01, 1e-9), codes(40.0, 3e-3)
    assert before.dtype == after.dtype == np.int8
    assert before.min() >= -7
    assert before.max() <= 7
    assert after.min() >= -7
    assert after.max() <= 7
    assert 0.001 < (before != after).mean() < 0.5, "training moves some codes, and begins at what was calibrated"


def test_the_saved_codes_give_the_trained_outputs(context: Context, tmp_path: Path):
    trained = Model.load(LENET)
    Qat(weight_bits=4, epochs=8.0).rewrite(trained, context)
    trained.save(tmp_path / "trained.onnx")
    images = arrays(64)["image"]

    expected = ort.InferenceSession(str(tmp_path / "trained.onnx")).run(None, {"image": images})[0]
    got = load(tmp_path / "trained.onnx")(torch.from_numpy(images)).detach().numpy()
    # An activation on the edge between two codes may fall to either side: that is one of 255 steps.
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def test_training_through_rounding_mends_it(tmp_path: Path):
    def drop(epochs: float) -> float:
        qat = Qat(weight_bits=4, activation_bits=4, epochs=epochs)
        result = optimize(LENET, data=arrays(1000), passes=[SPOILT[0], qat], force=True, resume=False)
        result.save(tmp_path / "model.onnx")
        return accuracy(LENET) - accuracy(tmp_path / "model.onnx")

    assert drop(20.0) < drop(0.01) - 0.02


def test_a_quantized_model_keeps_its_types():
    alone, trained = (optimize(LENET, data=arrays(600), passes=each, force=True) for each in (SPOILT[:2], SPOILT))

    kinds = [
        {constant.name: (constant.dtype, tuple(constant.shape)) for constant in result.model.constants()}
        for result in (alone, trained)
    ]
    assert kinds[0] == kinds[1]
    entry = trained.report.stages[0].attempts[-1].passes[2]
    assert "trained for" in entry.changed[0]["what"]


def test_int32_biases_have_the_product_of_the_scales_that_were_learnt():
    result = optimize(LENET, data=arrays(600), passes=SPOILT, force=True)

    checked = 0
    for node in result.model.graph.nodes:
        if node.op == "Gemm":
            scales = [
                np.asarray(tensor.inputs[0].inputs[1].values, np.float32).reshape(-1) for tensor in node.inputs[:3]
            ]
            np.testing.assert_allclose(scales[2], scales[0] * scales[1], rtol=1e-6)
            checked += 1
    assert checked


def test_three_bits_are_refused():
    with pytest.raises(OptionError, match="must be 4 or 8"):
        Qat(weight_bits=5)


@pytest.mark.parametrize("text", ["nonsense", "shift", "shift:0", "flip+", "flip,shift:1", "mine:move"])
def test_what_is_done_to_images_is_checked_before_any_work(text: str):
    with pytest.raises(OptionError, match="distill: augment must be shift:N, flip, or both, divided by a plus sign"):
        Distill(augment=text)


@pytest.mark.parametrize("text", ["", "flip", "shift:2", "shift:2+flip"])
def test_images_can_be_changed_at_random(text: str):
    assert Distill(augment=text).augment == text


def test_the_table_has_no_loss_before_training():
    result = optimize(LENET, data=arrays(), passes=[Prune(sparsity=0.8), Distill(epochs=1.0)], force=True, resume=False)

    first = result.report.stages[0].attempts[-1].passes[1].tables[0]["rows"][0]
    assert tuple(first[:2]) == (0, None)


def test_what_is_excluded_is_found_behind_many_branches():
    steps = " ".join(f"r{number} = Relu(h{number}) h{number + 1} = Add(r{number}, h{number})" for number in range(60))
    text = f"g (float[N, 4] x) => (float[N, 4] y) {{ h0 = MatMul(x, W) {steps} s = Sigmoid(h60) y = MatMul(s, V) }}"
    model = Model.load(graph_model(text, W=random_weights(4, 4), V=random_weights(4, 4)))
    data = open_data({"x": random_weights(32, 4)}, input_specs(model.proto()))

    changes = Distill(epochs=1).rewrite(model, Context(data=data, exclude=("s", "y")))

    assert changes.tables
    np.testing.assert_array_equal(model.weight("V"), random_weights(4, 4))
