"""Models and comparisons for the tests that really run on emulated processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import onnxcomp
from onnxcomp.runtime import Runtime
from onnxcomp.targets import find_target
from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.foreign import present_python, run_foreign
from onnxcomp_passes.quantize import Quantize
from onnxcomp_passes.simplify import Simplify
from tests.markdown import ROOT
from tests.models import SMALL_NETWORK, Array, graph_model, random_weights
from tests.quantizing import quantize, random_samples

SAMPLE_MODELS = ROOT / "sample_models"
ARM_FUSION = dict(find_target("arm64").session_config)
"""What makes an x86 session keep int8 activations, as one on ARM does."""


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
    feeds: list[dict[str, Array]]


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


def sample_feeds(count: int) -> list[dict[str, Array]]:
    """Inputs of the sample models, one sample each."""
    with np.load(SAMPLE_MODELS / "fashion_test.npz") as data:
        images = data["image"][:count].astype(np.float32)
    return [{"image": image[None]} for image in images]


def sample_int8(folder: Path, name: str, target: str) -> Path:
    """A sample model quantized for a target, every layer that can be."""
    path = folder / f"{name}.{target}.onnx"
    onnxcomp.optimize(
        SAMPLE_MODELS / f"{name}.onnx",
        data=SAMPLE_MODELS / "fashion_calib.npz",
        target=target,
        passes=[Simplify(), Quantize(choose=False)],
        force=True,
        timing=False,
        resume=False,
    ).model.save(path)
    return path


def on_host(model: Path, feeds: Sequence[Mapping[str, Array]], config: Mapping[str, str] | None = None) -> Execution:
    """What this machine's own processor gives, in the same kind of process."""
    return run_foreign(present_python("this machine"), model, feeds, config=config)


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
