from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from onnxcomp.errors import ModelError
from onnxcomp.model import Model
from onnxcomp.runtime import Runtime
from onnxcomp.train.teacher import Teacher
from tests.models import graph_model, random_weights
from tests.training import LENET, arrays

INNER = "/2/Relu_output_0"


class Counting(Runtime):
    """Counts what it runs."""

    runs = 0

    def run(self, *args: Any, **kwargs: Any) -> Iterator[list[Any]]:
        self.runs += 1
        return super().run(*args, **kwargs)


@pytest.fixture
def runtime() -> Iterator[Counting]:
    with Counting() as running:
        yield running


def teacher(runtime: Runtime, folder: Path, cache_bytes: float, watch: tuple[str, ...] = ()) -> Teacher:
    return Teacher(Model.load(LENET), watch, runtime, folder, cache_bytes)


def test_gives_the_outputs_and_what_is_watched(runtime: Counting, tmp_path: Path):
    image = arrays(5)["image"]
    found = teacher(runtime, tmp_path, 0, (INNER,)).run({"image": image})

    assert list(found) == ["logits", INNER]
    assert found[INNER].shape == (5, 300)
    assert found[INNER].min() == 0
    np.testing.assert_array_equal(found["logits"], ort.InferenceSession(str(LENET)).run(None, {"image": image})[0])


def test_outputs_that_fit_are_computed_once(runtime: Counting, tmp_path: Path):
    image = arrays(8)["image"]
    known = teacher(runtime, tmp_path, 1e6)
    first = known.recall(np.arange(8), {"image": image}, 8)
    order = np.array([5, 2, 7])
    second = known.recall(order, {"image": image[order]}, 3)

    assert runtime.runs == 1
    np.testing.assert_array_equal(second["logits"], first["logits"][order])


def test_outputs_beyond_the_limit_are_computed_again(runtime: Counting, tmp_path: Path):
    image = arrays(8)["image"]
    known = teacher(runtime, tmp_path, 3 * 40)
    for _ in range(2):
        known.recall(np.arange(8), {"image": image}, 8)
        known.recall(np.arange(3), {"image": image[:3]}, 3)

    assert runtime.runs == 2, "three samples of ten floats fit"


@pytest.mark.parametrize("axis", ["8", "T"])
def test_steps_of_time_are_not_taken_for_samples(runtime: Counting, tmp_path: Path, axis: str):
    text = f"g (float[N, {axis}, 2] x) => (float[{axis}, N, 2] y) {{ y = Transpose<perm = [1, 0, 2]>(x) }}"
    known = Teacher(Model.load(graph_model(text)), (), runtime, tmp_path, 1e6)
    x, order = random_weights(8, 8, 2), np.arange(8)[::-1]

    known.recall(np.arange(8), {"x": x}, 8)

    np.testing.assert_array_equal(known.recall(order, {"x": x[order]}, 8)["y"], x[order].transpose(1, 0, 2))


def test_outputs_of_undeclared_shapes_are_kept_too(runtime: Counting, tmp_path: Path):
    known = Teacher(
        Model.load(graph_model("g (float[N, 2] x) => (float y) { y = Relu(x) }")), (), runtime, tmp_path, 1e6
    )
    x = random_weights(8, 2)
    for _ in range(5):
        known.recall(np.arange(8), {"x": x}, 8)

    assert runtime.runs == 2, "once with fewer samples"


def test_a_tensor_that_is_not_there_is_refused(runtime: Counting, tmp_path: Path):
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        teacher(runtime, tmp_path, 0, ("nowhere",))
