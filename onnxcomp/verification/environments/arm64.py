"""The layer `arm64`: ONNX Runtime's build for 64-bit ARM on Linux, emulated where this machine is another."""

from __future__ import annotations

import json
import platform
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments import debian
from onnxcomp.verification.environments.emulated import QEMU_PACKAGE, EmulatedProcessor, unpack_qemu
from onnxcomp.verification.environments.foreign import ForeignPython, present_python
from onnxcomp.verification.environments.installed import unfit_host
from onnxcomp.verification.environments.tools import fetch_wheel, lacking_pip

__all__ = ["Arm64"]

CPU = "cortex-a76"
"""A processor as in phones of 2019: dot products, no matrix products of int8. Others were seen to give the same."""

_PYTHON = "3.13"  # Debian's own in that suite
_PACKAGES = (
    f"python{_PYTHON}-minimal:arm64",
    f"libpython{_PYTHON}-minimal:arm64",
    f"libpython{_PYTHON}-stdlib:arm64",
    "libc6:arm64",
    "libexpat1:arm64",  # of Python
    "libffi8:arm64",  # of its ctypes, which numpy imports
    "libgcc-s1:arm64",
    "libstdc++6:arm64",  # of the wheels
    "zlib1g:arm64",
)
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")  # in Debian 13: glibc 2.41
_NUMPY = "2.4.6"
_TESTED = "1.32.0"
_HASHES = {
    f"numpy=={_NUMPY}": "72fbe16c6fac95aedf5937fa873445cec2110be35d8a4e9433d7501fd98dae6b",
    f"onnxruntime=={_TESTED}": "54d02baff2df38777b4c3cc7af326406fe8b8a48f54720f4c446d2d327920a79",
}
"""SHA-256 of the wheels. Of another version of ONNX Runtime pip checks the one that the package index gives."""

_ASK_VERSIONS = """
import json, platform, numpy, onnxruntime
print(json.dumps({"python": platform.python_version(), "numpy": numpy.__version__,
                  "onnxruntime": onnxruntime.__version__, "machine": platform.machine()}))
"""


class Arm64(EmulatedProcessor):
    """ONNX Runtime's CPU provider on 64-bit ARM.

    Its kernels are not x86's: int8 activations stay int8, and no product saturates.
    """

    name = "arm64"
    description = "64-bit ARM, Linux"
    size = "137 MB to download, 182 MB to keep"

    def __init__(self) -> None:
        super().__init__({"python": _PYTHON, "numpy": _NUMPY, "onnxruntime": version("onnxruntime")})

    def _present(self) -> ForeignPython | None:
        native = platform.machine().lower() in {"aarch64", "arm64"}
        return present_python("CPU, this 64-bit ARM") if native else None

    def _unfit(self) -> str | None:
        return None if self._present() else unfit_host("a 64-bit ARM, or Linux on x86-64 to emulate one")

    def _lacking(self) -> str | None:
        return lacking_pip() or super()._lacking()

    def _emulated(self, folder: Path, versions: Mapping[str, str]) -> ForeignPython:
        root = folder / "root"
        command = (str(folder / "qemu-aarch64"), "-cpu", CPU, "-L", str(root), str(root / f"usr/bin/python{_PYTHON}"))
        # Nothing of this process's environment: a setting of its Python or its libraries would reach the other one.
        variables = {"PYTHONPATH": str(folder / "site"), "LC_ALL": "C.UTF-8"}
        return ForeignPython(command, variables, f"CPU, Linux arm64 ({CPU} by qemu {versions['qemu']})", versions)

    def _fill(self, folder: Path, downloads: Path, progress: Callable[[str], None]) -> dict[str, str]:
        progress("arm64: fetching qemu and a Python for ARM (Debian packages, 98 MB)")
        packages = debian.packages(downloads / "debian", [QEMU_PACKAGE, *_PACKAGES])
        _unpack_root([packages[package] for package in _PACKAGES], folder / "root")
        qemu = unpack_qemu(packages[QEMU_PACKAGE], folder / "qemu-aarch64")
        progress("arm64: fetching ONNX Runtime and numpy for ARM (39 MB)")
        _unpack_wheels(downloads / "wheels", folder / "site")
        progress("arm64: starting it for the first time")
        return {"qemu": qemu, **_first_start(self._emulated(folder, {"qemu": qemu}))}


def _unpack_root(packages: Sequence[Path], root: Path) -> None:
    """Unpack a system's programs and libraries."""
    for package in packages:
        debian.unpack(package, root)
    (root / "lib").symlink_to("usr/lib")  # where programs look for the loader; a package of its own has the link
    shutil.rmtree(root / "usr/share")  # documentation


def _unpack_wheels(downloads: Path, site: Path) -> None:
    """Fetch the wheels of the installed version of ONNX Runtime, or of the tested one where that has none for ARM."""
    wanted = version("onnxruntime")
    try:
        wheels = [_wheel(downloads, f"onnxruntime=={wanted}")]
    except RequirementError:
        if wanted == _TESTED:
            raise
        wheels = [_wheel(downloads, f"onnxruntime=={_TESTED}")]
    wheels.append(_wheel(downloads, f"numpy=={_NUMPY}"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _wheel(downloads: Path, package: str) -> Path:
    return fetch_wheel(package, _HASHES.get(package), downloads, python=_PYTHON, platforms=_PLATFORMS)


def _first_start(python: ForeignPython) -> dict[str, str]:
    """The versions as they tell themselves; so the installation is known to run before it takes its place."""
    versions: dict[str, str] = json.loads(python.start(_ASK_VERSIONS).splitlines()[-1])
    if versions.pop("machine") != "aarch64":
        message = "the Python that was installed does not run as 64-bit ARM; report this"
        raise RequirementError(message)
    return versions
