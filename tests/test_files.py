from __future__ import annotations

import contextlib
import os
import stat

import pytest

from onnxcomp.errors import OutputError
from onnxcomp.files import check_writable, replaced_whole, same_file


def test_replaces_a_file_whole(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")

    with replaced_whole(target) as [file]:
        file.write(b"new")
        assert target.read_bytes() == b"old"

    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_files_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]

    with contextlib.suppress(KeyError), replaced_whole(*paths) as [one, _]:
        one.write(b"half")
        raise KeyError

    assert os.listdir(tmp_path) == []


def test_says_what_could_not_be_written(tmp_path):
    message = r"out: cannot be written \(No space left on device\)"
    with pytest.raises(OutputError, match=message), replaced_whole(tmp_path / "out"):
        raise OSError(28, "No space left on device")

    assert os.listdir(tmp_path) == []


def test_a_new_file_has_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        with replaced_whole(tmp_path / "out") as [file]:
            file.write(b"x")
    finally:
        os.umask(old)

    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_refuses_to_write_over_an_input(tmp_path):
    source, link = tmp_path / "in", tmp_path / "link"
    source.write_bytes(b"x")
    link.symlink_to(source)

    for path in (source, link, tmp_path / "." / "in"):
        with pytest.raises(OutputError, match="the output would overwrite the input; choose another name with -o"):
            check_writable(path, inputs=(source,))


def test_refuses_a_folder_as_output(tmp_path):
    with pytest.raises(OutputError, match="the output is a folder, expected a file name"):
        check_writable(tmp_path)


def test_refuses_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        check_writable(tmp_path / "nowhere" / "out")


def test_refuses_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxcomp.files.os.access", lambda folder, mode: False)  # (root may write anywhere)

    with pytest.raises(OutputError, match="cannot be written to"):
        check_writable(tmp_path / "out")


def test_files_that_do_not_exist_are_not_the_same(tmp_path):
    assert not same_file(tmp_path / "a", tmp_path / "a")


def test_refuses_a_pipe_and_a_device_which_it_would_replace_with_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe: the output is a device or a pipe, which a file would replace"):
        check_writable(tmp_path / "pipe")


def test_refuses_a_name_for_an_open_file_such_as_that_of_standard_output(tmp_path):
    with (tmp_path / "printed").open("w") as file:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises(OutputError, match="stdout: the output is a device or a pipe"):
            check_writable(tmp_path / "stdout")
