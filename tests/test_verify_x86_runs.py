"""An x86-64 without VNNI is emulated: it shows the saturation that this machine does not, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.errors import RuntimeFailure
from onnxcomp.targets import host_target
from onnxcomp.verification.environments.x86 import X86
from onnxcomp_passes import Quantize, Simplify
from tests.deployed import (
    ARM_FUSION,
    CPU,
    SAMPLES,
    difference,
    forced,
    image_feeds,
    installed,
    on_host,
    sample_model,
    size,
    small_network,
)
from tests.models import FLOAT_ROUNDING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_target().name != "x86-vnni", reason="compares with an x86-64 that has VNNI"),
]

SATURATED = 2.0
"""Errors this many times larger than this machine's are no rounding: its int8 kernels are exact."""


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """The layer, installed for these tests."""
    with installed(X86, tmp_path_factory.mktemp("cache")) as environment:
        yield environment


def test_weights_of_7_bits_give_the_bits_of_this_machine(environment, tmp_path):
    small = small_network(tmp_path, "x86")
    execution = environment.run(small.int8, small.feeds)
    here = on_host(small.int8, small.feeds)
    assert execution.nodes == here.nodes
    assert execution.nodes[CPU]["QLinearConv"] == 3
    assert difference(execution, here) == 0


@pytest.mark.parametrize("target", ["x86-vnni", "arm64"])
def test_weights_of_8_bits_saturate_as_they_do_not_here(environment, tmp_path, target):
    small = small_network(tmp_path, target)
    exact = on_host(small.float, small.feeds)
    here, there = on_host(small.int8, small.feeds), environment.run(small.int8, small.feeds)
    assert here.nodes == there.nodes  # the same kernels' names: only their arithmetic differs
    assert difference(there, exact) > SATURATED * difference(here, exact)


def test_int8_activations_that_stay_int8_do_not_saturate(environment, tmp_path):
    small = small_network(tmp_path, "arm64")
    execution = environment.run(small.int8, small.feeds, config=ARM_FUSION)
    assert difference(execution, on_host(small.int8, small.feeds, ARM_FUSION)) == 0


def test_a_sample_model_for_it_gives_the_bits_of_this_machine(environment, tmp_path):
    path, feeds = forced("mobilenet", "x86", tmp_path, Simplify(), Quantize(choose=False)), image_feeds(4)
    execution = environment.run(path, feeds)
    assert execution.nodes[CPU]["QLinearConv"] == 20
    assert difference(execution, on_host(path, feeds)) == 0


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("fashion_*.onnx")), ids=lambda path: path.stem)
def test_float_models_agree_to_rounding(environment, path):
    feeds = image_feeds(2)
    here = on_host(path, feeds)
    assert difference(environment.run(path, feeds), here) < FLOAT_ROUNDING * size(here)


def test_it_says_what_ran(environment):
    execution = environment.run(sample_model("lenet"), image_feeds(1))
    assert execution.runtime.startswith("ONNX Runtime ")
    assert "Haswell-v4 by qemu 10" in execution.runtime
    assert execution.versions["qemu"].startswith("10.")


def test_what_onnx_runtime_refuses_there_is_told(environment):
    with pytest.raises(RuntimeFailure, match=r"fashion_lenet\.onnx: .*without VNNI.* Got: 5"):
        environment.run(sample_model("lenet"), [{"image": np.zeros((1, 5, 28, 28), np.float32)}])
