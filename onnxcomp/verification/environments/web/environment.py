"""onnxruntime-web, the WebAssembly build for browsers, run in Node with one thread."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from onnxcomp.errors import ModelError
from onnxcomp.structure import model_files
from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.installed import InstalledEnvironment
from onnxcomp.verification.environments.processes import Job
from onnxcomp.verification.environments.tools import fetch_npm, lacking_npm

__all__ = ["FILES", "PACKAGE", "VERSION", "Web"]

PACKAGE = "onnxruntime-web"

VERSION = "1.30.0"
"""The newest release: the web build lags behind the wheel."""

PACKAGE_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"

FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What of the package is needed to run a model (15 of its 145 MB); nothing else is unpacked."""

NODE_VERSION = 20
"""The oldest Node that this was tried with."""

SCRIPT = Path(__file__).with_name("run.mjs")
"""What Node runs."""


class Web(InstalledEnvironment):
    """onnxruntime-web in Node.

    It has one provider, the CPU's, compiled to WebAssembly: the same kernels as in a browser, without WebGPU. What
    executed each node is known from the profile, as elsewhere: WebAssembly has no files, so ONNX Runtime prints it.
    """

    name = "web"
    description = "the WebAssembly build, in Node"
    size = "33 MB to download, 15 MB to keep"

    def __init__(self) -> None:
        super().__init__({PACKAGE: VERSION})

    def _unfit(self) -> str | None:
        return None

    def _lacking(self) -> str | None:
        return lacking_npm()

    def missing(self) -> str | None:
        """Why it cannot run now, in one line with what to do about it; None: it can."""
        return _missing_node() or super().missing()

    def _fill(self, folder: Path, downloads: Path, progress: Callable[[str], None]) -> dict[str, str]:
        progress(f"web: fetching {PACKAGE} {VERSION} (33 MB)")
        with tarfile.open(fetch_npm(f"{PACKAGE}@{VERSION}", PACKAGE_SHA256, downloads)) as archive:
            for name in FILES:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None, "the package of this hash holds it"
                with member, (folder / name).open("wb") as file:
                    shutil.copyfileobj(member, file)
        return {PACKAGE: VERSION}

    def _execute(self, job: Job) -> Execution:
        """It has the CPU provider alone: `plain` changes nothing."""
        weights = {"folder": str(job.model.resolve().parent), "externalData": _external_data(job.model)}
        job.write(runtime=str(self.folder), **weights)
        printed = job.run(["node", str(SCRIPT)], "Node")
        (job.folder / "profile.json").write_text(profile_in(printed), encoding="utf-8")
        versions = {**self._installation.versions(), "node": ".".join(map(str, _node_version() or ()))}
        return Execution(job.results(), job.nodes(), f"ONNX Runtime {VERSION}, WebAssembly, 1 thread", versions)


def profile_in(printed: str) -> str:
    r"""The profile in what onnxruntime-web printed: a JSON array, from a line "[" to a line "]".

    Example:
        >>> profile_in("a warning\n[\n{}\n]\n")
        '[\n{}\n]'
    """
    found = re.search(r"^\[\n.*^\]$", printed, re.MULTILINE | re.DOTALL)
    return found[0] if found else "[]"


def _external_data(model: Path) -> list[str]:
    """The files with the model's weights, relative to its folder."""
    try:
        return [str(path.relative_to(model.resolve().parent)) for path in model_files(model)[1:]]
    except ModelError:
        return []  # ONNX Runtime says itself what it thinks of the model


def _node_version() -> tuple[int, ...] | None:
    """The version of Node; None: it does not run."""
    try:
        ended = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"v(\d+)\.(\d+)\.(\d+)", ended.stdout)
    return tuple(map(int, found.groups())) if found else None


def _missing_node() -> str | None:
    version = _node_version()
    if version is None:
        return f"node was not found: install Node {NODE_VERSION} or newer"
    if version[0] < NODE_VERSION:
        return f"Node is {'.'.join(map(str, version))}, expected {NODE_VERSION} or newer: install a newer one"
    return None
