from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxcomp.errors import DataError, OptionError
from onnxcomp.runtime import Feed, Runtime, RuntimeFailure, TensorInfo, WorkerDied
from onnxcomp.runtime.messages import tidy
from onnxcomp.runtime.observing import GROUP_BYTES
from onnxcomp.runtime.profiling import node_times

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
FEED = {"x": np.array([[1, 2, 3], [-1, -2, -3]], np.float32)}


class Recorder:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray[Any, Any]] = []

    def update(self, array: np.ndarray[Any, Any]) -> None:
        self.seen.append(np.array(array))


class Assassin:
    """Kills the process that shows it a value."""

    def update(self, array: np.ndarray[Any, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Sleeper:
    """Takes very long to look."""

    def update(self, array: np.ndarray[Any, Any]) -> None:
        time.sleep(60)


class Fails:
    """Cannot stand what it sees."""

    def update(self, array: np.ndarray[Any, Any]) -> None:
        raise ValueError("too\nugly")  # noqa: EM101 - a test double


class Refuses:
    """Raises one of our own errors."""

    def update(self, array: np.ndarray[Any, Any]) -> None:
        message = "all values are NaN"
        raise DataError(message)


class Blind:
    """Keeps nothing."""

    def update(self, array: np.ndarray[Any, Any]) -> None:
        pass


def value_info(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: dict[str, np.ndarray[Any, Any]] | None = None,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def matmul_model() -> onnx.ModelProto:
    """Relu(x @ W)."""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["product"]), helper.make_node("Relu", ["product"], ["y"])]
    return model_of(nodes, [value_info("x", ["n", 3])], [value_info("y", ["n", 4])], {"W": WEIGHT})


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as runtime:
        yield runtime


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(matmul_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_importing_it_loads_neither_onnx_nor_onnxruntime():
    code = "import sys, onnxcomp.runtime; print(sorted({'onnx', 'onnxruntime'} & sys.modules.keys()))"

    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert ran.stdout.strip() == "[]"


def test_check_describes_inputs_and_outputs(runtime: Runtime, path: Path):
    info = runtime.check(path)

    assert info.inputs == (TensorInfo("x", "tensor(float)", ("n", 3)),)
    assert info.outputs == (TensorInfo("y", "tensor(float)", ("n", 4)),)
    assert info.load_ms > 0


@pytest.mark.parametrize("optimize", [True, False])
def test_runs_each_feed(runtime: Runtime, path: Path, optimize: bool):
    feeds = [FEED, {"x": np.ones((5, 3), np.float32)}]

    results = list(runtime.run(path, feeds, optimize=optimize))

    for feed, outputs in zip(feeds, results, strict=True):
        assert len(outputs) == 1
        np.testing.assert_array_equal(outputs[0], np.maximum(feed["x"] @ WEIGHT, 0))


def test_run_streams(runtime: Runtime, path: Path):
    taken = []

    def feeds() -> Iterator[Feed]:
        for index in range(3):
            taken.append(index)
            yield FEED

    next(runtime.run(path, feeds()))

    assert taken == [0]


def test_run_returns_the_outputs_asked_for_in_that_order(runtime: Runtime, tmp_path: Path):
    nodes = [helper.make_node("Neg", ["x"], ["negative"]), helper.make_node("Abs", ["x"], ["absolute"])]
    outputs = [value_info("negative", ["n", 3]), value_info("absolute", ["n", 3])]
    onnx.save(model_of(nodes, [value_info("x", ["n", 3])], outputs), tmp_path / "two.onnx")

    (result,) = runtime.run(tmp_path / "two.onnx", [FEED], outputs=["absolute", "negative"])

    np.testing.assert_array_equal(result, [np.abs(FEED["x"]), -FEED["x"]])


def test_strings_and_sequences_pass_through(runtime: Runtime, tmp_path: Path):
    texts = value_info("x", ["n"], TensorProto.STRING)
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.STRING, None)
    nodes = [helper.make_node("SequenceConstruct", ["x", "x"], ["y"]), helper.make_node("Identity", ["x"], ["z"])]
    onnx.save(
        model_of(nodes, [texts], [sequence, value_info("z", ["n"], TensorProto.STRING)]), tmp_path / "strings.onnx"
    )
    words = np.array(["naïve", "", "a\0b"], dtype=object)

    ((pair, same),) = runtime.run(tmp_path / "strings.onnx", [{"x": words}])

    assert [list(item) for item in pair] == [list(words), list(words)]
    assert list(same) == list(words)


def test_notices_a_changed_file(runtime: Runtime, path: Path):
    list(runtime.run(path, [FEED]))
    model = matmul_model()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT + 1, "W"))
    onnx.save(model, path)

    ((result,),) = runtime.run(path, [FEED])

    np.testing.assert_array_equal(result, np.maximum(FEED["x"] @ (WEIGHT + 1), 0))


