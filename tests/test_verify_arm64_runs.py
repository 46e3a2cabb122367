"""ONNX Runtime for 64-bit ARM is installed and runs: what it computes is what this machine computes for it.

On ARM and on an x86-64 with VNNI no int8 product saturates, so that int8 kernels agree to the last bit there.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.errors import RuntimeFailure, WorkerDied
from onnxcomp.targets import host_target
from onnxcomp.verification.environments.arm64 import Arm64
from onnxcomp.verification.environments.processes import prepared
from onnxcomp.verification.environments.tools import run_tool
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
    size,
    small_network,
)
from tests.models import FLOAT_ROUNDING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_target().name == "x86", reason="int8 kernels of a host without VNNI saturate"),
]

MEGABYTES = 250


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """The layer, installed for these tests."""
    with installed(Arm64, tmp_path_factory.mktemp("cache")) as environment:
        yield environment


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """The sample MobileNet in int8 for ARM."""
    return forced("mobilenet", "arm64", tmp_path_factory.mktemp("models"), Simplify(), Quantize(choose=False))


def test_what_is_installed_is_whole_and_not_large(environment):
    folder = environment.folder
    assert environment.missing() is None
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MEGABYTES * 1e6


@pytest.mark.parametrize("target", ["arm64", "x86", "x86-vnni"])
def test_int8_kernels_give_the_bits_of_this_machine(environment, tmp_path, target):
    small = small_network(tmp_path, target)
    execution = environment.run(small.int8, small.feeds)
    assert set(execution.nodes) == {CPU}
    assert execution.nodes[CPU]["QLinearConv"] == 3  # the Gemm is a Conv there
    assert difference(execution, on_host(small.int8, small.feeds, ARM_FUSION)) == 0
    assert 0 < difference(execution, on_host(small.float, small.feeds)) < 0.05 * size(execution)


def test_a_sample_model_for_arm_gives_the_bits_of_this_machine(environment, mobilenet):
    feeds = image_feeds(4)
    execution = environment.run(mobilenet, feeds)
    here = on_host(mobilenet, feeds, ARM_FUSION)
    assert execution.nodes == here.nodes
    assert execution.nodes[CPU]["QLinearConv"] == 20
    assert "Conv" not in execution.nodes[CPU]
    assert difference(execution, here) == 0


def test_this_machine_fuses_less_without_arm_s_settings(environment, mobilenet):
    feeds = image_feeds(1)
    assert environment.run(mobilenet, feeds).nodes != on_host(mobilenet, feeds).nodes


def test_an_ort_file_in_fixed_style_runs_as_its_model_does(environment, mobilenet, tmp_path):
    options = ["--optimization_style", "Fixed", "--target_platform", "arm", "--output_dir", str(tmp_path)]
    run_tool([sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(mobilenet), *options])
    feeds = image_feeds(4)
    execution = environment.run(tmp_path / mobilenet.with_suffix(".ort").name, feeds)
    model = environment.run(mobilenet, feeds)
    assert execution.nodes == model.nodes
    assert difference(execution, model) == 0


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("fashion_*.onnx")), ids=lambda path: path.stem)
def test_float_models_agree_to_rounding(environment, path):
    feeds = image_feeds(2)
    here = on_host(path, feeds)
    assert difference(environment.run(path, feeds), here) < FLOAT_ROUNDING * size(here)


def test_it_says_what_ran(environment, mobilenet):
    execution = environment.run(mobilenet, image_feeds(1))
    assert execution.runtime.startswith("ONNX Runtime ")
    assert "arm64" in execution.runtime
    assert {"onnxruntime", "numpy", "python"} <= set(execution.versions)


def test_what_onnx_runtime_refuses_there_is_told_in_one_line(environment, mobilenet):
    with pytest.raises(RuntimeFailure, match=r"fashion_mobilenet\.arm64\.onnx: .*arm64.* Got: 5") as caught:
        environment.run(mobilenet, [{"image": np.zeros((1, 5, 28, 28), np.float32)}])
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, WorkerDied)


def test_it_is_stopped_when_the_time_is_over(environment, mobilenet):
    with pytest.raises(WorkerDied, match=r"longer than the limit of 0\.3 s; run fewer samples"):
        environment.run(mobilenet, image_feeds(4), timeout_s=0.3)


def test_a_crash_there_is_told_and_leaves_nothing(environment, mobilenet, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    python = environment._emulated(environment.folder, environment._installation.versions())
    crashing = replace(python, command=(*python.command, "-c", "import ctypes; ctypes.string_at(0)"))
    with (
        prepared(mobilenet, []) as job,
        pytest.raises(WorkerDied, match=r"died \(SIGSEGV; it last printed: qemu: uncaught target signal 11"),
    ):
        crashing.run(job)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_library_is_told_and_installed_again(environment):
    [library] = Path(environment.folder).glob("root/usr/lib/aarch64-linux-gnu/libstdc++.so.6.*.*")
    library.write_bytes(library.read_bytes()[:1000])
    assert "libstdc++.so.6 was changed" in (environment.missing() or "")
    environment.install(lambda _: None)
    assert environment.missing() is None
