"""What the tests share that really run models in other environments: installations, sample models, comparisons."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from click.testing import CliRunner

import onnxcomp
from onnxcomp.cli import main
from onnxcomp.passes import Pass
from onnxcomp.runtime import Runtime
from onnxcomp.targets import find_target
from onnxcomp.verification.environments import ENVIRONMENTS, Environment, Execution
from onnxcomp.verification.environments.foreign import present_python
from onnxcomp.verification.environments.processes import prepared
from tests.markdown import ROOT
from tests.models import SMALL_NETWORK, Array, graph_model, random_weights
from tests.quantizing import quantize, random_samples

CPU = "CPUExecutionProvider"
SAMPLES = ROOT / "sample_models"
ARM_FUSION = dict(find_target("arm64").session_config)
"""What makes an x86 session keep int8 activations, as one on ARM does."""

E = TypeVar("E", bound=Environment)
Feeds = list[dict[str, Array]]


@contextlib.contextmanager
def installed(kind: type[E], cache: Path) -> Iterator[E]:
    """An environment, installed into a cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        environment = kind()
        environment.install(print)
        assert environment.missing() is None
        assert [path.name for path in (cache / "onnxcomp" / "environments").iterdir()] == [environment.name]
        yield environment


def sample_model(name: str) -> Path:
    """The file of a sample model."""
    return SAMPLES / f"fashion_{name}.onnx"


def fashion_images(count: int) -> Array:
    """The first images of the test set."""
    with np.load(SAMPLES / "fashion_test.npz") as arrays:
        return np.asarray(arrays["image"][:count], np.float32)


def image_feeds(count: int) -> Feeds:
    """The first images of the test set, one a run."""
    return [{"image": image[None]} for image in fashion_images(count)]


def optimized(name: str, target: str, folder: Path, *options: str) -> Path:
    """A sample model as `onnxcomp optimize` makes it for a target."""
    path = folder / f"{name}-{target}-{'-'.join(options).replace('=', '_') or 'default'}.onnx"
    data = str(SAMPLES / "fashion_calib.npz")
    arguments = ["optimize", str(sample_model(name)), "--data", data, "--target", target, "-o", str(path)]
    result = CliRunner().invoke(main, [*arguments, *options, "--no-timing", "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return path


def forced(name: str, target: str, folder: Path, *passes: Pass, **options: Any) -> Path:
    """A sample model made by passes of which every stage is kept."""
    path = folder / f"fashion_{name}.{target}.onnx"
    onnxcomp.optimize(
        sample_model(name),
        data=SAMPLES / "fashion_calib.npz",
        target=target,
        passes=passes,
        force=True,
        timing=False,
        resume=False,
        **options,
    ).model.save(path)
    return path


@dataclass(frozen=True)
class Small:
    """A small network, quantized.

    Attributes:
        float: The file of the network in float.
        int8: The file of the quantized one.
        feeds: Inputs, one sample each.
    """

    float: Path
    int8: Path
    feeds: Feeds


def small_network(folder: Path, target: str) -> Small:
    """Two Conv and a Gemm with weights that use all the bits of the target's type."""
    weights = {
        "first_w": random_weights(16, 4, 3, 3),
        "first_b": random_weights(16, seed=1),
        "middle_w": random_weights(24, 16, 3, 3, seed=2, scale=0.1),
        "head_w": random_weights(96, 20, seed=3, scale=0.1),
        "head_b": random_weights(20, seed=4),
    }
    with Runtime() as runtime:
        model = quantize(graph_model(SMALL_NETWORK, weights), runtime, folder, target=target).model
    samples = random_samples(model, samples=8)
    feeds = [{name: values[number : number + 1] for name, values in samples.items()} for number in range(8)]
    return Small(folder / "float.onnx", folder / "int8.onnx", feeds)


def on_host(model: Path, feeds: Sequence[Mapping[str, Array]], config: Mapping[str, str] | None = None) -> Execution:
    """What this machine's own CPU provider gives, in the same kind of process."""
    with prepared(model, feeds, config=config) as job:
        return present_python("this machine").run(job)


def first_outputs(execution: Execution) -> Array:
    """The first output of all runs, one after the other."""
    return np.concatenate([next(iter(outputs.values())) for outputs in execution.outputs])


def difference(one: Execution, other: Execution) -> float:
    """The largest difference between two executions' outputs."""
    assert len(one.outputs) == len(other.outputs) > 0
    return max(
        float(np.abs(left[name] - right[name]).max())
        for left, right in zip(one.outputs, other.outputs, strict=True)
        for name in left.keys() | right.keys()
    )


def size(execution: Execution) -> float:
    """The largest output."""
    return max(float(np.abs(value).max()) for outputs in execution.outputs for value in outputs.values())


# --- without installing anything --------------------------------------------------------------------------------------


def on_linux_x86(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this a machine for all environments, with folders of the test's own; gives the one for installations."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.41"))
    return tmp_path / "cache" / "onnxcomp" / "environments"


def left_over(tmp_path: Path) -> list[str]:
    """What is in the folder for temporary files, and beside installations."""
    places = (tmp_path / "tmp", tmp_path / "cache/onnxcomp/environments")
    paths = [path for place in places if place.is_dir() for path in place.iterdir()]
    return [path.name for path in paths if path.name not in ENVIRONMENTS]


def program(folder: Path, name: str, script: str) -> None:
    """Put a shell script into a folder of programs."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
