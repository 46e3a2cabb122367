"""Running a model in another Python: one for another processor, or with another execution provider."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from onnxcomp.verification.environments.base import Execution, with_compiled_parts
from onnxcomp.verification.environments.processes import SETTINGS, Job
from onnxcomp.verification.environments.tools import run_tool

__all__ = ["ForeignPython", "Plugin", "present_python"]

_SCRIPTS = ("run_model.py", "tensor_files.py")


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
    chosen: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ForeignPython:
    """A Python that has numpy and ONNX Runtime.

    Attributes:
        command: What starts it, such as ``(qemu, "-L", root, python)``.
        variables: Its environment variables, beside `processes.SETTINGS`.
        title: Where it runs, such as "Linux arm64, emulated".
        versions: Name -> version of its parts, for the report.
    """

    command: tuple[str, ...]
    variables: Mapping[str, str]
    title: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def start(self, code: str) -> str:
        """Run some lines of Python and give what they print.

        Raises:
            RequirementError: It cannot be started, or failed.
        """
        return run_tool([*self.command, "-c", code], variables={**self.variables, **SETTINGS})

    def run(self, job: Job, plugin: Plugin | None = None) -> Execution:
        """Run a model on the CPU provider, or on that of a plug-in before it.

        Raises:
            RuntimeFailure: It refused the model or a feed.
            WorkerDied: It crashed or did not end in time.
        """
        for script in _SCRIPTS:
            shutil.copy(Path(__file__).with_name(script), job.folder)
        job.write(plugin=None if plugin is None else asdict(plugin))
        job.run([*self.command, str(job.folder / _SCRIPTS[0])], self.title, self.variables)
        answer = json.loads((job.folder / "answer.json").read_text(encoding="utf-8"))
        nodes = job.nodes()
        if plugin is not None:
            nodes = with_compiled_parts(nodes, answer["assigned"], plugin.provider)
        runtime = f"ONNX Runtime {answer['version']}, {self.title}"
        return Execution(job.results(), nodes, runtime, {**self.versions, "onnxruntime": answer["version"]})


def present_python(title: str) -> ForeignPython:
    """This very Python, which finds what this process finds."""
    search = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    versions = {"python": platform.python_version(), "numpy": version("numpy")}
    return ForeignPython((sys.executable,), {**os.environ, "PYTHONPATH": search}, title, versions)
