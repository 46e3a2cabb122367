"""The exactness of structured pruning: silenced channels go, all of them and no others, and outputs stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.silenced import silence
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes._channels_groups import find_channels
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes.prune_channels import PruneChannels
from onnxcomp_passes.simplify import Simplify
from tests.channel_graphs import Silenced, silenced_cnns, silenced_transformers
from tests.models import assert_same_outputs, random_inputs

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SAMPLES = Path(__file__).resolve().parent.parent / "sample_models"


def check(case: Silenced) -> None:
    """`prune-channels` takes out what was silenced."""
    model = Model.load(case.model)

    changes = PruneChannels().rewrite(model, Context())

    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in result.graph.initializer}
    assert {name: shapes.get(name) for name in case.shapes} == case.shapes
    assert (changes.count > 0) == bool(case.ways)
    assert result.ByteSize() < case.model.ByteSize() or not case.ways
    assert_same_outputs(case.model, result, random_inputs(case.model))


@given(silenced_cnns())
@SETTINGS
def test_convolutional_networks_lose_what_was_silenced_and_nothing_else(case):
    check(case)


@given(silenced_transformers())
@SETTINGS
def test_transformers_lose_what_was_silenced_and_nothing_else(case):
    check(case)


@pytest.mark.parametrize("name", ["fashion_lenet", "fashion_mobilenet", "fashion_vit"])
def test_sample_models_lose_what_was_silenced_and_nothing_else(name):
    model = Model.load(SAMPLES / f"{name}.onnx")
    lift_constants(model.graph)
    Simplify().rewrite(model, Context())
    channels, silenced = silence(model, np.random.default_rng(1), 0.3)
    pruned = model.fork()

    PruneChannels().rewrite(pruned, Context())

    left = {group.name: group.units for group in find_channels(pruned).groups}
    assert left == {group.name: group.units - len(silenced.get(group.name, ())) for group in channels.groups}
    assert pruned.size_bytes < model.size_bytes
    assert_same_outputs(model, pruned, random_inputs(model.to_proto()))
