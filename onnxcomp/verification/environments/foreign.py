"""Running a model in another Python: one for another processor, or with another build of ONNX Runtime."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onnxcomp.errors import RuntimeFailure, WorkerDied
from onnxcomp.runtime import Feed
from onnxcomp.verification.environments.base import Execution, executed_nodes
from onnxcomp.verification.environments.tensor_files import read_tensors, write_tensors

__all__ = ["ForeignPython", "Plugin", "present_python", "run_foreign"]

_SCRIPTS = ("run_model.py", "tensor_files.py")
_LAST_WORDS_BYTES = 2000
_LAST_WORDS_SHOWN = 300  # characters
_THREADS = 1  # so that sums are made in one order
_SETTINGS = {
    "OMP_NUM_THREADS": str(_THREADS),
    "OPENBLAS_NUM_THREADS": str(_THREADS),
    "ORT_DISABLE_TELEMETRY": "1",  # it would write into the user's cache folder, also from an emulated system
}


@dataclass(frozen=True)
class ForeignPython:
    """A Python that has numpy and ONNX Runtime.

    Attributes:
        command: What starts it, such as ``(qemu, "-L", root, python)``.
        variables: Its environment variables, beside those that `environment` adds.
        title: Where it runs, such as "Linux arm64, emulated".
        versions: Name -> version of its parts, for the report.
    """

    command: tuple[str, ...]
    variables: Mapping[str, str]
    title: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """All environment variables that it gets."""
        return {**self.variables, **_SETTINGS}


def present_python(title: str) -> ForeignPython:
    """This very Python, which finds what this process finds."""
    search = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    versions = {"python": platform.python_version(), "numpy": version("numpy")}
    return ForeignPython((sys.executable,), {**os.environ, "PYTHONPATH": search}, title, versions)


@dataclass(frozen=True)
class Plugin:
    """A library that brings an execution provider.

    Attributes:
        provider: The provider's name.
        library: The library's path.
        chosen: The provider's options.
    """

    provider: str
    library: str
    chosen: Mapping[str, str] = field(default_factory=dict)


def run_foreign(
    python: ForeignPython,
    model: Path,
    feeds: Sequence[Feed],
    *,
    outputs: Sequence[str] | None = None,
    config: Mapping[str, str] | None = None,
    providers: Mapping[str, Mapping[str, str]] | None = None,
    plugin: Plugin | None = None,
    timeout_s: float = 600.0,
) -> Execution:
    """Run a model on every feed in a process of its own.

    Args:
        python: What runs it.
        model: An .onnx or .ort file.
        feeds: The inputs, one mapping a run.
        outputs: The outputs to give; None: all.
        config: Session configuration entries.
        providers: Execution provider -> its options, the first choice first; None: the CPU provider.
        plugin: An execution provider from a library of its own, before all others.
        timeout_s: The longest that the whole may take, in seconds.

    Raises:
        RuntimeFailure: It refused the model or a feed.
        WorkerDied: It crashed or did not end in time.
    """
    if not model.is_file():
        message = f"{model}: expected a model file, found {'a folder' if model.is_dir() else 'nothing'}"
        raise RuntimeFailure(message)
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as name:
        folder = Path(name)
        request = {
            "model": str(model.absolute()),
            "feeds": str(folder / "feeds.tensors"),
            "results": str(folder / "results.tensors"),
            "profile": str(folder / "profile"),
            "outputs": None if outputs is None else list(outputs),
            "threads": _THREADS,
            "config": dict(config or {}),
            "providers": [[key, dict(value)] for key, value in (providers or {"CPUExecutionProvider": {}}).items()],
            "plugin": None if plugin is None else {**asdict(plugin), "chosen": dict(plugin.chosen)},
        }
        try:
            write_tensors(folder / "feeds.tensors", feeds)
        except ValueError as error:
            message = f"{model}: {error}"
            raise RuntimeFailure(message) from error
        answer = _call(python, model, folder, request, timeout_s)
        nodes = executed_nodes(Path(answer["profile"]))
        results = read_tensors(folder / "results.tensors")
    runtime = f"ONNX Runtime {answer['version']}, {python.title}"
    return Execution(results, nodes, runtime, {**python.versions, "onnxruntime": str(answer["version"])})


def _call(
    python: ForeignPython, model: Path, folder: Path, request: Mapping[str, Any], timeout_s: float
) -> dict[str, Any]:
    """Start the process and give its answer."""
    for script in _SCRIPTS:
        shutil.copy(Path(__file__).with_name(script), folder)
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [*python.command, *(str(folder / name) for name in ("run_model.py", "request.json", "answer.json"))]
    printed = folder / "printed.txt"
    begun = time.monotonic()
    with printed.open("wb") as file:
        try:
            code = subprocess.run(
                command,
                env=python.environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            limit = f"{timeout_s:g} s"
            message = (
                f"{model}: {python.title} was stopped: it took longer than the limit of {limit}; run fewer samples"
            )
            raise WorkerDied(message) from None
        except OSError as error:
            message = f"{model}: {python.title} cannot be started ({error.strerror}: {command[0]}); install it again"
            raise WorkerDied(message) from error
    answer = _answer(folder / "answer.json")
    if code != 0 or answer is None:
        cause = _cause_of_death(code, printed, time.monotonic() - begun)
        message = f"{model}: the process of {python.title} died ({cause})"
        raise WorkerDied(message)
    if "error" in answer:
        from onnxcomp.runtime.sessions import tidy  # it loads ONNX Runtime, which only this case needs

        message = f"{model}: {python.title}: {tidy(RuntimeError(answer['error']))}"
        raise RuntimeFailure(message)
    return answer


def _answer(path: Path) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return answer


def _cause_of_death(code: int, printed: Path, seconds: float) -> str:
    """How the process ended, in one line, with the end of what it printed."""
    cause = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        cause += ", as when memory runs out"
    tail = printed.read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace").splitlines()
    words = next((line.strip() for line in reversed(tail) if line.strip()), "")
    cause += f" after {seconds:.1f} s"
    return f"{cause}; it last printed: {words[:_LAST_WORDS_SHOWN]}" if words else cause
