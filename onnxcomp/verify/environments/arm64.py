"""The layer `arm64`: ONNX Runtime's build for 64-bit ARM on Linux, emulated where this machine is another."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.runtime import Feed
from onnxcomp.verify.environments import debian
from onnxcomp.verify.environments.base import Environment, Execution
from onnxcomp.verify.environments.foreign import ForeignPython, present_python, run_foreign
from onnxcomp.verify.environments.installation import Installation, check_hash, run_tool

__all__ = ["Arm64"]

CPU = "cortex-a76"
"""A processor as in phones of 2019: dot products, no matrix products of int8. Others were seen to give the same."""

_PYTHON = "3.13"  # Debian's own in that suite
_QEMU = "qemu-user:amd64"
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
    f"numpy-{_NUMPY}": "72fbe16c6fac95aedf5937fa873445cec2110be35d8a4e9433d7501fd98dae6b",
    f"onnxruntime-{_TESTED}": "54d02baff2df38777b4c3cc7af326406fe8b8a48f54720f4c446d2d327920a79",
}
"""SHA-256 of the wheels. Of another version of ONNX Runtime pip checks the one that the package index gives."""

_ASK_VERSIONS = """
import json, platform, numpy, onnxruntime
print(json.dumps({"python": platform.python_version(), "numpy": numpy.__version__,
                  "onnxruntime": onnxruntime.__version__, "machine": platform.machine()}))
"""


class Arm64(Environment):
    """ONNX Runtime's CPU provider on 64-bit ARM.

    Its kernels differ from x86's: int8 activations stay int8, and no product saturates.
    """

    name = "arm64"
    description = "ONNX Runtime for 64-bit ARM on Linux; emulated by qemu where this machine is another"

    def __init__(self) -> None:
        recipe = {"suite": debian.SUITE, "python": _PYTHON, "numpy": _NUMPY, "onnxruntime": version("onnxruntime")}
        self._installation = Installation(self.name, recipe)

    def missing(self) -> str | None:
        """Why it cannot run now; None: it can, and on a 64-bit ARM it always can."""
        if _native():
            return None
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return f"it is emulated on Linux on x86-64 only, and this is {sys.platform} on {platform.machine()}"
        problem = self._installation.problem()
        if problem is None:
            return None
        if importlib.util.find_spec("pip") is None:
            return "there is no pip in this Python to fetch ONNX Runtime with; run `python -m ensurepip`"
        return debian.lacking_tools() or problem

    def install(self, progress: Callable[[str], None]) -> None:
        """Install qemu, a Python for ARM and ONNX Runtime's wheel for it: about 120 MB to fetch, 190 MB on disk."""
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
            python = present_python("CPU, this 64-bit ARM")
        else:
            versions = self._installation.versions()
            python = _emulated(self._installation.folder, versions)
        return run_foreign(python, model, feeds, outputs=outputs, config=config, timeout_s=timeout_s)


def _native() -> bool:
    return platform.machine().lower() in {"aarch64", "arm64"}


def _emulated(folder: Path, versions: Mapping[str, str]) -> ForeignPython:
    root = folder / "root"
    command = (str(folder / "qemu-aarch64"), "-cpu", CPU, "-L", str(root), str(root / f"usr/bin/python{_PYTHON}"))
    # Nothing of this process's environment: a setting of its Python or its libraries would reach the other one.
    variables = {"PYTHONPATH": str(folder / "site"), "LC_ALL": "C.UTF-8"}
    return ForeignPython(command, variables, f"CPU, Linux arm64 ({CPU} by qemu {versions['qemu']})", versions)


def _fill(folder: Path, progress: Callable[[str], None]) -> dict[str, str]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        downloads = Path(name)
        progress("arm64: fetching qemu and a Python for ARM (Debian packages, 100 MB)")
        packages = debian.packages(downloads, [_QEMU, *_PACKAGES])
        root = folder / "root"
        root.mkdir()
        for package in _PACKAGES:
            debian.unpack(packages[package], root)
        (root / "lib").symlink_to("usr/lib")  # where programs look for the loader; a package of its own has the link
        shutil.rmtree(root / "usr/share")  # documentation
        debian.unpack_file(packages[_QEMU], "usr/bin/qemu-aarch64", folder / "qemu-aarch64")
        progress("arm64: fetching ONNX Runtime and numpy for ARM (40 MB)")
        _unpack_wheels(downloads / "wheels", folder / "site")
        qemu = debian.package_version(packages[_QEMU])
    progress("arm64: starting it for the first time")
    return {"qemu": qemu, **_first_start(_emulated(folder, {"qemu": qemu}))}


def _unpack_wheels(downloads: Path, site: Path) -> None:
    """Fetch the wheels of the installed version of ONNX Runtime, or of the tested one where that has none for ARM."""
    wanted = version("onnxruntime")
    try:
        wheels = [_wheel(downloads, "onnxruntime", wanted)]
    except RequirementError:
        if wanted == _TESTED:
            raise
        wheels = [_wheel(downloads, "onnxruntime", _TESTED)]
    wheels.append(_wheel(downloads, "numpy", _NUMPY))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _wheel(downloads: Path, package: str, wanted: str) -> Path:
    platforms = [f"--platform={name}" for name in _PLATFORMS]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={_PYTHON}", *platforms]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *quiet, *options, "--dest", str(downloads)]
    run_tool([*command, f"{package}=={wanted}"])
    [wheel] = downloads.glob(f"{package}-*.whl")
    pinned = _HASHES.get(f"{package}-{wanted}")
    if pinned is not None:
        check_hash(wheel, pinned)
    return wheel


def _first_start(python: ForeignPython) -> dict[str, str]:
    """The versions as they tell themselves; so the installation is known to run before it takes its place."""
    printed = run_tool([*python.command, "-c", _ASK_VERSIONS], variables=python.variables)
    versions: dict[str, str] = json.loads(printed.splitlines()[-1])
    if versions.pop("machine") != "aarch64":
        message = "arm64: the Python that was installed does not run as 64-bit ARM; report this"
        raise RequirementError(message)
    return versions