def test_a_bad_model_fails_in_one_line_and_the_worker_lives(runtime: Runtime, path: Path, tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    runtime.check(path)
    pid = runtime.pid

    with pytest.raises(RuntimeFailure) as caught:
        runtime.check(tmp_path / "bad.onnx")

    assert str(caught.value) == f"{tmp_path / 'bad.onnx'}: Protobuf parsing failed."
    assert runtime.pid == pid
    runtime.check(path)


@pytest.mark.parametrize(("name", "found"), [("missing.onnx", "nothing"), ("", "a folder")])
def test_a_missing_model_is_named(runtime: Runtime, tmp_path: Path, name: str, found: str):
    with pytest.raises(RuntimeFailure, match=f"expected a model file, found {found}$"):
        runtime.check(tmp_path / name)


def test_a_feed_that_does_not_fit_fails_in_one_line(runtime: Runtime, path: Path):
    with pytest.raises(RuntimeFailure) as caught:
        list(runtime.run(path, [{"x": np.ones((2, 5), np.float32)}]))

    assert str(caught.value).startswith(f"{path}: Got invalid dimensions for input: x")
    assert "\n" not in str(caught.value)


def test_source_locations_are_cut_from_messages():
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Load model from /a b/c.onnx failed:/src/core/graph/model.cc:256 "
        "onnxruntime::Model::Model(onnx::ModelProto&&, const Options&) Unsupported model IR version: 99\n"
    )

    assert tidy(RuntimeError(text)) == "Unsupported model IR version: 99"


def test_long_messages_are_cut():
    assert len(tidy(RuntimeError("x" * 10_000))) == 400


def test_observers_see_inputs_inner_tensors_outputs_and_initializers(runtime: Runtime, path: Path):
    names = ["y", "product", "x", "W"]

    seen = runtime.observe(path, lambda: iter([FEED, FEED]), {name: Recorder() for name in names})

    assert list(seen) == names
    product = FEED["x"] @ WEIGHT
    expected = {"x": FEED["x"], "product": product, "y": np.maximum(product, 0), "W": WEIGHT}
    for name in names:
        np.testing.assert_array_equal(seen[name].seen, [expected[name]] * 2)


