from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError
from onnxcomp.train.samples import Samples, find_augment
from tests.models import graph_model
from tests.training import dataset


def seen(samples: Samples, epoch: int) -> list[list[int]]:
    return [[int(index) for part in parts for index in part.indices] for parts in samples.epoch(epoch)]


def test_an_epoch_shows_each_sample_once_in_an_order_of_its_own():
    samples = Samples(dataset(64), batch_size=16, seed=3)
    first, second = seen(samples, 0), seen(samples, 1)

    assert sorted(index for step in first for index in step) == list(range(64))
    assert first != second
    assert seen(Samples(dataset(64), batch_size=16, seed=3), 0) == first


def test_an_incomplete_rest_is_left_out():
    samples = Samples(dataset(70), batch_size=16)

    assert samples.steps == 4
    assert [len(step) for step in seen(samples, 0)] == [16] * 4


def test_fewer_samples_than_a_step_wants_are_one_step():
    assert [len(step) for step in seen(Samples(dataset(10), batch_size=16), 0)] == [10]


def test_parts_of_a_step_add_up_to_it():
    samples = Samples(dataset(32), batch_size=16, accumulate=3)

    for parts in samples.epoch(0):
        assert [len(part.indices) for part in parts] == [6, 5, 5]
        assert sum(part.share for part in parts) == pytest.approx(1)


def test_processes_divide_each_step():
    whole = seen(Samples(dataset(64), batch_size=16, seed=1), 0)
    parts = [seen(Samples(dataset(64), batch_size=16, seed=1, rank=rank, world=2), 0) for rank in range(2)]

    assert [one + other for one, other in zip(*parts, strict=True)] == whole


def test_each_sample_counts_the_same_in_whatever_process_it_is():
    steps = [list(Samples(dataset(20), batch_size=5, rank=rank, world=2).epoch(0)) for rank in range(2)]

    for parts in zip(*steps, strict=True):
        one, other = (part for each in parts for part in each)
        assert (len(one.indices), len(other.indices)) == (3, 2)
        assert one.share / 3 == pytest.approx(other.share / 2)
        assert (one.share + other.share) / 2 == pytest.approx(1)


def test_steps_of_fewer_samples_than_processes_are_refused():
    with pytest.raises(OptionError, match="a step of 1 samples cannot be divided among 2 processes"):
        Samples(dataset(20), batch_size=1, world=2)


def test_inputs_belong_to_their_indices():
    data = dataset(40)
    images = next(iter(data.batches(40))).inputs["image"]

    for parts in Samples(data, batch_size=8).epoch(0):
        for part in parts:
            np.testing.assert_array_equal(part.batch.inputs["image"], images[part.indices])


def test_samples_of_different_shapes_do_not_share_a_step():
    model = graph_model("g (float[N, T] x) => (float[N, T] y) { y = Relu(x) }")
    lengths = [3, 5, 3, 5, 3, 5, 3, 5]
    data = open_data(([{"x": np.ones((1, length), np.float32)} for length in lengths]), input_specs(model))
    samples = Samples(data, batch_size=2)

    shapes = [part.batch.inputs["x"].shape for parts in samples.epoch(0) for part in parts]
    assert {shape[-1] for shape in shapes} == {3, 5}
    assert sum(shape[0] for shape in shapes) == 8


def test_shifted_images_are_the_same_images_moved():
    image = np.zeros((20, 1, 9, 9), np.float32)
    image[:, :, 4, 4] = 1
    moved = find_augment("shift:2", allow_code=False)
    assert moved is not None

    found = moved({"x": image}, np.random.default_rng(0))["x"]

    assert found.shape == image.shape
    assert (found.sum(axis=(1, 2, 3)) == 1).all()
    rows, columns = np.nonzero(found[:, 0])[1:]
    assert set(rows) == set(columns) == {2, 3, 4, 5, 6}


def test_half_of_the_images_are_mirrored():
    image = np.tile(np.arange(6, dtype=np.float32), (200, 1, 2, 1))
    mirror = find_augment("flip", allow_code=False)
    assert mirror is not None

    found = mirror({"x": image}, np.random.default_rng(0))["x"]

    turned = (found[:, 0, 0, 0] == 5).mean()
    assert 0.4 < turned < 0.6
    assert (np.sort(found, axis=-1) == image).all()


@pytest.mark.parametrize("text", ["shift", "shift:0", "turn", "shift:x,flip", "flip:2"])
def test_what_is_not_understood_is_refused(text: str):
    with pytest.raises(OptionError, match="augment must be"):
        find_augment(text, allow_code=False)
