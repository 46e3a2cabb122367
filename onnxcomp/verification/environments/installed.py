"""What the environments have in common that are installed into the user's cache folder."""

from __future__ import annotations

import platform
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from onnxcomp.errors import RequirementError
from onnxcomp.runtime import Feed
from onnxcomp.verification.environments.base import Environment, Execution
from onnxcomp.verification.environments.installation import Installation
from onnxcomp.verification.environments.processes import Job, prepared

__all__ = ["InstalledEnvironment", "unfit_host"]


class InstalledEnvironment(Environment):
    """An environment that is installed once, and runs each model in a process of its own.

    Attributes:
        size: What an installation costs, such as "33 MB to download, 15 MB to keep".

    Args:
        recipe: What decides the installation; another one is no longer right.
    """

    size: ClassVar[str]

    def __init__(self, recipe: Mapping[str, str]) -> None:
        self._installation = Installation(self.name, recipe)

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return self._installation.folder

    @abstractmethod
    def _unfit(self) -> str | None:
        """Why this machine can never run it, in one line with what to do; None: it can."""

    @abstractmethod
    def _lacking(self) -> str | None:
        """Why it cannot be installed here, in one line with what to do; None: it can."""

    @abstractmethod
    def _fill(self, folder: Path, downloads: Path, progress: Callable[[str], None]) -> Mapping[str, str]:
        """Put an installation into an empty folder and tell its versions; see `Installation.make`."""

    @abstractmethod
    def _execute(self, job: Job) -> Execution:
        """Run a model, now that nothing is missing."""

    def _problem(self) -> str | None:
        """Why what is installed cannot be used, in a few words; None: it can."""
        return self._installation.problem()

    def missing(self) -> str | None:
        """Why it cannot run now, in one line with what to do about it; None: it can."""
        if (unfit := self._unfit()) is not None:
            return unfit
        problem = self._problem()
        return problem and (self._lacking() or f"{problem}; install it with --install ({self.size})")

    def install(self, progress: Callable[[str], None]) -> None:
        """Install what is missing into the user's cache folder, whole or not at all.

        Raises:
            RequirementError: It cannot be had, or is not what was expected.
        """
        self._refuse(self._unfit())
        if self._problem() is None:
            return
        self._refuse(self._lacking())
        self._installation.make(lambda folder, downloads: self._fill(folder, downloads, progress), progress)

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
        """Run a model in a process of its own; see `Environment.run`."""
        self._refuse(self.missing())
        with prepared(model, feeds, outputs=outputs, plain=plain, config=config, timeout_s=timeout_s) as job:
            return self._execute(job)

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            message = f"{self.name}: {reason}"
            raise RequirementError(message)


def unfit_host(wanted: str = "Linux on x86-64", glibc: tuple[int, int] = (0, 0)) -> str | None:
    """Why this machine is not Linux on x86-64 with a C library as new as that; None: it is.

    Args:
        wanted: What would do, for the message.
        glibc: The oldest version that will do.
    """
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        return f"it needs {wanted}, and this is {system} on {machine}; use such a machine"
    library, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if glibc > (0, 0) and (library != "glibc" or numbers < glibc):
        found = f"glibc {version}" if library == "glibc" else "another C library"
        return f"it needs glibc {glibc[0]}.{glibc[1]} or newer, and this is {found}; use a newer system"
    return None
