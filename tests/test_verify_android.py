"""The layer `android` without a download: patching, installing from a package made here, and a runner that pretends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.errors import RequirementError, RuntimeFailure, WorkerDied
from onnxcomp.verification.environments.android import Android, installing
from onnxcomp.verification.environments.android.elf import without_android
from onnxcomp.verification.environments.tensor_files import write_tensors

SOURCES = Path(installing.__file__).parent
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


# --- patching ---------------------------------------------------------------------------------------------------------


def library(*references: str, names: bytes | None = None, defined: bytes = b"Ort\0") -> bytes:
    """A shared library as far as its dynamic section goes: it needs libc.so, has versions, and refers to names."""
    strings = b"\0libc.so\0" + (names if names is not None else b"".join(name.encode() + b"\0" for name in references))
    offsets = [strings.index(name.encode() + b"\0") for name in references] + [len(strings)]
    symbols = bytes(24) + b"".join(struct.pack("<IBBHQQ", offset, 0x12, 0, 0, 0, 0) for offset in offsets)
    hashes = struct.pack("<IIII", 1, 1 + len(references), 1, 0)
    at = 64 + 2 * 56
    tables = {6: symbols, 5: strings + defined, 0x6FFFFEF5: hashes}
    places = {}
    body = b""
    for tag, table in tables.items():
        places[tag] = at + len(body)
        body += table
    entries = [(1, 1), *places.items(), (0x6FFFFFF0, 1), (0x6FFFFFFE, 1), (0x6FFFFFFF, 1), (14, 1), (0, 0)]
    dynamic = at + len(body)
    body += b"".join(struct.pack("<qQ", *entry) for entry in entries)
    size = at + len(body)
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    return header + load + struct.pack("<IIQQQQQQ", 2, 6, dynamic, dynamic, dynamic, 16, 16, 8) + body


def tags(data: bytes) -> list[int]:
    """The tags of the dynamic section, in order."""
    (place,) = struct.unpack_from("<Q", data, 64 + 56 + 8)
    return [tag for (tag, _) in struct.iter_unpack("<qQ", data[place:])]


def test_references_to_what_differs_get_a_capital_letter_and_others_stay():
    patched = without_android(library("sysconf", "malloc"), ["sysconf", "realpath"])

    assert b"\0Sysconf\0malloc\0Ort\0" in patched
    assert len(patched) == len(library("sysconf", "malloc"))


def test_a_definition_keeps_its_name():
    assert b"\0sysconf\0" in without_android(library("malloc", defined=b"sysconf\0"), ["sysconf"])


def test_needed_libraries_and_versions_are_gone_and_the_rest_of_the_dynamic_section_stays():
    before, after = (tags(data) for data in (library("malloc"), without_android(library("malloc"), [])))

    gone = {1, 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF}
    assert gone <= set(before)
    assert gone.isdisjoint(after)
    assert [tag for tag in before if tag not in gone] == [tag for tag in after if tag != 0x6000001F]


def test_a_name_that_is_the_end_of_another_is_not_changed():
    shared = library("vfprintf", "fprintf", names=b"vfprintf\0")
    with pytest.raises(ValueError, match="'fprintf' is the end of another name, and cannot be changed alone"):
        without_android(shared, ["fprintf"])


@pytest.mark.parametrize(
    "data", [b"", b"MZ", b"\x7fELF\x01\x01" + bytes(100), b"\x7fELF\x02\x01" + bytes(100), library("malloc")[:200]]
)
def test_what_is_no_shared_library_is_refused(data: bytes):
    with pytest.raises(ValueError, match=r"no 64-bit little-endian ELF|no shared library"):
        without_android(data, [])


def test_every_renamed_function_has_its_stand_in_and_no_other():
    text = (SOURCES / "shim.c").read_text(encoding="utf-8")
    stand_ins = re.findall(r"^[a-z_ ]+[ *]([A-Z][a-z_]+)\(", text, re.MULTILINE)
    assert sorted(name[0].lower() + name[1:] for name in stand_ins) == sorted(installing.RENAMED)


FOREIGN = {
    "bionic.c": "int asked(int x) { return x; } int same(int x) { return x; }",
    "app.c": "int asked(int); int same(int); int app(int x) { return asked(x) + same(x); }",
    "host.c": """#include <dlfcn.h>
        #include <stdio.h>
        int Asked(int x) { return 40 * x; } int same(int x) { return 2 * x; }
        int main(int count, char **words) {
            void *app = dlopen(words[1], RTLD_NOW);
            if (!app || count != 2) { puts(dlerror()); return 1; }
            printf("%d\\n", ((int (*)(int))dlsym(app, "app"))(1));
        }""",
    "versions": "LIBC { global: *; };",
}


@NEEDS_GCC
def test_a_library_of_another_system_loads_once_patched_and_calls_the_program_s_functions(tmp_path: Path):
    for name, text in FOREIGN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    def gcc(*words: str) -> None:
        subprocess.run(["gcc", "-fPIC", *words], cwd=tmp_path, check=True)

    gcc("-shared", "bionic.c", "-Wl,--version-script=versions", "-Wl,-soname,libc.so", "-o", "libbionic.so")
    gcc("-shared", "app.c", "-nostdlib", "-L.", "-lbionic", "-o", "app.so")
    gcc("host.c", "-rdynamic", "-o", "host", "-ldl")
    (tmp_path / "libbionic.so").unlink()

    def load(name: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "host"), str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert load("app.so").returncode != 0
    (tmp_path / "patched.so").write_bytes(without_android((tmp_path / "app.so").read_bytes(), ["asked"]))
    assert load("patched.so").stdout == "42\n"


# --- installing -------------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A machine with an npm that has one package, and a gcc that makes one runner."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "cache" / "onnxcomp" / "environments" / "android"

    @property
    def calls(self) -> list[str]:
        """The first words of the commands that were called."""
        path = self.root / "calls"
        return path.read_text(encoding="utf-8").split() if path.exists() else []

    def command(self, name: str, script: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    def runner(self, script: str) -> None:
        """What the compiled runner shall do; $answer and $profile are where it writes."""
        last = "for word; do answer=$profile; profile=$word; done; profile=${profile}_1.json"
        (self.root / "runner.sh").write_text(f"#!/bin/sh\n{last}\n{script}\n", encoding="utf-8")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        Android().install(lambda _: None)


def package() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as inner:
        inner.writestr("headers/onnxruntime_c_api.h", "/* the interface */")
        inner.writestr("jni/x86_64/libonnxruntime.so", library("sysconf", "malloc"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as outer:
        member = tarfile.TarInfo("package/Plugins/Android/onnxruntime.aar")
        member.size = len(archive.getvalue())
        outer.addfile(member, io.BytesIO(archive.getvalue()))
    return packed.getvalue()


NPM = 'echo npm >> {root}/calls; while [ "$1" != --pack-destination ]; do shift; done; cp {root}/package.tgz $2'
GCC = """echo gcc >> {root}/calls
while [ $# -gt 0 ]; do
    case $1 in
        -I) grep -q interface "$2/onnxruntime_c_api.h" || exit 1;;
        -o) cp {root}/runner.sh "$2" && chmod +x "$2";;
    esac
    shift
