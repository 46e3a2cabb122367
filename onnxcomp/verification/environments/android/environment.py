"""The layer `android`: installs the Android build and runs models in it, in a process of their own."""

from __future__ import annotations

import platform
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from onnxcomp.errors import RequirementError, RuntimeFailure, WorkerDied
from onnxcomp.resume import cache_folder
from onnxcomp.runtime import Feed
from onnxcomp.verification.environments.android import installing
from onnxcomp.verification.environments.base import Environment, Execution, executed_nodes
from onnxcomp.verification.environments.tensor_files import read_tensors, write_tensors

__all__ = ["Android"]

_OLDEST_GLIBC = (2, 34)  # with stat and the functions of threads in the one library
_REFUSED = 3  # runner.c
_SHOWN_CHARACTERS = 500
_NOISE = r"Load model from .*? failed:\s*|\S+\.(?:cc|h):\d+ [^()]*\([^()]*\)(?: const)? "


class Android(Environment):
    """ONNX Runtime as it is built for Android on x86-64, with XNNPACK before the CPU provider.

    The library is that of an app. Functions of Android's C library that Linux lacks or has otherwise are stood in for;
    all computation is the library's own. A phone's processor takes int8 activations as they are; for the CPU provider
    to do so here too, give `config` ``{"session.qdqisint8allowed": "1"}``.
    """

    name: ClassVar[str] = "android"
    description: ClassVar[str] = "the Android build"
    provider: ClassVar[str] = "XnnpackExecutionProvider"

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return cache_folder() / "environments" / self.name

    def missing(self) -> str | None:
        """Why it cannot run now, in one line with what to do about it; None: it can."""
        unfit = _unfit()
        if unfit is not None:
            return unfit
        broken = installing.broken(self.folder)
        if broken is None:
            return None
        lacking = installing.tool_lacking()
        return lacking or f"{broken}; install it (150 MB to download, 40 MB to keep)"

    def install(self, progress: Callable[[str], None]) -> None:
        """Install what is missing into the user's cache folder, whole or not at all.

        Raises:
            RequirementError: This machine cannot run it, a tool is not there or failed, or what was downloaded is not
                what was expected.
        """
        unfit = _unfit()
        if unfit is not None:
            message = f"{self.name}: {unfit}"
            raise RequirementError(message)
        installing.install(self.folder, progress)

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
        """Run a model in a process of its own.

        Args:
            model: An .onnx or .ort file.
            feeds: The inputs, one mapping a run. Tensors only. The nodes of the first run are those counted.
            outputs: The outputs to give; None: all.
            plain: Only the CPU provider of the same build.
            config: Session configuration entries.
            timeout_s: The longest that the whole may take, in seconds.

        Raises:
            RequirementError: It is not installed.
            RuntimeFailure: It refused the model or a feed; the message is its own, in one line.
            WorkerDied: It crashed or did not end in time.
        """
        missing = self.missing()
        if missing is not None:
            message = f"{self.name}: {missing}"
            raise RequirementError(message)
        with tempfile.TemporaryDirectory(prefix="onnxcomp-android-") as temporary:
            work = Path(temporary)
            _write_feeds(work / "feeds", feeds, model)
            command = _command(self.folder, model, work, "" if plain else "XNNPACK", outputs or (), config or {})
            version = _call(command, model, work, timeout_s)
            profiles = list(work.glob("profile*.json"))
            return Execution(
                outputs=read_tensors(work / "answer"),
                nodes=executed_nodes(profiles[0]) if feeds else {},
                runtime=f"ONNX Runtime {version}, Android, x86-64",
                versions={"onnxruntime": version, installing.PACKAGE: installing.PACKAGE_VERSION},
            )


def _unfit() -> str | None:
    """Why this machine can never run it; None: it can."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        return f"needs Linux on x86_64, and this is {system} on {machine}; verify on such a machine"
    library, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if library != "glibc" or numbers < _OLDEST_GLIBC:
        oldest = ".".join(map(str, _OLDEST_GLIBC))
        return f"needs glibc {oldest} or later, and this is {library or 'another C library'} {version}".rstrip()
    return None


def _write_feeds(path: Path, feeds: Sequence[Feed], model: Path) -> None:
    try:
        write_tensors(path, feeds)
    except ValueError as error:
        message = f"{model}: {error}"
        raise RuntimeFailure(message) from error


def _command(
    folder: Path, model: Path, work: Path, provider: str, outputs: Sequence[str], config: Mapping[str, str]
) -> list[str]:
    """The runner's command line."""
    options = ["-p", provider] if provider else []
    for key, value in config.items():
        options += ["-c", f"{key}={value}"]
    for output in outputs:
        options += ["-o", output]
    files = [folder / installing.LIBRARY, model.absolute(), work / "feeds", work / "answer", work / "profile"]
    return [str(folder / installing.RUNNER), *options, "--", *map(str, files)]


def _call(command: Sequence[str], model: Path, work: Path, timeout_s: float) -> str:
    """Run the runner in a folder; give the version of ONNX Runtime that it tells."""
    try:
        done = subprocess.run(
            command, cwd=work, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        message = f"{model}: ONNX Runtime's Android build did not end within {timeout_s:g} s"
        raise WorkerDied(message) from error
    except OSError as error:
        message = f"{model}: {command[0]} cannot be started ({error.strerror}); programs must be allowed to run there"
        raise WorkerDied(message) from error
    if done.returncode == _REFUSED:
        text = (work / "answer").read_text(encoding="utf-8", errors="replace")
        message = f"{model}: {_one_line(text)}"
        raise RuntimeFailure(message)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        message = f"{model}: ONNX Runtime's Android build {_ended(done.returncode)}: {_one_line(lines[-1])}"
        raise WorkerDied(message)
    return done.stdout.strip()


def _ended(code: int) -> str:
    """How a process ended.

    >>> _ended(-11), _ended(2)
    ('was ended by SIGSEGV', 'ended with 2')
    """
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by the signal {-code}"


def _one_line(text: str) -> str:
    r"""What ONNX Runtime or a process said, in one line, without places in ONNX Runtime's source.

    >>> _one_line("Load model from m.onnx failed:/src/core/model.cc:193 onnxruntime::Model::Model(Proto &&)\n Too new")
    'Too new'
    """
    line = re.sub(_NOISE, "", " ".join(text.split()))
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
