from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from onnxcomp.model import Model
from tests.training import LENET, WEIGHTS, arrays, pruned

ROOT = Path(__file__).parents[1]

ROUNDING = 5e-4
"""Sums over two processes round elsewhere, and Adam divides by what may be next to nothing; weights are about 0.05, and
training moves them by up to 0.03."""


def distilled(tmp_path: Path, name: str, *launcher: str) -> Model:
    np.savez(tmp_path / "train.npz", **arrays())
    pruned().save(tmp_path / "student.onnx")
    command = [
        *(sys.executable, "-m", *launcher, "onnxcomp", "distill", str(LENET), str(tmp_path / "student.onnx")),
        *("--data", str(tmp_path / "train.npz"), "--epochs", "4", "--batch-size", "32", "--no-resume", "-q"),
        *("-o", str(tmp_path / name)),
    ]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "passes"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return Model.load(tmp_path / name)


def test_two_processes_give_what_one_does(tmp_path: Path):
    one = distilled(tmp_path, "one.onnx")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    two = distilled(tmp_path, "two.onnx", *launcher)

    student = pruned()
    for name in WEIGHTS:
        np.testing.assert_allclose(two.weight(name), one.weight(name), atol=ROUNDING)
        assert np.abs(one.weight(name) - student.weight(name)).max() > 10 * ROUNDING