def test_observing_leaves_external_data_where_it_is(runtime: Runtime, tmp_path: Path):
    path = tmp_path / "external.onnx"
    onnx.save(matmul_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    files = sorted(tmp_path.iterdir())

    seen = runtime.observe(path, lambda: [FEED], {"product": Recorder()})

    np.testing.assert_array_equal(seen["product"].seen, [FEED["x"] @ WEIGHT])
    assert sorted(tmp_path.iterdir()) == files


def test_tensors_that_do_not_fit_together_are_observed_in_more_passes(runtime: Runtime, tmp_path: Path):
    count = GROUP_BYTES // 4 // 2 + 1  # two such tensors are just over the limit
    nodes = [helper.make_node("Expand", ["x", "shape"], [f"y{index}"]) for index in range(3)]
    outputs = [value_info(f"y{index}", [count], TensorProto.FLOAT) for index in range(3)]
    shape = {"shape": np.array([count], np.int64)}
    onnx.save(model_of(nodes, [value_info("x", [1])], outputs, shape), tmp_path / "large.onnx")
    passes = []

    def feeds() -> list[Feed]:
        passes.append(True)
        return [{"x": np.ones(1, np.float32)}]

    runtime.observe(tmp_path / "large.onnx", feeds, {name: Blind() for name in ("y0", "y1", "y2")})

    assert len(passes) == 3


def test_refuses_to_observe_a_tensor_that_is_not_there(runtime: Runtime, path: Path):
    with pytest.raises(RuntimeFailure, match="cannot observe 'nope': the main graph has no tensor of that name"):
        runtime.observe(path, lambda: [FEED], {"nope": Recorder()})


def test_an_observer_that_fails_is_named(runtime: Runtime, path: Path):
    with pytest.raises(RuntimeFailure, match=r"model.onnx: the observer of 'y' failed: too ugly$"):
        runtime.observe(path, lambda: [FEED], {"y": Fails()})


def test_an_observer_may_raise_an_error_of_ours(runtime: Runtime, path: Path):
    with pytest.raises(DataError, match=r"model.onnx: all values are NaN$"):
        runtime.observe(path, lambda: [FEED], {"y": Refuses()})


def test_an_error_in_the_feeds_passes_and_the_worker_lives(runtime: Runtime, path: Path):
    def feeds() -> Iterator[Feed]:
        yield FEED
        raise DataError

    runtime.check(path)
    pid = runtime.pid

    with pytest.raises(DataError):
        runtime.observe(path, feeds, {"y": Recorder()})

    assert runtime.pid == pid
    assert len(runtime.observe(path, lambda: [FEED], {"y": Recorder()})["y"].seen) == 1


def test_no_feeds_leave_observers_as_they_were(runtime: Runtime, path: Path):
    assert runtime.observe(path, list, {"y": Recorder()})["y"].seen == []


def test_nan_passes_to_observers(runtime: Runtime, path: Path):
    seen = runtime.observe(path, lambda: [{"x": np.full((1, 3), np.nan, np.float32)}], {"product": Recorder()})

    assert np.isnan(seen["product"].seen[0]).all()


def test_a_killed_worker_is_reported_and_replaced(runtime: Runtime, path: Path):
    with pytest.raises(WorkerDied) as caught:
        runtime.observe(path, lambda: [FEED], {"x": Assassin()})

    expected = f"{path}: the ONNX Runtime process died while observing (SIGKILL, as when memory runs out)"
    assert str(caught.value) == expected
    assert len(list(runtime.run(path, [FEED]))) == 1


def test_a_worker_killed_between_calls_is_replaced(path: Path):
    with Runtime() as runtime:
        runtime.check(path)
        assert runtime.pid is not None
        os.kill(runtime.pid, signal.SIGSEGV)

        with pytest.raises(WorkerDied, match=r"died while running \(SIGSEGV\)"):
            list(runtime.run(path, [FEED]))

        assert len(list(runtime.run(path, [FEED]))) == 1


def test_a_run_that_takes_too_long_is_stopped(path: Path):
    with Runtime(timeout_s=3) as runtime:
        runtime.check(path)
        began = time.monotonic()

        with pytest.raises(WorkerDied, match=r"stopped: observing took longer than the limit of 3 s"):
            runtime.observe(path, lambda: [FEED], {"x": Sleeper()})

        assert time.monotonic() - began < 10
        runtime.check(path)


def test_a_worker_that_cannot_start_quotes_its_last_words(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "onnxruntime.py").write_text("raise SystemError('no wheel for this machine')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    with Runtime() as runtime, pytest.raises(WorkerDied) as caught:
        runtime.check(path)

    assert str(caught.value).endswith("(exit code 1; it last printed: SystemError: no wheel for this machine)")


def test_a_worker_ignores_interrupts(runtime: Runtime, path: Path):
    runtime.check(path)
    assert runtime.pid is not None

    os.kill(runtime.pid, signal.SIGINT)

    runtime.check(path)


def test_a_worker_ends_with_its_parent(path: Path):
    code = (
        "import os, sys; from pathlib import Path; from onnxcomp.runtime import Runtime\n"
        "runtime = Runtime(); runtime.check(Path(sys.argv[1])); print(runtime.pid, flush=True); os._exit(0)"
    )

    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )

    pid = int(ran.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_close_ends_the_worker(path: Path):
    runtime = Runtime()
    runtime.check(path)
    pid = runtime.pid

    runtime.close()

    assert runtime.pid is None
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_module_in_the_working_directory_is_not_imported(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])

    with Runtime() as runtime:
        runtime.check(path)


def test_times_models_side_by_side(runtime: Runtime, path: Path, tmp_path: Path):
    size = 512
    chain = ["x", "a", "b", "c", "y"]
    nodes = [helper.make_node("MatMul", [chain[i], "S" if i else "W"], [chain[i + 1]]) for i in range(4)]
    weights = {"W": np.ones((3, size), np.float32), "S": np.ones((size, size), np.float32)}
    model = model_of(nodes, [value_info("x", ["n", 3])], [value_info("y", ["n", size])], weights)
    onnx.save(model, tmp_path / "b.onnx")

    small, large = runtime.time([path, tmp_path / "b.onnx"], FEED, min_rounds=20, max_rounds=40, seconds=0.01)

    assert 20 <= small.runs == large.runs <= 40
    for timing in (small, large):
        assert 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms < 1000
    assert large.median_ms > small.median_ms


def test_refuses_impossible_rounds(runtime: Runtime, path: Path):
    with pytest.raises(OptionError, match="got 5 and 4"):
        runtime.time([path], FEED, min_rounds=5, max_rounds=4)


@pytest.mark.parametrize("option", [{"threads": 0}, {"threads": 257}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}])
def test_refuses_options_out_of_range(option: dict[str, Any]):
    with pytest.raises(OptionError, match=next(iter(option))):
        Runtime(**option)


