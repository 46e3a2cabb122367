"""Observing tensors of two models at once, in the worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.errors import DataError, RuntimeFailure
from onnxcomp.runtime import Feed, Runtime
from tests.models import graph_model

FEEDS: list[Feed] = [{"x": np.array([[1.0, -2.0]], np.float32)}, {"x": np.array([[3.0, -4.0], [5, 6]], np.float32)}]


class Pairs:
    """Keeps the pairs that it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def update(self, reference: Any, candidate: Any) -> None:
        self.seen.append((np.array(reference).tolist(), np.array(candidate).tolist()))


class Fails:
    """Cannot stand what it sees."""

    def update(self, reference: Any, candidate: Any) -> None:
        raise ValueError("too ugly")  # noqa: EM101 - a test double


class Refuses:
    """Raises one of our own errors."""

    def update(self, reference: Any, candidate: Any) -> None:
        message = "all values are NaN"
        raise DataError(message)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    onnx.save(graph_model("g (float[N,2] x) => (float[N,2] y) { h = Neg(x) y = Abs(h) }"), folder / "one.onnx")
    onnx.save(graph_model("g (float[N,2] x) => (float[N,2] y) { i = Relu(x) y = Neg(i) }"), folder / "other.onnx")
    return folder / "one.onnx", folder / "other.onnx"


def test_observers_see_the_values_of_both_models_run_by_run(runtime: Runtime, paths: tuple[Path, Path]):
    names = [("h", "i"), ("y", "y")]
    seen = runtime.observe_pair(*paths, lambda: iter(FEEDS), {name: Pairs() for name in names})

    assert list(seen) == names
    assert seen["h", "i"].seen == [([[-1, 2]], [[1, 0]]), ([[-3, 4], [-5, -6]], [[3, 0], [5, 6]])]
    assert seen["y", "y"].seen == [([[1, 2]], [[-1, 0]]), ([[3, 4], [5, 6]], [[-3, 0], [-5, -6]])]


def test_a_tensor_may_have_several_partners_and_inputs_are_tensors_too(runtime: Runtime, paths: tuple[Path, Path]):
    names = [("x", "x"), ("x", "i"), ("h", "x"), ("y", "i")]
    seen = runtime.observe_pair(*paths, lambda: FEEDS[:1], {name: Pairs() for name in names})

    assert [seen[name].seen for name in names] == [
        [([[1, -2]], [[1, -2]])],
        [([[1, -2]], [[1, 0]])],
        [([[-1, 2]], [[1, -2]])],
        [([[1, 2]], [[1, 0]])],
    ]


def test_no_observers_ask_for_nothing(runtime: Runtime, paths: tuple[Path, Path]):
    assert runtime.observe_pair(*paths, lambda: FEEDS, {}) == {}


@pytest.mark.parametrize(("pair", "file"), [(("nope", "y"), "one"), (("y", "nope"), "other")])
def test_the_model_that_lacks_a_tensor_is_named(
    runtime: Runtime, paths: tuple[Path, Path], pair: tuple[str, str], file: str
):
    with pytest.raises(RuntimeFailure, match=rf"{file}\.onnx: cannot observe 'nope'"):
        runtime.observe_pair(*paths, lambda: FEEDS, {pair: Pairs()})


def test_a_missing_file_is_told(runtime: Runtime, paths: tuple[Path, Path]):
    with pytest.raises(RuntimeFailure, match="expected a model file, found nothing"):
        runtime.observe_pair(paths[0], Path("no.onnx"), lambda: FEEDS, {("y", "y"): Pairs()})


def test_an_observer_that_fails_is_named_and_the_worker_lives(runtime: Runtime, paths: tuple[Path, Path]):
    runtime.check(paths[0])
    pid = runtime.pid
    with pytest.raises(RuntimeFailure, match=r"the observer of 'h' failed: too ugly$"):
        runtime.observe_pair(*paths, lambda: FEEDS, {("h", "i"): Fails()})
    with pytest.raises(DataError, match=r"all values are NaN$"):
        runtime.observe_pair(*paths, lambda: FEEDS, {("h", "i"): Refuses()})
    assert runtime.pid == pid
    assert len(runtime.observe_pair(*paths, lambda: FEEDS, {("h", "i"): Pairs()})["h", "i"].seen) == 2
