"""Running the programs that fetch and make an environment: npm, pip, apt-get, a compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments.installation import check_hash

__all__ = ["fetch_npm", "fetch_wheel", "lacking_npm", "lacking_pip", "run_tool"]

_TIMEOUT_S = 1800.0  # for a hundred megabytes over a slow line
_REASON_CHARACTERS = 300
_ERROR = re.compile(r"^(?:E:|ERROR|Error|npm (?:error|ERR!))|\berror:")
_NPM_LOG = "A complete log of this run"  # npm's last words tell nothing more


def run_tool(command: Sequence[str], *, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and give what it printed.

    Args:
        command: The program and its arguments.
        cwd: Where it runs.
        variables: All its environment variables; None: those of this process.

    Raises:
        RequirementError: It cannot be started, failed, or did not end in time; with its own reason in one line.
    """
    # The command's name and its first words, without options and paths.
    called = " ".join([Path(command[0]).name, *(word for word in command[1:4] if word.isalpha())])
    try:
        ended = subprocess.run(
            command,
            cwd=cwd,
            env={**(os.environ if variables is None else variables), "LC_ALL": "C.UTF-8"},  # errors in English
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"{called} was stopped: it took longer than {_TIMEOUT_S:g} s; try again"
        raise RequirementError(message) from None
    except OSError as error:
        message = f"{called} cannot be started ({error.strerror}: {command[0]})"
        raise RequirementError(message) from error
    if ended.returncode != 0:
        message = f"{called} failed with exit code {ended.returncode}: {_reason(ended.stdout + ended.stderr)}"
        raise RequirementError(message)
    return ended.stdout


def _reason(printed: str) -> str:
    """The lines that say they are errors, or else the last one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip() and _NPM_LOG not in line]
    errors = [line for line in lines if _ERROR.search(line)] or lines[-1:] or ["it printed nothing"]
    return " ".join(errors)[:_REASON_CHARACTERS]


def lacking_npm() -> str | None:
    """Why npm cannot be run, in one line with what to do; None: it can."""
    return None if shutil.which("npm") else "there is no npm to fetch it with; install it (apt-get install npm)"


def lacking_pip() -> str | None:
    """Why pip cannot be run, in one line with what to do; None: it can."""
    found = importlib.util.find_spec("pip") is not None
    return None if found else "there is no pip in this Python to fetch it with; run `python -m ensurepip`"


def fetch_npm(package: str, sha256: str, folder: Path) -> Path:
    """Fetch a package from npm, running nothing of it.

    Args:
        package: Its name and version, such as ``onnxruntime-web@1.30.0``.
        sha256: The hash of the file.
        folder: Where it is put.

    Raises:
        RequirementError: It cannot be had, or is another one.
    """
    # A cache of its own, since all would stay in the user's.
    options = ["--pack-destination", str(folder), "--cache", str(folder / "npm"), "--loglevel=error"]
    run_tool(["npm", "pack", package, "--ignore-scripts", *options])
    return _checked(folder, "*.tgz", package, sha256)


def fetch_wheel(package: str, sha256: str | None, folder: Path, *, python: str, platforms: Sequence[str]) -> Path:
    """Fetch a wheel with pip.

    Args:
        package: Its name and version, such as ``numpy==2.4.6``.
        sha256: The hash of the file; None: pip checks the one that the package index gives.
        folder: Where it is put.
        python: The version of Python, such as ``3.13``.
        platforms: The platforms that will do, such as ``manylinux_2_28_aarch64``.

    Raises:
        RequirementError: It cannot be had, or is another one.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    chosen = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    run_tool([*pip, *chosen, *(f"--platform={name}" for name in platforms), "--dest", str(folder), package])
    return _checked(folder, f"{package.partition('==')[0].replace('-', '_')}-*.whl", package, sha256)


def _checked(folder: Path, pattern: str, package: str, sha256: str | None) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        message = f"{package}: expected one file to be downloaded, found {len(found) or 'none'}; try again"
        raise RequirementError(message)
    if sha256 is not None:
        check_hash(found[0], sha256)
    return found[0]