def test_profiles_each_node(runtime: Runtime, path: Path):
    times = runtime.profile(path, FEED, runs=5)

    assert times.keys() == {"product", "y"}
    assert all(0 < milliseconds < 100 for milliseconds in times.values())


def event(name: str, start: int, duration: int, kind: str = "Node") -> dict[str, Any]:
    """One line of a profiler's trace."""
    return {"cat": kind, "name": name, "ts": start, "dur": duration}


def test_profile_averages_over_the_last_runs():
    trace = [
        event("a_kernel_time", 1, 900),  # the warm-up
        event("model_run", 0, 1000, "Session"),
        event("a_kernel_time", 1001, 10),
        event("model_run", 1000, 1000, "Session"),
        event("a_kernel_time", 2001, 20),
        event("b_kernel_time", 2100, 50),
        event("a_fence_before", 2200, 50),
        event("model_run", 2000, 1000, "Session"),
    ]

    assert node_times(trace, runs=2) == {"b": 0.025, "a": 0.015}


def test_the_median_of_a_profile_is_not_moved_by_one_slow_run_and_a_loop_counts_each_time():
    trace = [event("model_run", 1000 * index, 900, "Session") for index in range(3)]
    for index, duration in enumerate([10, 800, 12]):
        trace += [event("a_kernel_time", 1000 * index + 1, duration), event("b_kernel_time", 1000 * index + 850, 3)]
        trace.append(event("b_kernel_time", 1000 * index + 860, 4))

    assert node_times(trace, runs=3, median=True) == {"a": 0.012, "b": 0.007}


def test_peak_memory_is_that_of_the_worker(path: Path):
    with Runtime() as runtime:
        assert runtime.peak_memory_bytes == 0
        runtime.check(path)
        assert 20e6 < runtime.peak_memory_bytes < 2e9


@pytest.mark.parametrize("names", [["a"], ["c"], ["a", "c"]])
def test_what_the_observed_tensors_do_not_need_is_not_run(runtime: Runtime, tmp_path: Path, names: list[str]):
    path = tmp_path / "branches.onnx"
    text = """
        <ir_version: 8, opset_import: ["": 17]> g (float[2] x, bool k) => (float[2] y) {
            a = Abs(x) b = Neg(x)
            c = If (k) <
                then_branch = t () => (float[2] u) { u = Identity(a) },
                else_branch = e () => (float[2] v) { v = Identity(b) }>
            y = Reshape(c, seven)
        }"""
    proto = parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([7], np.int64), "seven"))  # y cannot be made
    onnx.save(proto, path)
    feed = {"x": np.array([-1.0, 2.0], np.float32), "k": np.array(True)}

    seen = runtime.observe(path, lambda: [feed], {name: Recorder() for name in names})

    for name in names:
        np.testing.assert_array_equal(seen[name].seen, [[1.0, 2.0]])
