"""The sample models made ready for a target, and what ONNX Runtime's CPU provider says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from click.testing import CliRunner

from onnxcomp.cli import main
from tests.markdown import ROOT

Array = np.ndarray[Any, Any]

SAMPLES = ROOT / "sample_models"


def sample_model(name: str) -> Path:
    """The file of a sample model."""
    return SAMPLES / f"fashion_{name}.onnx"


def fashion_images(count: int) -> Array:
    """The first images of the test set."""
    with np.load(SAMPLES / "fashion_test.npz") as arrays:
        return np.asarray(arrays["image"][:count])


def optimized(name: str, target: str, folder: Path, *options: str) -> Path:
    """A sample model as `onnxcomp optimize` makes it for a target."""
    path = folder / f"{name}-{target}-{'-'.join(options).replace('=', '_') or 'default'}.onnx"
    data = str(SAMPLES / "fashion_calib.npz")
    arguments = [
        "optimize",
        str(sample_model(name)),
        "--data",
        data,
        "--target",
        target,
        "-o",
        str(path),
        "--no-timing",
    ]
    result = CliRunner().invoke(main, [*arguments, *options, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return path


def cpu_outputs(model: Path, feeds: list[dict[str, Array]]) -> list[Array]:
    """The first output of each run on the CPU provider of the installed wheel."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(None, feed)[0]) for feed in feeds]
