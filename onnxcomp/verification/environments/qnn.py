"""Qualcomm's execution provider with its simulator of the HTP, loaded into the installed ONNX Runtime."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.foreign import Plugin, present_python
from onnxcomp.verification.environments.installed import InstalledEnvironment, unfit_host
from onnxcomp.verification.environments.processes import Job
from onnxcomp.verification.environments.tools import fetch_wheel, lacking_pip

__all__ = ["Qnn"]

PACKAGE = "onnxruntime-qnn"
VERSION = "2.7.0"
PYTHON, PLATFORM = "3.11", "manylinux_2_35_x86_64"
"""Of the wheel. Only libraries are used, and they need no Python: one wheel does for all."""

WHEEL_SHA256 = "c56c01562b8534fe8980cfea4601408d950c065f8251fb862ce82101c52c9849"

LIBRARY = "onnxruntime_qnn/libonnxruntime_providers_qnn.so"
SIMULATOR = "onnxruntime_qnn/libQnnHtp.so"
FILES = (
    LIBRARY,
    SIMULATOR,
    "onnxruntime_qnn.libs/libc++-71bc274c.so.1.0",
    "onnxruntime_qnn.libs/libc++abi-0539aa51.so.1.0",
    "onnxruntime_qnn.libs/libunwind-6b740a46.so.1.0",
    "onnxruntime_qnn/Qualcomm_LICENSE.pdf",
)
"""What of the wheel is needed (113 of its 256 MB). The licence stays with the libraries."""

OLDEST_RUNTIME = (1, 24, 2)
"""As the wheel says that it needs."""

OLDEST_GLIBC = (2, 35)
"""As the wheel's tag says."""

ARCHITECTURE = "75"
"""The HTP that is simulated, that of the Snapdragon 8 Gen 3. Pinned: others round otherwise."""


class Qnn(InstalledEnvironment):
    """Qualcomm's HTP, simulated on x86-64.

    The provider is a plugin: it is loaded into the ONNX Runtime that is installed here, so a difference from the CPU
    provider is the provider's own. What it does not take goes to the CPU provider, which `Execution.nodes` shows; with
    ``config={"session.disable_cpu_ep_fallback": "1"}`` that is refused. The time that it takes means nothing.
    """

    name = "qnn"
    description = f"Qualcomm's HTP, simulated ({PACKAGE} {VERSION})"
    provider = "QNNExecutionProvider"
    size = "99 MB to download, 113 MB to keep"

    def __init__(self) -> None:
        super().__init__({PACKAGE: VERSION})

    def _unfit(self) -> str | None:
        if (unfit := unfit_host(glibc=OLDEST_GLIBC)) is not None:
            return unfit
        found = version("onnxruntime")
        if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < OLDEST_RUNTIME:
            wanted = ".".join(map(str, OLDEST_RUNTIME))
            return f"onnxruntime is {found}, expected {wanted} or newer: pip install -U onnxruntime"
        return None

    def _lacking(self) -> str | None:
        return lacking_pip()

    def _fill(self, folder: Path, downloads: Path, progress: Callable[[str], None]) -> dict[str, str]:
        progress(f"qnn: fetching {PACKAGE} {VERSION} (99 MB; Qualcomm's licence is in it)")
        package = f"{PACKAGE}=={VERSION}"
        wheel = fetch_wheel(package, WHEEL_SHA256, downloads, python=PYTHON, platforms=[PLATFORM])
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (folder / name).parent.mkdir(exist_ok=True)
                with archive.open(name) as member, (folder / name).open("wb") as file:
                    shutil.copyfileobj(member, file)
        return {PACKAGE: VERSION}

    def _execute(self, job: Job) -> Execution:
        if job.plain:
            return present_python("this machine's CPU").run(job)
        options = {
            "backend_path": str(self.folder / SIMULATOR),
            "htp_arch": ARCHITECTURE,
            "offload_graph_io_quantization": "0",  # the first Q and the last DQ are the provider's too
        }
        plugin = Plugin(self.provider, str(self.folder / LIBRARY), options)
        execution = present_python(f"HTP {ARCHITECTURE} simulated").run(job, plugin)
        return replace(execution, versions={**execution.versions, **self._installation.versions()})
