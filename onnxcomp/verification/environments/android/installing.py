"""Puts the Android build of ONNX Runtime and a program that runs it into a folder."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from onnxcomp.verification.environments.android.elf import without_android
from onnxcomp.verification.environments.tools import fetch_npm, lacking_npm, run_tool

__all__ = ["LIBRARY", "PACKAGE", "PACKAGE_VERSION", "RUNNER", "fetch", "fill", "lacking", "recipe"]

PACKAGE, PACKAGE_VERSION = "com.github.asus4.onnxruntime", "0.4.9"
"""Of npm: ONNX Runtime for Unity, under the MIT licence. Few builds for Android have XNNPACK in them; this one has."""
PACKAGE_SHA256 = "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d"
ARCHIVE = "package/Plugins/Android/onnxruntime.aar"
LIBRARY_MEMBER = "jni/x86_64/libonnxruntime.so"

LIBRARY, RUNNER = "libonnxruntime.so", "runner"

RENAMED = (
    "fflush",
    "fileno",
    "fprintf",
    "fputc",
    "fputs",
    "fwrite",
    "llroundl",
    "pathconf",
    "pthread_sigmask",
    "realpath",
    "sigfillset",
    "strerror_r",
    "strtold_l",
    "sysconf",
    "vfprintf",
)
"""What shim.c has under the same name with a capital first letter."""

_SOURCES = Path(__file__).parent
_COMPILE = ("-std=c11", "-O2", "-rdynamic")
_LIBRARIES = ("-Wl,--no-as-needed", "-lm", "-ldl", "-lpthread")  # the library finds them through the runner alone


def recipe() -> dict[str, str]:
    """What decides the result: the package, and the files that patch, stand in for Android and run it."""
    digest = hashlib.sha256(" ".join((*RENAMED, *_COMPILE, *_LIBRARIES)).encode())
    for name in ("elf.py", "runner.c", "shim.c"):
        digest.update((_SOURCES / name).read_bytes())
    return {PACKAGE: PACKAGE_VERSION, "sources": digest.hexdigest()[:12]}


def lacking() -> str | None:
    """What must be installed before this can be, in one line; None: nothing."""
    if _compiler() is None:
        return "there is no C compiler to build its runner; install gcc (apt-get install gcc libc6-dev)"
    return lacking_npm()


def fill(folder: Path, downloads: Path, progress: Callable[[str], None]) -> dict[str, str]:
    """Fill the folder, and tell the versions.

    Raises:
        RequirementError: A tool failed, or what was downloaded is not what was expected.
    """
    progress(f"android: fetching {PACKAGE} {PACKAGE_VERSION} (150 MB)")
    package = fetch(downloads)
    progress("android: unpacking and patching ONNX Runtime's Android build")
    (folder / LIBRARY).write_bytes(without_android(_unpack(package, downloads / "headers"), RENAMED))
    progress("android: compiling its runner")
    compiler = _compiler()
    assert compiler is not None
    sources = [str(_SOURCES / name) for name in ("runner.c", "shim.c")]
    headers = ["-I", str(downloads / "headers")]
    run_tool([compiler, *_COMPILE, *headers, "-o", str(folder / RUNNER), *sources, *_LIBRARIES])
    return {PACKAGE: PACKAGE_VERSION}


def fetch(folder: Path) -> Path:
    """Download the package and check it."""
    return fetch_npm(f"{PACKAGE}@{PACKAGE_VERSION}", PACKAGE_SHA256, folder)


def _unpack(package: Path, headers: Path) -> bytes:
    """Write the C headers and give the library. Every name is fixed or stripped of its folders."""
    headers.mkdir()
    with tarfile.open(package) as outer:
        member = outer.extractfile(ARCHIVE)
        assert member is not None, "the package is the one that is pinned"
        archive = io.BytesIO(member.read())
    with zipfile.ZipFile(archive) as inner:
        for name in inner.namelist():
            if name.startswith("headers/") and not name.endswith("/"):
                (headers / Path(name).name).write_bytes(inner.read(name))
        return inner.read(LIBRARY_MEMBER)


def _compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")
