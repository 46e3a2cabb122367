"""What the processors have in common that this machine is, or that qemu emulates on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.runtime import Feed
from onnxcomp.verification.environments import debian
from onnxcomp.verification.environments.base import Environment, Execution
from onnxcomp.verification.environments.foreign import ForeignPython, run_foreign
from onnxcomp.verification.environments.installation import Installation

__all__ = ["QEMU_PACKAGE", "EmulatedProcessor", "unpack_qemu"]

QEMU_PACKAGE = "qemu-user:amd64"


class EmulatedProcessor(Environment):
    """ONNX Runtime's CPU provider on another processor; on this one where it is such a processor.

    Args:
        recipe: What decides the installation, beside the suite of Debian.
    """

    def __init__(self, recipe: Mapping[str, str]) -> None:
        self._installation = Installation(self.name, {"suite": debian.SUITE, **recipe})

    @abstractmethod
    def _present(self) -> ForeignPython | None:
        """This machine's own Python, where it is such a processor."""

    @abstractmethod
    def _wrong_host(self) -> str | None:
        """Why it cannot be emulated on a machine like this."""

    @abstractmethod
    def _emulated(self, folder: Path, versions: Mapping[str, str]) -> ForeignPython:
        """The emulated Python of an installation."""

    @abstractmethod
    def _fill(self, folder: Path, progress: Callable[[str], None]) -> Mapping[str, str]:
        """Put an installation into an empty folder, see that it starts, and tell its versions."""

    def _lacking_tools(self) -> str | None:
        """What lacks for an installation."""
        return debian.lacking_tools()

    def missing(self) -> str | None:
        """Why it cannot run now, in one line with what to do about it; None: it can."""
        if self._present() is not None:
            return None
        if (wrong := self._wrong_host()) is not None:
            return wrong
        problem = self._installation.problem()
        return problem and (self._lacking_tools() or problem)

    def install(self, progress: Callable[[str], None]) -> None:
        """Install what is missing into the user's cache folder, whole or not at all.

        Raises:
            RequirementError: It cannot be had, or is not what was expected.
        """
        if self.missing() is None:
            return
        if (lacking := self._wrong_host() or self._lacking_tools()) is not None:
            message = f"{self.name}: {lacking}"
            raise RequirementError(message)
        self._installation.make(lambda folder: self._fill(folder, progress))

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
        """Run a model in a process of its own; `plain` changes nothing, as there is only the CPU provider.

        Raises:
            RequirementError: Something is missing.
            RuntimeFailure: It refused the model or a feed.
            WorkerDied: It crashed or did not end in time.
        """
        if (lacking := self.missing()) is not None:
            message = f"{self.name}: {lacking}"
            raise RequirementError(message)
        python = self._present() or self._emulated(self._installation.folder, self._installation.versions())
        return run_foreign(python, model, feeds, outputs=outputs, config=config, timeout_s=timeout_s)


def unpack_qemu(package: Path, program: Path) -> str:
    """Unpack the emulator that is called as `program` is, and tell its version."""
    debian.unpack_file(package, f"usr/bin/{program.name}", program)
    return debian.package_version(package)
