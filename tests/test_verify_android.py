"""The layer `android` without a download: patching, installing from a package made here, and a runner that pretends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.errors import RequirementError, RuntimeFailure, WorkerDied
from onnxcomp.verification.environments.android import Android, installing
from onnxcomp.verification.environments.android.elf import without_android
from onnxcomp.verification.environments.tensor_files import write_tensors
from tests.deployed import left_over, on_linux_x86, program

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
    def calls(self) -> list[str]:
        """The first words of the commands that were called."""
        path = self.root / "calls"
        return path.read_text(encoding="utf-8").split() if path.exists() else []

    def command(self, name: str, script: str) -> None:
        program(self.root / "bin", name, script)

    def runner(self, script: str) -> None:
        """Install a runner that does this."""
        program(self.root, "runner.sh", script)
        Android().install(print)


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
    on_linux_x86(tmp_path, monkeypatch)
    machine = Machine(tmp_path)
    (tmp_path / "package.tgz").write_bytes(package())
    (tmp_path / "runner.sh").touch()
    (tmp_path / "m.onnx").touch()
    monkeypatch.chdir(tmp_path)
    machine.command("npm", NPM.format(root=tmp_path))
    machine.command("gcc", GCC.format(root=tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(installing, "PACKAGE_SHA256", hashlib.sha256(package()).hexdigest())
    return machine


def test_the_patched_library_and_a_runner_are_installed(machine: Machine):
    told: list[str] = []

    Android().install(told.append)

    folder = Android().folder
    assert sorted(path.name for path in folder.iterdir()) == ["installed.json", "libonnxruntime.so", "runner"]
    assert (folder / "libonnxruntime.so").read_bytes() == without_android(library("sysconf", "malloc"), ["sysconf"])
    assert [line.split()[:2] for line in told] == [
        ["android:", word] for word in ("fetching", "unpacking", "compiling")
    ]
    assert machine.calls == ["npm", "gcc"]
    assert left_over(machine.root) == []


@pytest.mark.parametrize(
    ("command", "script", "told"),
    [
        ("npm", "echo npm error no network >&2; exit 7", "npm pack failed with exit code 7: npm error no network"),
        ("npm", "exit 0", r"com\S+: expected one file to be downloaded, found none"),
        ("npm", f"{NPM}; echo >> $2/package.tgz", r"package\.tgz: its SHA-256 is \w{64}, expected \w{64}"),
        ("gcc", "echo stdio.h: no such file >&2; exit 1", "gcc failed with exit code 1: stdio.h: no such file"),
    ],
)
def test_a_command_that_fails_is_told_and_nothing_stays(machine: Machine, command: str, script: str, told: str):
    machine.command(command, script.replace("{root}", str(machine.root)))

    with pytest.raises(RequirementError, match=rf"^android: {told}"):
        Android().install(print)

    assert left_over(machine.root) == []
    assert not Android().folder.exists()


@pytest.mark.parametrize(("tool", "told"), [("gcc", "apt-get install gcc"), ("npm", "apt-get install npm")])
def test_a_tool_that_is_not_there_is_told_with_how_to_get_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tool: str, told: str
):
    (machine.root / "bin" / tool).unlink()
    monkeypatch.setenv("PATH", str(machine.root / "bin"))

    assert told in str(Android().missing())


def test_other_sources_make_it_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    Android().install(print)
    monkeypatch.setattr(installing, "RENAMED", ("malloc",))

    assert re.match(r"installed for sources \w+, and \w+ is wanted; install it", str(Android().missing()))
    Android().install(print)
    assert Android().missing() is None


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
    machine.runner(f"cp {answer} results; cp {answer}.json profile_1.json; echo 1.29.0")

    execution = Android().run(Path("m.onnx"), FEEDS)

    np.testing.assert_array_equal(execution.outputs[0]["y"], [[1.5]])
    assert execution.nodes == {"XnnpackExecutionProvider": {"Conv": 2}, "CPUExecutionProvider": {"Relu": 1}}
    assert execution.runtime == "ONNX Runtime 1.29.0, Android, x86-64"
    assert execution.versions == {"onnxruntime": "1.29.0", "com.github.asus4.onnxruntime": "0.4.9"}
    assert left_over(machine.root) == []


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
    assert words == [*told, str(Android().folder / "libonnxruntime.so"), str(Path("m.onnx").absolute())]


BUILD = "ONNX Runtime's Android build"


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        ("printf 'No\\n  such input' > refusal; exit 3", RuntimeFailure, f"{BUILD}: No such input"),
        ("printf 'a.cc:12 f(int x) Too new' > refusal; exit 3", RuntimeFailure, f"{BUILD}: Too new"),
        ("echo undefined symbol >&2; exit 2", WorkerDied, f".* {BUILD} died .exit code 2; .*: undefined symbol."),
        ("exit 5", WorkerDied, f"the process of {BUILD} died .exit code 5."),
        ("echo aborted >&2; kill -SEGV $$", WorkerDied, ".* died .SIGSEGV; it last printed: aborted."),
        ("exec sleep 20", WorkerDied, f"{BUILD} was stopped: .* limit of 0.3 s; run fewer samples"),
    ],
)
def test_a_refusal_and_an_end_are_told_in_one_line_and_leave_nothing(
    machine: Machine, script: str, error: type[RuntimeFailure], told: str
):
    machine.runner(script)

    with pytest.raises(RuntimeFailure, match=rf"^m\.onnx: {told}$") as caught:
        Android().run(Path("m.onnx"), FEEDS, timeout_s=0.3 if "sleep" in script else 60)

    assert type(caught.value) is error
    assert left_over(machine.root) == []


def test_a_runner_that_cannot_be_started_is_told(machine: Machine):
    Android().install(print)
    (Android().folder / "runner").chmod(0o644)
    with pytest.raises(WorkerDied, match=rf"^m\.onnx: {BUILD} cannot be started \(Permission denied: \S+runner\)"):
        Android().run(Path("m.onnx"), FEEDS)
