"""Puts the Android build of ONNX Runtime and a program that runs it into a folder."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments.android.elf import without_android

__all__ = ["LIBRARY", "PACKAGE", "PACKAGE_VERSION", "RUNNER", "broken", "install", "tool_lacking"]

PACKAGE, PACKAGE_VERSION = "com.github.asus4.onnxruntime", "0.4.9"
"""Of npm: ONNX Runtime for Unity, under the MIT licence. Few builds for Android have XNNPACK in them; this one has."""
PACKAGE_SHA256 = "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d"
ARCHIVE = "package/Plugins/Android/onnxruntime.aar"
LIBRARY_MEMBER = "jni/x86_64/libonnxruntime.so"

LIBRARY, RUNNER = "libonnxruntime.so", "runner"
RECORD = "installed.json"

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

_PINNED = f"{PACKAGE}@{PACKAGE_VERSION}"
_SOURCES = Path(__file__).parent
_COMPILE = ("-std=c11", "-O2", "-rdynamic")
_LIBRARIES = ("-Wl,--no-as-needed", "-lm", "-ldl", "-lpthread")  # the library finds them through the runner alone
_COMMAND_TIMEOUT_S = 900.0
_SAID_CHARACTERS = 300


def tool_lacking() -> str | None:
    """What must be installed before this can be, in one line; None: nothing."""
    if _compiler() is None:
        return "needs a C compiler to build its runner: install gcc (apt-get install gcc libc6-dev)"
    if shutil.which("npm") is None:
        return "needs npm to download ONNX Runtime's Android build: install it (apt-get install npm)"
    return None


def broken(folder: Path) -> str | None:
    """What is wrong with an installation, in a few words; None: it is whole, and of this version of onnxcomp."""
    if not folder.is_dir():
        return "it is not installed"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["made of"] != _made_of():
            return "what is installed was made by another version of onnxcomp"
        changed = [name for name in (LIBRARY, RUNNER) if _sha256(folder / name) != record["files"][name]]
    except (OSError, ValueError, KeyError, TypeError):
        return f"what is installed in {folder} is broken"
    return f"what is installed in {folder} is broken ({changed[0]} was changed)" if changed else None


def install(folder: Path, progress: Callable[[str], None]) -> None:
    """Make the folder, whole or not at all; a broken one is made anew.

    Raises:
        RequirementError: A tool is not there or failed, or what was downloaded is not what was expected.
    """
    if broken(folder) is None:
        return
    lacking = tool_lacking()
    if lacking is not None:
        message = f"android: {lacking}"
        raise RequirementError(message)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".android-") as temporary:
            built = Path(temporary) / "built"
            built.mkdir()
            _build(Path(temporary), built, progress)
            shutil.rmtree(folder, ignore_errors=True)
            built.rename(folder)
    except OSError as error:
        if broken(folder) is None:
            return  # another process was quicker
        message = (
            f"android: {folder} cannot be written ({error.strerror or error}); free some space, or set XDG_CACHE_HOME"
        )
        raise RequirementError(message) from error


def _build(temporary: Path, built: Path, progress: Callable[[str], None]) -> None:
    progress(f"downloading {_PINNED} from npm (150 MB)")
    package = _download(temporary)
    progress("unpacking and patching ONNX Runtime's Android build")
    (built / LIBRARY).write_bytes(without_android(_unpack(package, temporary / "headers"), RENAMED))
    progress("compiling its runner")
    compiler = _compiler()
    assert compiler is not None
    sources = [str(_SOURCES / name) for name in ("runner.c", "shim.c")]
    output = str(built / RUNNER)
    _call([compiler, *_COMPILE, "-I", str(temporary / "headers"), "-o", output, *sources, *_LIBRARIES])
    record = {"made of": _made_of(), "files": {name: _sha256(built / name) for name in (LIBRARY, RUNNER)}}
    (built / RECORD).write_text(json.dumps(record), encoding="utf-8")


def _download(temporary: Path) -> Path:
    """Download the package and check it."""
    folder = temporary / "package"
    folder.mkdir()
    # A cache of its own, since 150 MB would stay in the user's.
    options = ["--pack-destination", str(folder), "--cache", str(temporary / "npm"), "--loglevel=error"]
    _call(["npm", "pack", _PINNED, *options])
    found = list(folder.glob("*.tgz"))
    if len(found) != 1:
        message = f"android: npm pack {_PINNED} gave {len(found)} files, expected 1"
        raise RequirementError(message)
    digest = _sha256(found[0])
    if digest != PACKAGE_SHA256:
        message = (
            f"android: {_PINNED} from npm has the sha256 {digest}, expected {PACKAGE_SHA256}; "
            "nothing of it was used: try again, or tell onnxcomp's maintainers"
        )
        raise RequirementError(message)
    return found[0]


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


def _call(command: Sequence[str]) -> None:
    """Run a command that makes something.

    Raises:
        RequirementError: It failed; the message has the beginning of what it said.
    """
    what = f"android: {' '.join(command[:3])} ..."
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
            timeout=_COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        message = f"{what} did not end within {_COMMAND_TIMEOUT_S:g} s; try again"
        raise RequirementError(message) from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "it said nothing"
        message = f"{what} ended with {done.returncode}: {said[:_SAID_CHARACTERS]}"
        raise RequirementError(message)


def _compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def _made_of() -> str:
    """What decides the result: the package, and the files that patch, stand in for Android and run it."""
    digest = hashlib.sha256(" ".join((PACKAGE_SHA256, *RENAMED, *_COMPILE, *_LIBRARIES)).encode())
    for name in ("elf.py", "runner.c", "shim.c"):
        digest.update((_SOURCES / name).read_bytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
