"""Candidates are written to be measured; those that are not kept must not fill the disk."""

from pathlib import Path

import pytest

from onnxcomp import Budget, Model, optimize
from onnxcomp.judge import Judge
from onnxcomp.quality import Quality
from onnxcomp.recipe import parse_pass

SAMPLES = Path(__file__).parent.parent / "sample_models"

TOGETHER = 4
"""The original, the model before the stage, a candidate, and one to compare it with."""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("quantize-weights", "fashion_vit"),
        ("quantize", "fashion_lenet"),
        ("cluster", "fashion_lenet"),
        ("prune", "fashion_lenet"),
        ("prune-channels", "fashion_lenet"),
        ("low-rank", "fashion_lenet"),
    ],
)
def test_what_a_choice_has_measured_does_not_stay_on_the_disk(
    text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    measure = Judge.quality

    def counted(self: Judge, model: Model) -> Quality:
        quality = measure(self, model)
        counts.append(len(list(self._workdir.glob("*/model.onnx"))))
        return quality

    monkeypatch.setattr(Judge, "quality", counted)
    model = Model.load(SAMPLES / f"{name}.onnx")
    data = SAMPLES / "fashion_calib.npz"

    optimize(model, data=data, passes=[parse_pass(text)], budget=Budget(max_drop=0.0, max_error=0.0), timing=False)

    assert max(counts) <= TOGETHER
