"""What the processors have in common that this machine is, or that qemu emulates on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from onnxcomp.verification.environments import debian
from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.foreign import ForeignPython
from onnxcomp.verification.environments.installed import InstalledEnvironment, unfit_host
from onnxcomp.verification.environments.processes import Job

__all__ = ["QEMU_PACKAGE", "EmulatedProcessor", "unpack_qemu"]

QEMU_PACKAGE = "qemu-user:amd64"


class EmulatedProcessor(InstalledEnvironment):
    """ONNX Runtime's CPU provider on another processor; on this one where it is such a processor.

    Args:
        recipe: What decides the installation, beside the suite of Debian.
    """

    def __init__(self, recipe: Mapping[str, str]) -> None:
        super().__init__({"suite": debian.SUITE, **recipe})

    @abstractmethod
    def _present(self) -> ForeignPython | None:
        """This machine's own Python, where it is such a processor."""

    @abstractmethod
    def _emulated(self, folder: Path, versions: Mapping[str, str]) -> ForeignPython:
        """The emulated Python of an installation."""

    def _unfit(self) -> str | None:
        return None if self._present() else unfit_host()

    def _lacking(self) -> str | None:
        return debian.lacking_tools()

    def _problem(self) -> str | None:
        return None if self._present() else super()._problem()

    def _execute(self, job: Job) -> Execution:
        """There is only the CPU provider: `plain` changes nothing."""
        python = self._present() or self._emulated(self.folder, self._installation.versions())
        return python.run(job)


def unpack_qemu(package: Path, program: Path) -> str:
    """Unpack the emulator that is called as `program` is, and tell its version."""
    debian.unpack_file(package, f"usr/bin/{program.name}", program)
    return debian.package_version(package)
