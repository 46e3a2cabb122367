from __future__ import annotations

import gc
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import ModelError, OutputError
from onnxcomp.weights import (
    ArrayBlob,
    FileBlob,
    LazyWeight,
    SparseWeight,
    Spool,
    check_tensor,
    external_blob,
    numpy_dtype,
    stored_bytes,
)


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 64)
    return path


# --- blobs ------------------------------------------------------------------------------------------------------------


def test_a_file_blob_is_a_range_of_its_file(data_file):
    blob = FileBlob(data_file, 10, 300)
    wanted = data_file.read_bytes()[10:310]

    assert b"".join(bytes(chunk) for chunk in blob.chunks()) == wanted
    assert bytes(blob.buffer()) == wanted
    assert blob.digest == hashlib.sha256(wanted).hexdigest() == ArrayBlob(wanted).digest


def test_a_file_blob_comes_in_small_chunks(data_file, monkeypatch):
    monkeypatch.setattr("onnxcomp.weights.CHUNK_BYTES", 100)

    assert [len(chunk) for chunk in FileBlob(data_file, 0, 250).chunks()] == [100, 100, 50]


def test_a_file_blob_cannot_be_written_to(data_file):
    weight = LazyWeight(TensorProto(data_type=TensorProto.FLOAT, dims=[4]), FileBlob(data_file, 0, 16))

    with pytest.raises(ValueError, match="read-only"):
        weight.load()[0] = 1


def test_an_empty_range_of_a_file_is_empty(data_file):
    assert bytes(FileBlob(data_file, len(data_file.read_bytes()), 0).buffer()) == b""


def test_a_file_that_became_shorter_is_an_error(data_file):
    blob = FileBlob(data_file, 0, 1 << 20)

    with pytest.raises(ModelError, match="the file became shorter while it was read"):
        list(blob.chunks())


@pytest.mark.parametrize("read", [lambda blob: list(blob.chunks()), lambda blob: blob.buffer(), lambda b: b.part(0, 8)])
def test_a_file_that_was_written_to_is_not_read_as_if_it_were_the_same(read, data_file):
    blob = FileBlob(data_file, 0, 256)
    data_file.write_bytes(bytes(range(256)) * 32)

    with pytest.raises(ModelError, match=r"data\.bin: has changed since it was first read; leave it as it is"):
        read(blob)


def test_a_file_that_is_gone_is_told_in_a_line(data_file):
    blob = FileBlob(data_file, 0, 256)
    data_file.unlink()

    with pytest.raises(ModelError, match=r"data\.bin: cannot be read any more \(No such file or directory\); leave it"):
        blob.buffer()


def test_blobs_of_one_place_have_one_key(data_file):
    assert FileBlob(data_file, 0, 8).key == FileBlob(data_file, 0, 8).key
    assert FileBlob(data_file, 0, 8).key != FileBlob(data_file, 8, 8).key
    assert ArrayBlob(b"same").key == ArrayBlob(b"same").key != ArrayBlob(b"other").key


# --- types and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("FLOAT", (3, 5), 60),
        ("INT4", (3,), 2),
        ("UINT4", (4,), 2),
        ("INT2", (5,), 2),
        ("BOOL", (), 1),
        ("DOUBLE", (0, 9), 0),
    ],
)
def test_knows_how_many_bytes_a_tensor_takes(name, dims, expected):
    assert stored_bytes(dims, getattr(TensorProto, name)) == expected


def test_refuses_an_element_type_that_onnx_does_not_know():
    with pytest.raises(ModelError, match="element type 77, which ONNX does not know"):
        numpy_dtype(77)


@given(hnp.arrays(st.sampled_from(["float32", "int8", "float16", "bool", "int64"]), hnp.array_shapes(min_dims=0)))
def test_any_good_tensor_passes_the_check_in_either_form(array):
    tensor = numpy_helper.from_array(array, "t")
    check_tensor(tensor)

    check_tensor(helper.make_tensor("t", tensor.data_type, array.shape, array.reshape(-1)))


@pytest.mark.parametrize("name", ["INT4", "UINT2", "COMPLEX64", "BFLOAT16", "FLOAT8E5M2"])
def test_tensors_of_rare_types_pass_the_check(name):
    check_tensor(helper.make_tensor("t", getattr(TensorProto, name), [5], [1, 0, 1, 1, 0]))


# --- lazy values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["INT4", "UINT4"])
def test_reads_packed_types_from_a_file(name, tmp_path):
    tensor = helper.make_tensor("t", getattr(TensorProto, name), [5], [1, 2, 3, 4, 5])
    packed = numpy_helper.from_array(numpy_helper.to_array(tensor), "t").raw_data
    (tmp_path / "w.bin").write_bytes(packed)
    stub = TensorProto(name="t", data_type=tensor.data_type, dims=[5])
    stub.external_data.add(key="location", value="w.bin")

    blob = external_blob(stub, tmp_path)

    np.testing.assert_array_equal(LazyWeight(stub, blob).load().astype(int), [1, 2, 3, 4, 5])


def test_the_whole_file_is_the_tensor_where_no_range_is_given(tmp_path):
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype="<f4").tobytes())
    stub = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2, 2])
    stub.external_data.add(key="location", value="w.bin")

    np.testing.assert_array_equal(LazyWeight(stub, external_blob(stub, tmp_path)).load(), [[0, 1], [2, 3]])


@pytest.mark.parametrize("indices", [[1, 3], [[0, 1], [1, 1]]])
def test_reads_a_sparse_tensor_as_a_dense_one(indices):
    values = numpy_helper.from_array(np.array([5, 7], np.int32), "s")
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(indices)), [2, 2])

    np.testing.assert_array_equal(SparseWeight(tensor).load(), [[0, 5], [0, 7]])


# --- the spool --------------------------------------------------------------------------------------------------------


@given(parts=st.lists(st.binary(max_size=40), max_size=5))
def test_a_spool_gives_back_what_was_put_in(parts: list[bytes]):
    spool = Spool()

    blobs = [spool.add(part) for part in parts]

    assert [b"".join(map(bytes, blob.chunks())) for blob in blobs] == parts
    assert [bytes(blob.buffer()) for blob in blobs] == parts
    assert [blob.digest for blob in blobs] == [hashlib.sha256(part).hexdigest() for part in parts]
    assert len({blob.key for blob in blobs if blob.nbytes}) == sum(map(bool, parts))


def test_a_spool_is_closed_with_its_last_blob():
    spool = Spool()
    file, blob = spool.file, spool.add(b"abc")
    del spool

    assert bytes(blob.buffer()) == b"abc"
    del blob
    gc.collect()

    assert file.closed


def test_a_spool_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    blob = Spool().add(b"abc")

    assert blob.nbytes == 3
    assert list(tmp_path.iterdir()) == []


def test_a_spool_without_room_says_what_to_do(monkeypatch):
    class FullFile:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            """Nothing to close."""

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: FullFile())

    with pytest.raises(OutputError, match=r"new weights cannot be written \(No space left on device\); set TMPDIR"):
        Spool().add(b"abc")