done"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "package.tgz").write_bytes(package())
    (tmp_path / "runner.sh").write_text("#!/bin/sh\n", encoding="utf-8")
    machine.command("npm", NPM.format(root=tmp_path))
    machine.command("gcc", GCC.format(root=tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(installing, "PACKAGE_SHA256", hashlib.sha256(package()).hexdigest())
    for name, value in (("system", "Linux"), ("machine", "x86_64"), ("libc_ver", ("glibc", "2.36"))):
        monkeypatch.setattr(platform, name, lambda value=value: value)
    return machine


def test_it_is_installed_whole_and_nothing_is_left_beside_it(machine: Machine):
    told: list[str] = []
    assert Android().missing() == "it is not installed; install it (150 MB to download, 40 MB to keep)"

    Android().install(told.append)

    assert Android().missing() is None
    assert sorted(path.name for path in machine.folder.iterdir()) == ["installed.json", "libonnxruntime.so", "runner"]
    assert [path.name for path in machine.folder.parent.iterdir()] == ["android"]
    assert (machine.folder / "libonnxruntime.so").read_bytes() == without_android(
        library("sysconf", "malloc"), ["sysconf"]
    )
    assert [line.split()[0] for line in told] == ["downloading", "unpacking", "compiling"]


def test_installing_again_does_nothing(machine: Machine):
    for _ in range(2):
        Android().install(lambda _: None)

    assert machine.calls == ["npm", "gcc"]


def test_another_package_than_the_pinned_one_is_refused_and_nothing_stays(machine: Machine):
    with (machine.root / "package.tgz").open("ab") as file:
        file.write(b"\0")

    with pytest.raises(RequirementError, match=r"has the sha256 \w{64}, expected \w{64}; nothing of it was used"):
        Android().install(lambda _: None)

    assert machine.calls == ["npm"]
    assert list(machine.folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "script", "told"),
    [
        (
            "npm",
            "echo error >&2; echo no network >&2; exit 7",
            r"npm pack com\S+ \.\.\. ended with 7: error no network",
        ),
        ("npm", "exit 7", r"npm pack com\S+ \.\.\. ended with 7: it said nothing"),
        ("npm", "exit 0", r"npm pack com\S+ gave 0 files, expected 1"),
        (
            "gcc",
            "echo stdio.h: no such file >&2; exit 1",
            r"gcc -std=c11 -O2 \.\.\. ended with 1: stdio.h: no such file",
        ),
    ],
)
def test_a_command_that_fails_is_told_with_what_it_said(machine: Machine, command: str, script: str, told: str):
    machine.command(command, script)

    with pytest.raises(RequirementError, match=rf"^android: \S*{told}"):
        Android().install(lambda _: None)

    assert list(machine.folder.parent.iterdir()) == []


def test_a_command_that_does_not_end_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine.command("npm", "exec sleep 20")
    monkeypatch.setattr(installing, "_COMMAND_TIMEOUT_S", 0.1)
    with pytest.raises(RequirementError, match=r"npm pack .* did not end within 0.1 s; try again"):
        Android().install(lambda _: None)


@pytest.mark.parametrize(("tool", "told"), [("gcc", "apt-get install gcc"), ("npm", "apt-get install npm")])
def test_a_tool_that_is_not_there_is_told_with_how_to_get_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tool: str, told: str
):
    (machine.root / "bin" / tool).unlink()
    monkeypatch.setenv("PATH", str(machine.root / "bin"))

    assert told in str(Android().missing())
    with pytest.raises(RequirementError, match=told):
        Android().install(lambda _: None)


