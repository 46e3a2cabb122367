"""A process runs a model: what it gives, what it refuses, how its death is told, and what it leaves behind."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest

from onnxcomp.errors import RuntimeFailure, WorkerDied
from onnxcomp.runtime import Feed
from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.foreign import ForeignPython, Plugin, present_python
from onnxcomp.verification.environments.processes import prepared
from tests.models import Array, graph_model, mlp_model, random_inputs, run

TITLE = "the other Python"
HERE = present_python(TITLE)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(mlp_model(), path)
    return path


def feeds_of(path: Path, count: int = 2) -> list[dict[str, Array]]:
    return [random_inputs(onnx.load(path), seed=seed) for seed in range(count)]


def run_in(
    python: ForeignPython, model: Path, feeds: Sequence[Feed], *, plugin: Plugin | None = None, **asked: Any
) -> Execution:
    with prepared(model, feeds, **asked) as job:
        return python.run(job, plugin)


def dying(code: str) -> ForeignPython:
    """A Python that does this instead of running the model."""
    return ForeignPython((sys.executable, "-c", code), {}, TITLE)


def test_gives_the_outputs_of_every_feed_and_the_nodes_that_ran(model, temporary):
    feeds = feeds_of(model, 10)
    execution = run_in(HERE, model, feeds)
    assert len(execution.outputs) == 10
    for feed, outputs in zip(feeds, execution.outputs, strict=True):
        np.testing.assert_array_equal(outputs["y"], run(model, feed, optimized=True)[0])
    [(provider, operators)] = execution.nodes.items()
    assert provider == "CPUExecutionProvider"
    assert sum(operators.values()) == 2  # the Relu is part of a FusedGemm
    assert execution.runtime == f"ONNX Runtime {execution.versions['onnxruntime']}, {TITLE}"
    assert list(temporary.iterdir()) == []


def test_without_feeds_the_model_is_only_loaded(model):
    execution = run_in(HERE, model, [])
    assert execution.outputs == []
    assert execution.nodes == {}


def test_gives_only_the_outputs_that_are_asked_for(tmp_path):
    path = tmp_path / "two.onnx"
    onnx.save(graph_model("g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x) z = Abs(x) }"), path)
    execution = run_in(HERE, path, [{"x": np.array([-1, 2], np.float32)}], outputs=["z"])
    assert [set(outputs) for outputs in execution.outputs] == [{"z"}]
    np.testing.assert_array_equal(execution.outputs[0]["z"], [1, 2])


def test_session_configuration_reaches_the_session(model):
    with pytest.raises(RuntimeFailure, match="explicitly added the CPU EP"):
        run_in(HERE, model, feeds_of(model), config={"session.disable_cpu_ep_fallback": "1"})


def test_what_onnx_runtime_refuses_is_told_in_one_line_with_the_run(model, temporary):
    feeds = [*feeds_of(model, 1), {"x": np.zeros((2, 9), np.float32)}]
    with pytest.raises(
        RuntimeFailure, match=r"model\.onnx: the other Python: .*Got: 9 Expected: 8.*\(run 2\)"
    ) as caught:
        run_in(HERE, model, feeds)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, WorkerDied)
    assert list(temporary.iterdir()) == []


def test_a_broken_model_is_refused_by_onnx_runtime(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x09broken")
    with pytest.raises(RuntimeFailure, match=r"broken\.onnx: the other Python: .*[Pp]rotobuf"):
        run_in(HERE, path, [])


def test_a_model_that_is_not_there_is_told_without_a_process(tmp_path):
    with pytest.raises(RuntimeFailure, match=r"none\.onnx: expected a model file, found nothing"):
        run_in(dying("1/0"), tmp_path / "none.onnx", [])


def test_a_feed_that_is_no_tensor_is_refused(model):
    with pytest.raises(RuntimeFailure, match="'x' is of the type list"):
        run_in(dying("1/0"), model, cast("list[Feed]", [{"x": [1.0]}]))


def test_a_plugin_that_cannot_be_loaded_is_told(model, tmp_path):
    plugin = Plugin("SomeProvider", str(tmp_path / "libnone.so"), {"level": "1"})
    with pytest.raises(RuntimeFailure, match=r"libnone\.so"):
        run_in(HERE, model, [], plugin=plugin)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGKILL, "SIGKILL, as when memory runs out"),
        (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_a_crash_is_told_with_its_signal_and_its_last_line(model, temporary, number, told):
    code = f"import os; print('first\\nlast words\\n', flush=True); os.kill(os.getpid(), {int(number)})"
    with pytest.raises(WorkerDied) as caught:
        run_in(dying(code), model, [])
    assert str(caught.value) == f"{model}: the process of the other Python died ({told}; it last printed: last words)"
    assert list(temporary.iterdir()) == []


def test_what_went_to_the_error_stream_is_told_first(model):
    with pytest.raises(WorkerDied, match=r"exit code 1; it last printed: why\)"):
        run_in(dying("import sys; print('more', flush=True); sys.exit('why')"), model, [])


def test_a_refusal_is_one_line_without_places_in_the_source_and_not_too_long(model):
    text = "a.cc:12 f(int x) No such\n  operator " + "x" * 9000
    code = f"open('refusal', 'w').write({text!r}); raise SystemExit(3)"
    with pytest.raises(
        RuntimeFailure, match=r"^\S+model\.onnx: the other Python: No such operator x{300,390}…$"
    ) as caught:
        run_in(dying(code), model, [])
    assert not isinstance(caught.value, WorkerDied)


def test_what_it_has_started_ends_with_it(model, tmp_path):
    code = "import subprocess, time; subprocess.Popen(['sh', '-c', 'sleep 0.7; touch LATE']); time.sleep(60)"
    with pytest.raises(WorkerDied, match="was stopped"):
        run_in(dying(code.replace("LATE", str(tmp_path / "late"))), model, [], timeout_s=0.3)
    time.sleep(0.8)
    assert not (tmp_path / "late").exists()


def test_an_end_without_an_answer_is_a_death(model):
    with pytest.raises(WorkerDied, match="exit code 0"):
        run_in(dying("pass"), model, [])


def test_an_answer_does_not_hide_a_crash_after_it(model):
    code = "import sys; open('results', 'w').write('{}'); sys.exit(3)"
    with pytest.raises(WorkerDied, match="exit code 3"):
        run_in(dying(code), model, [])


def test_it_is_stopped_when_the_time_is_over(model, temporary):
    begun = time.monotonic()
    with pytest.raises(WorkerDied, match=r"it took longer than the limit of 0\.2 s; run fewer samples"):
        run_in(dying("import time; time.sleep(60)"), model, [], timeout_s=0.2)
    assert time.monotonic() - begun < 10
    assert list(temporary.iterdir()) == []


def test_a_program_that_is_not_there_is_told(model):
    with pytest.raises(WorkerDied, match=r"cannot be started .*no-such-qemu"):
        run_in(ForeignPython(("/no-such-qemu",), {}, TITLE), model, [])


def test_onnx_runtime_writes_no_telemetry_into_the_user_s_cache(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_in(present_python(TITLE), model, [])
    assert not (tmp_path / "cache").exists()


def test_the_other_python_gets_its_own_environment_one_thread_and_no_telemetry(model):
    code = "import os, sys; sys.exit(' '.join(f'{k}={v}' for k, v in sorted(os.environ.items()) if k != 'LC_CTYPE'))"
    python = ForeignPython((sys.executable, "-c", code), {"MINE": "1"}, TITLE)
    settings = "MINE=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 ORT_DISABLE_TELEMETRY=1"
    with pytest.raises(WorkerDied, match=rf"it last printed: {settings}\)"):
        run_in(python, model, [])
