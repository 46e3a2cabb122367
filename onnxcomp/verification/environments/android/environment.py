"""The layer `android`: models run in the Android build of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from onnxcomp.verification.environments.android import installing
from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.installed import InstalledEnvironment, unfit_host
from onnxcomp.verification.environments.processes import Job

__all__ = ["Android"]

_OLDEST_GLIBC = (2, 34)  # with stat and the functions of threads in the one library


class Android(InstalledEnvironment):
    """ONNX Runtime as it is built for Android on x86-64, with XNNPACK before the CPU provider.

    The library is that of an app. Functions of Android's C library that Linux lacks or has otherwise are stood in for;
    all computation is the library's own. A phone's processor takes int8 activations as they are; for the CPU provider
    to do so here too, give `config` ``{"session.qdqisint8allowed": "1"}``. The nodes of the first run are those
    counted.
    """

    name: ClassVar[str] = "android"
    description: ClassVar[str] = "the Android build"
    provider: ClassVar[str] = "XnnpackExecutionProvider"
    size: ClassVar[str] = "150 MB to download, 40 MB to keep"

    def __init__(self) -> None:
        super().__init__(installing.recipe())

    def _unfit(self) -> str | None:
        return unfit_host(glibc=_OLDEST_GLIBC)

    def _lacking(self) -> str | None:
        return installing.lacking()

    def _fill(self, folder: Path, downloads: Path, progress: Callable[[str], None]) -> dict[str, str]:
        return installing.fill(folder, downloads, progress)

    def _execute(self, job: Job) -> Execution:
        options = [] if job.plain else ["-p", "XNNPACK"]
        for key, value in job.config.items():
            options += ["-c", f"{key}={value}"]
        for output in job.outputs or ():
            options += ["-o", output]
        files = [str(self.folder / installing.LIBRARY), str(job.model.absolute())]
        command = [str(self.folder / installing.RUNNER), *options, "--", *files]
        version = job.run(command, "ONNX Runtime's Android build").strip()
        versions = {"onnxruntime": version, **self._installation.versions()}
        return Execution(job.results(), job.nodes(), f"ONNX Runtime {version}, Android, x86-64", versions)