def test_what_is_installed_needs_no_tools_any_more(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    Android().install(lambda _: None)
    monkeypatch.setenv("PATH", "")
    assert Android().missing() is None


def _record(folder: Path, key: str, value: object) -> None:
    path = folder / "installed.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (_empty, "is broken"),
    "no runner": (lambda folder: (folder / "runner").unlink(), "is broken"),
    "changed library": (
        lambda folder: (folder / "libonnxruntime.so").write_bytes(b"other"),
        r"libonnxruntime.so was chan",
    ),
    "no JSON": (lambda folder: (folder / "installed.json").write_text("rubbish", encoding="utf-8"), "is broken"),
    "another form": (lambda folder: _record(folder, "files", None), "is broken"),
    "another version": (lambda folder: _record(folder, "made of", "0"), "made by another version of onnxcomp"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_installation_is_told_and_made_anew(machine: Machine, case: str):
    Android().install(lambda _: None)
    spoil, told = BROKEN[case]
    spoil(machine.folder)

    assert re.search(f"{told}.*; install it", str(Android().missing()))
    with pytest.raises(RequirementError, match=told):
        Android().run(Path("m.onnx"), [])
    Android().install(lambda _: None)
    assert Android().missing() is None


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("system", "Darwin", "needs Linux on x86_64, and this is Darwin on x86_64"),
        ("machine", "aarch64", "needs Linux on x86_64, and this is Linux on aarch64"),
        ("libc_ver", ("glibc", "2.31"), "needs glibc 2.34 or later, and this is glibc 2.31"),
        ("libc_ver", ("", ""), "needs glibc 2.34 or later, and this is another C library"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, value: object, told: str
):
    monkeypatch.setattr(platform, name, lambda: value)

    assert str(Android().missing()).startswith(told)
    with pytest.raises(RequirementError, match=f"^android: {told}"):
        Android().install(lambda _: None)
    assert machine.calls == []


# --- running ----------------------------------------------------------------------------------------------------------


FEEDS = [{"x": np.arange(3, dtype=np.float32)}]

PROFILE = [
    {"cat": "Node", "name": f"{name}_kernel_time", "args": {"provider": provider, "op_name": operator}}
    for name, provider, operator in [
        ("a", "XnnpackExecutionProvider", "Conv"),
        ("b", "XnnpackExecutionProvider", "Conv"),
        ("c", "CPUExecutionProvider", "Relu"),
    ]
]


def test_the_outputs_the_executed_nodes_and_the_versions_come_back(machine: Machine):
    answer = machine.root / "prepared"
    write_tensors(answer, [{"y": np.array([[1.5]], np.float32)}])
    (machine.root / "prepared.json").write_text(json.dumps(PROFILE), encoding="utf-8")
    machine.runner(f"cp {answer} $answer; cp {answer}.json $profile; echo 1.29.0")

    execution = Android().run(Path("m.onnx"), FEEDS)

    np.testing.assert_array_equal(execution.outputs[0]["y"], [[1.5]])
    assert execution.nodes == {"XnnpackExecutionProvider": {"Conv": 2}, "CPUExecutionProvider": {"Relu": 1}}
    assert execution.runtime == "ONNX Runtime 1.29.0, Android, x86-64"
    assert execution.versions == {"onnxruntime": "1.29.0", "com.github.asus4.onnxruntime": "0.4.9"}
    assert list((machine.root / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("plain", "outputs", "config", "told"),
    [
        (False, None, None, ["-p", "XNNPACK", "--"]),
        (True, None, None, ["--"]),
        (True, ["y", "-z"], {"a.b": "1", "c": "d=e"}, ["-c", "a.b=1", "-c", "c=d=e", "-o", "y", "-o", "-z", "--"]),
    ],
)
def test_what_is_asked_for_is_on_the_command_line(machine: Machine, plain, outputs, config, told):
    machine.runner(f'printf "%s\\n" "$@" > {machine.root}/words; kill -9 $$')

    with pytest.raises(WorkerDied):
        Android().run(Path("m.onnx"), FEEDS, plain=plain, outputs=outputs, config=config)

    words = (machine.root / "words").read_text(encoding="utf-8").splitlines()
    assert words[:-5] == told
    assert words[-5:-3] == [str(machine.folder / "libonnxruntime.so"), str(Path("m.onnx").absolute())]
    assert [Path(word).name for word in words[-3:]] == ["feeds", "answer", "profile"]


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        ("printf 'No\\n  such input' > $answer; exit 3", RuntimeFailure, "m.onnx: No such input"),
        ("printf 'a.cc:12 f(int x) Too new' > $answer; exit 3", RuntimeFailure, "m.onnx: Too new"),
        ("echo one >&2; echo undefined symbol >&2; exit 2", WorkerDied, ".* ended with 2: undefined symbol"),
        ("exit 5", WorkerDied, "m.onnx: ONNX Runtime's Android build ended with 5: it said nothing"),
        ("echo aborted >&2; kill -SEGV $$", WorkerDied, ".* was ended by SIGSEGV: aborted"),
        ("exec sleep 20", WorkerDied, "m.onnx: ONNX Runtime's Android build did not end within 0.3 s"),
    ],
)
def test_a_refusal_and_an_end_are_told_in_one_line_and_leave_nothing(
    machine: Machine, script: str, error: type[RuntimeFailure], told: str
):
    machine.runner(script)

    with pytest.raises(RuntimeFailure, match=rf"^{told}$") as caught:
        Android().run(Path("m.onnx"), FEEDS, timeout_s=0.3 if "sleep" in script else 60)

    assert type(caught.value) is error
    assert list((machine.root / "temporary").iterdir()) == []


def test_a_runner_that_cannot_be_started_is_told(machine: Machine):
    Android().install(lambda _: None)
    (machine.folder / "runner").chmod(0o644)
    with pytest.raises(WorkerDied, match=r"^m\.onnx: \S+runner cannot be started \(Permission denied\)"):
        Android().run(Path("m.onnx"), FEEDS)


def test_a_long_message_is_cut(machine: Machine):
    machine.runner("head -c 9000 /dev/zero | tr '\\0' x > $answer; exit 3")
    with pytest.raises(RuntimeFailure, match=r"^m\.onnx: x{499}…$"):
        Android().run(Path("m.onnx"), FEEDS)


def test_feeds_that_are_no_numbers_are_refused(machine: Machine):
    machine.runner("exit 9")
    with pytest.raises(RuntimeFailure, match=r"^m.onnx: 'x' is of the type <U1; only tensors of numbers"):
        Android().run(Path("m.onnx"), [{"x": np.array(["a"])}])
