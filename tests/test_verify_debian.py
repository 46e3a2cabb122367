"""Debian's packages are fetched by an apt that leaves the system alone, and unpacked."""

from __future__ import annotations

import io
import os
import tarfile

import pytest

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments import debian
from tests.deployed import program

URIS = """\
'https://third.example/tools/dists/bookworm/main/binary-amd64/Packages.gz' third_Packages 0
'http://debian.example/debian/dists/bookworm/InRelease' debian_InRelease 0
'http://debian.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' debian_Packages 0
'http://debian.example/debian-security/dists/bookworm-security/main/binary-amd64/Packages.xz' security_Packages 0
"""

APT = """\
if [ "$2" = --print-uris ]; then cat "$(dirname "$0")/uris"; exit; fi
echo "$@" >> "$(dirname "$0")/calls"
if [ "$1" = update ]; then cp "$APT_CONFIG" sources.list "$(dirname "$0")"; exit; fi
for package in qemu-user:amd64 libc6:arm64; do echo "deb" > "${package%:*}_1%3a10.0.13_${package#*:}.deb"; done
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder with an apt-get of our own, before all others."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "uris").write_text(URIS)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    program(folder, "apt-get", APT)
    program(folder, "dpkg-deb", "exit 1")
    keyring = folder / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(debian, "_KEYRING", keyring)
    return folder


def test_packages_come_from_where_the_system_has_debian_s_and_are_checked_by_its_keys(tools, tmp_path):
    files = debian.packages(tmp_path / "work", ["qemu-user:amd64", "libc6:arm64"])
    source = f"deb [arch=amd64,arm64 signed-by={tools}/keyring.gpg] http://debian.example/debian/ trixie main\n"
    assert (tools / "sources.list").read_text() == source
    assert {name: path.name for name, path in files.items()} == {
        "qemu-user:amd64": "qemu-user_1%3a10.0.13_amd64.deb",
        "libc6:arm64": "libc6_1%3a10.0.13_arm64.deb",
    }


def test_apt_keeps_to_a_folder_of_its_own_and_takes_nothing_unsigned(tools, tmp_path):
    work = tmp_path / "work"
    debian.packages(work, ["qemu-user:amd64", "libc6:arm64"])
    settings = dict(line.rstrip(";").split(" ", 1) for line in (tools / "apt.conf").read_text().splitlines())
    for name in ("Dir::State", "Dir::State::status", "Dir::Cache", "Dir::Etc::sourcelist", "Dir::Log"):
        assert settings[name].startswith(f'"{work}'), name
    assert settings["Dir::Etc::sourceparts"] == '"/dev/null"'
    assert settings["Acquire::AllowInsecureRepositories"] == '"false"'
    assert settings["APT::Get::AllowUnauthenticated"] == '"false"'


def test_a_package_that_did_not_come_is_told(tools, tmp_path):
    with pytest.raises(RequirementError, match="gave 0 files of the package libffi8 for arm64, expected 1"):
        debian.packages(tmp_path / "work", ["libffi8:arm64"])


def test_apt_s_own_reason_is_told(tools, tmp_path):
    program(tools, "apt-get", APT.replace('echo "$@"', 'echo "E: not signed" >&2; exit 100; echo'))
    with pytest.raises(RequirementError, match="apt-get update failed with exit code 100: E: not signed"):
        debian.packages(tmp_path / "work", ["libc6:arm64"])


def test_nothing_is_lacking_where_debian_s_packages_can_be_had(tools):
    assert debian.lacking_tools() is None


def test_a_system_without_debian_s_packages_is_told(tools):
    (tools / "uris").write_text(URIS.replace("bookworm", "noble"))
    assert debian.lacking_tools() == (
        "apt has no source of Debian's packages here; use Debian 12 or later, or a container of it"
    )


def test_a_system_without_apt_is_told(tools, monkeypatch):
    monkeypatch.setenv("PATH", str(tools / "none"))
    assert "there is no apt-get" in (debian.lacking_tools() or "")


def test_a_system_without_debian_s_keys_is_told(tools):
    (tools / "keyring.gpg").unlink()
    assert "install debian-archive-keyring" in (debian.lacking_tools() or "")


@pytest.fixture
def package(tools, tmp_path):
    """A package file, made so that dpkg-deb has only to print it."""
    path = tmp_path / "qemu.deb"
    with tarfile.open(path, "w") as archive:
        for name in ("./usr/bin/qemu-arm", "./usr/bin/qemu-aarch64", "./usr/bin/qemu-x86_64"):
            member = tarfile.TarInfo(name)
            member.size = 300_000
            archive.addfile(member, io.BytesIO(name.ljust(300_000).encode()))
    program(tools, "dpkg-deb", 'if [ "$1" = --field ]; then echo "1:10.0.13+ds-0+deb13u1"; else cat "$2"; fi')
    return path


def test_one_program_is_unpacked_of_a_package(package, tmp_path):
    emulator = tmp_path / "qemu-aarch64"
    debian.unpack_file(package, "usr/bin/qemu-aarch64", emulator)
    assert emulator.read_text().rstrip() == "./usr/bin/qemu-aarch64"
    assert emulator.stat().st_size == 300_000
    assert os.access(emulator, os.X_OK)


def test_a_program_that_is_not_in_the_package_is_told(package, tmp_path):
    with pytest.raises(RequirementError, match=r"qemu\.deb: there is no usr/bin/qemu-sparc in it"):
        debian.unpack_file(package, "usr/bin/qemu-sparc", tmp_path / "qemu-sparc")


def test_a_package_that_is_cut_off_is_told(package, tmp_path):
    package.write_bytes(package.read_bytes()[:400_000])
    with pytest.raises(RequirementError, match=r"qemu\.deb: .* it is broken"):
        debian.unpack_file(package, "usr/bin/qemu-aarch64", tmp_path / "qemu-aarch64")
    assert not (tmp_path / "qemu-aarch64").exists()


def test_the_version_is_the_program_s_own(package):
    assert debian.package_version(package) == "10.0.13"
