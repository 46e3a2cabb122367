"""The layer `x86`: an x86-64 without VNNI, whose products of uint8 and int8 saturate; emulated where it has to be."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.runtime import Feed
from onnxcomp.verify.environments import debian
from onnxcomp.verify.environments.base import Environment, Execution
from onnxcomp.verify.environments.foreign import ForeignPython, present_python, run_foreign
from onnxcomp.verify.environments.installation import Installation, run_tool

__all__ = ["X86"]

CPU = "Haswell-v4"
"""AVX2 and no more, as in processors up to 2018; v4 is the one without what qemu cannot emulate."""

_QEMU = "qemu-user:amd64"
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_CPU_FACTS = Path("/proc/cpuinfo")


class X86(Environment):
    """ONNX Runtime's CPU provider on an x86-64 with AVX2 and without VNNI.

    Its kernels add two products of uint8 and int8 in 16 bits, which is too narrow for weights that use all 8 bits. A
    machine with VNNI never shows it.
    """

    name = "x86"
    description = "an x86-64 without VNNI, where uint8 x int8 saturates; emulated by qemu where this machine has VNNI"

    def __init__(self) -> None:
        self._installation = Installation(self.name, {"suite": debian.SUITE})

    def missing(self) -> str | None:
        """Why it cannot run now; None: it can, and on an x86-64 without VNNI it always can."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return f"it runs on Linux on x86-64 only, and this is {sys.platform} on {platform.machine()}"
        if _native():
            return None
        problem = self._installation.problem()
        return problem and (debian.lacking_tools() or problem)

    def install(self, progress: Callable[[str], None]) -> None:
        """Install qemu: about 80 MB to fetch, 14 MB on disk."""
        if _native() or self._installation.problem() is None:
            return
        if (lacking := debian.lacking_tools()) is not None:
            message = f"{self.name}: {lacking}"
            raise RequirementError(message)
        self._installation.make(lambda folder: _fill(folder, progress))

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
        """Run a model; `plain` changes nothing, as there is only the CPU provider."""
        if _native():
            python = present_python("CPU, this x86-64 without VNNI")
        else:
            python = _emulated(self._installation.folder, self._installation.versions())
        return run_foreign(python, model, feeds, outputs=outputs, config=config, timeout_s=timeout_s)


def _native() -> bool:
    """Whether this processor itself has no VNNI."""
    try:
        lines = _CPU_FACTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return flags is not None and _VNNI.isdisjoint(flags)


def _emulated(folder: Path, versions: Mapping[str, str]) -> ForeignPython:
    """This very Python with its ONNX Runtime, on another processor."""
    python = present_python(f"CPU, x86-64 without VNNI ({CPU} by qemu {versions['qemu']})")
    # What a library was told about this machine's processor is wrong there, and would crash it.
    variables = {name: value for name, value in python.variables.items() if name != "OPENBLAS_CORETYPE"}
    command = (str(folder / "qemu-x86_64"), "-cpu", CPU, *python.command)
    return ForeignPython(command, variables, python.title, {**python.versions, **versions})


def _fill(folder: Path, progress: Callable[[str], None]) -> dict[str, str]:
    program = folder / "qemu-x86_64"
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        progress("x86: fetching qemu (a Debian package, 80 MB)")
        package = debian.packages(Path(downloads), [_QEMU])[_QEMU]
        debian.unpack_file(package, f"usr/bin/{program.name}", program)
        qemu = debian.package_version(package)
    progress("x86: starting it for the first time")
    python = _emulated(folder, {"qemu": qemu})
    run_tool([*python.command, "-c", "import numpy, onnxruntime"], variables=python.variables)
    return {"qemu": qemu}
