"""Without the clock the same input, options, data and seed give the same file, whatever the process and its threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import onnxcomp
from onnxcomp import Changes, Context, Model, Pass
from tests.markdown import ROOT
from tests.small import INPUTS, classifier

SAMPLES = ROOT / "sample_models"


@dataclass(frozen=True, kw_only=True)
class LookAtThreads(Pass):
    """Changes nothing, and notes with how many threads numpy multiplies."""

    name: ClassVar[str] = "look-at-threads"
    lossless: ClassVar[bool] = True
    seen: ClassVar[list[int]] = []

    def rewrite(self, model: Model, context: Context) -> Changes:
        self.seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return Changes()


@pytest.mark.parametrize(("timing", "threads", "expected"), [(True, 1, 1), (True, 2, 2), (False, 2, 1)])
def test_products_run_in_as_many_threads_as_asked_and_in_one_where_the_clock_is_not(
    timing, threads, expected, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LookAtThreads.seen.clear()
    data = {"x": np.ones((8, INPUTS), np.float32)}
    with threadpool_limits(3, user_api="blas"):  # whatever the machine and its environment have
        before = _threads()
        onnxcomp.optimize(classifier(), data=data, passes=[LookAtThreads()], timing=timing, threads=threads)
        assert _threads() == before
    assert set(LookAtThreads.seen) == {expected}


def _threads() -> int:
    return next(int(library["num_threads"]) for library in threadpool_info() if library["user_api"] == "blas")


def run(output: Path, model: str, *arguments: str, threads: int, hash_seed: int) -> bytes:
    """The command in a process of its own; the bytes that it wrote."""
    environment: dict[str, Any] = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    data = ["--data", str(SAMPLES / "fashion_calib.npz"), "--threads", str(threads)]
    command = [sys.executable, "-m", "onnxcomp", "optimize", str(SAMPLES / f"{model}.onnx"), *data, *arguments]
    subprocess.run([*command, "-o", str(output), "-q", "--no-resume"], check=True, env=environment)
    return output.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fashion_lenet", "fashion_mobilenet", "fashion_vit"])
def test_one_thread_and_two_give_the_same_bytes(model, tmp_path):
    one = run(tmp_path / "one.onnx", model, "--no-timing", threads=1, hash_seed=0)
    two = run(tmp_path / "two.onnx", model, "--no-timing", threads=2, hash_seed=7)
    assert one == two


@pytest.mark.slow
def test_a_replay_gives_the_same_bytes_as_its_run_with_any_number_of_threads(tmp_path):
    report = tmp_path / "report.json"
    run(tmp_path / "first.onnx", "fashion_mobilenet", "--json", str(report), threads=1, hash_seed=0)
    again = [
        run(
            tmp_path / f"{threads}.onnx",
            "fashion_mobilenet",
            "--replay",
            str(report),
            threads=threads,
            hash_seed=threads,
        )
        for threads in (1, 2)
    ]
    assert again[0] == again[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "passes", [("simplify", "prune-channels:ratio=0.25"), ("simplify", "low-rank:ratio=1.3"), ("quantize-dynamic",)]
)
def test_other_passes_are_as_certain(passes, tmp_path):
    words = [word for step in passes for word in ("-p", step)]
    found = [
        run(
            tmp_path / f"{threads}.onnx",
            "fashion_vit",
            *words,
            "--force",
            "--no-timing",
            threads=threads,
            hash_seed=threads,
        )
        for threads in (1, 2)
    ]
    assert found[0] == found[1]
