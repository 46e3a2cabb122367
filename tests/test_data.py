from __future__ import annotations

import io
import itertools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcomp.data import Dataset, ImageOptions, InputSpec, input_specs, open_data, parse_shapes
from onnxcomp.data.npy import NpyReader
from onnxcomp.errors import DataError, ModelError, OnnxcompError, OptionError

F32, I64, I32, U8, TEXT = (np.dtype(kind) for kind in (np.float32, np.int64, np.int32, np.uint8, object))
IMAGE = [InputSpec("image", F32, ("batch", 3, 4, 5))]
ROWS = [InputSpec("x", F32, ("N", 2))]
FIXED = [InputSpec("x", F32, (4, 2))]
PAIR = [InputSpec("ids", I64, ("N", "L")), InputSpec("mask", I64, ("N", "L"))]
VOICE = [InputSpec("audio", F32, (None, 6)), InputSpec("state", F32, (2, None, 3)), InputSpec("sr", I64, ())]


def rows(count: int, width: int = 2) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def read(data: Dataset, name: str = "x") -> np.ndarray:
    return np.concatenate([batch.inputs[name][: batch.count] for batch in data.batches()])


# What a model wants


def test_lists_graph_inputs_that_are_not_initializers():
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", None, 3]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("text", TensorProto.STRING, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])],
    )

    specs = input_specs(helper.make_model(graph))

    assert specs == [InputSpec("x", F32, ("N", None, 3)), InputSpec("text", TEXT, ())]


def test_sizes_of_zero_and_minus_one_are_dynamic():
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 0, 3])

    assert input_specs(helper.make_model(helper.make_graph([], "g", [value], []))) == [
        InputSpec("x", F32, (None, None, 3))
    ]


def test_lists_a_sequence_input_but_refuses_to_feed_it():
    value = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    specs = input_specs(helper.make_model(helper.make_graph([], "g", [value], [])))

    with pytest.raises(ModelError, match=r"input 's' of the model is a sequence, not a tensor"):
        open_data({"s": rows(3)}, specs)


def test_refuses_a_model_whose_input_numpy_cannot_feed():
    spec = InputSpec("b", np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)), ("N", 3))

    with pytest.raises(ModelError, match="input 'b' of the model is bfloat16, which ONNX Runtime does not take"):
        open_data({"b": rows(4)}, [spec])


def test_an_input_without_a_rank_can_be_fed_once_its_shape_is_given():
    value = helper.make_value_info("x", helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    specs = input_specs(helper.make_model(helper.make_graph([], "g", [value], [])))

    assert open_data({"x": rows(4)}, specs, shapes={"x": (1, 2)}).size == 4
    with pytest.raises(ModelError, match=r"does not say how many axes it has; give its shape: --shape x=SIZE"):
        open_data({"x": rows(4)}, specs)


def test_importing_needs_no_onnx():
    code = (
        "import sys, onnxcomp.data, onnxcomp.metrics; print({'onnx', 'onnxruntime', 'torch', 'PIL'} & set(sys.modules))"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"


# Shapes from the command line


def test_parses_shapes():
    assert parse_shapes(["image=1,3,224,224", "a=b = 2", "sr="]) == {"image": (1, 3, 224, 224), "a=b": (2,), "sr": ()}


@pytest.mark.parametrize("text", ["image", "=1,2", "image=1x3", "image=1,,2", "image=-1,3", "image=0,3"])
def test_refuses_a_text_that_is_no_shape(text: str):
    with pytest.raises(OptionError):
        parse_shapes([text])


def test_refuses_a_shape_given_twice():
    with pytest.raises(OptionError, match="given twice"):
        parse_shapes(["x=1", "x=2"])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"imag": (1, 3, 4, 5)}, r"the model has no input 'imag' to give a shape to; did you mean 'image'\?"),
        ({"image": (3, 4, 5)}, r"it has 4 axes, but the shape 3,4,5 has 3"),
        ({"image": (1, 3, 4, 6)}, r"axis 3 of input 'image' is fixed to 5 in the model, but the shape 1,3,4,6 says 6"),
        ({"image": (0, 3, 4, 5)}, r"every size must be a whole number of at least 1"),
    ],
)
def test_refuses_a_shape_that_contradicts_the_model(shapes: dict[str, tuple[int, ...]], message: str):
    with pytest.raises(OptionError, match=message):
        open_data({"image": np.zeros((2, 3, 4, 5), np.float32)}, IMAGE, shapes=shapes)


def test_a_shape_binds_the_same_axis_of_other_inputs():
    data = {"ids": np.zeros((3, 7), np.int64), "mask": np.zeros((3, 7), np.int64)}

    with pytest.raises(DataError, match=r"input 'ids' expects int64 \(1, 8\)"):
        open_data(data, PAIR, shapes={"mask": (1, 8)})


# Batches


def test_reads_every_sample_once_in_order():
    data = open_data({"x": rows(70)}, ROWS)

    assert [batch.count for batch in data.batches()] == [32, 32, 6]
    np.testing.assert_array_equal(read(data), rows(70))


def test_the_default_batch_shrinks_for_large_samples():
    wide = [InputSpec("x", F32, ("N", 8 << 20))]
    big = np.broadcast_to(np.float32(0), (5, 8 << 20))

    assert [batch.count for batch in open_data({"x": big}, wide).batches()] == [2, 2, 1]


@given(count=st.integers(1, 40), fixed=st.integers(1, 9))
def test_a_fixed_batch_is_filled_up_with_the_last_sample(count: int, fixed: int):
    data = open_data({"x": rows(count), "label": np.arange(count)}, [InputSpec("x", F32, (fixed, 2))])

    batches = list(data.batches(batch_size=5))

    assert sum(batch.count for batch in batches) == count
    for batch in batches:
        assert batch.inputs["x"].shape == (fixed, 2)
        assert (batch.inputs["x"][batch.count :] == batch.inputs["x"][batch.count - 1]).all()
        assert batch.labels is not None
        assert len(batch.labels) == batch.count
    np.testing.assert_array_equal(read(data), rows(count))


def test_refuses_a_batch_size_below_one():
    with pytest.raises(OptionError, match="batch_size must be at least 1, got 0"):
        open_data({"x": rows(4)}, ROWS).batches(0)


def test_one_more_axis_means_one_run_a_sample():
    data = open_data({"x": np.arange(24, dtype=np.float32).reshape(3, 4, 2)}, FIXED)

    assert data.size == 3
    assert [feed["x"].shape for feed in data.feeds(batch_size=8)] == [(4, 2)] * 3


def test_a_model_with_state_and_a_scalar_is_fed_run_by_run():
    data = open_data({"audio": rows(5, 6), "state": np.zeros((5, 2, 1, 3), np.float32), "sr": np.full(5, 16000)}, VOICE)

    shapes = [{name: array.shape for name, array in feed.items()} for feed in data.feeds()]
    assert shapes == [{"audio": (1, 6), "state": (2, 1, 3), "sr": ()}] * 5


def test_a_scalar_without_a_sample_axis_is_shared():
    specs = [*ROWS, InputSpec("gain", F32, ())]

    feeds = list(open_data({"x": rows(40), "gain": np.float32(3)}, specs).feeds())

    assert [feed["gain"].item() for feed in feeds] == [3, 3]
    assert [feed["x"].shape for feed in feeds] == [(32, 2), (8, 2)]


def test_arrays_of_a_model_without_a_common_sample_axis_are_one_feed():
    feed = {"audio": rows(1, 6), "state": np.ones((2, 1, 3), np.float32), "sr": np.array(16000)}

    data = open_data(feed, VOICE)

    assert data.size == 1
    (got,) = data.feeds()
    for name, array in feed.items():
        np.testing.assert_array_equal(got[name], array)


def test_first_axes_of_different_names_and_sizes_are_one_feed():
    specs = [InputSpec("image", F32, ("batch", 4)), InputSpec("points", F32, ("points", 2))]
    feed = {"image": rows(1, 4), "points": rows(3)}

    data = open_data([feed, feed], specs)

    assert data.size == 2
    assert [got["points"].shape for got in data.feeds()] == [(3, 2)] * 2


def test_refuses_two_fixed_batches_in_one_run():
    specs = [InputSpec("x", F32, (4, 2)), InputSpec("gain", F32, ())]

    with pytest.raises(DataError, match=r"input 'x' has a fixed first axis of 4.*one more axis in front"):
        open_data({"x": rows(8), "gain": np.zeros(8, np.float32)}, specs)


# What is refused


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imag": 0}, r"arrays: there is nothing for input 'image'; is it 'imag'\?; the model wants 'image' float32"),
        ({"image": np.zeros((2, 3, 4, 5), np.float32), "clip": 0}, r"the model has no input 'clip'; it wants 'image'"),
        (
            {"image": np.zeros((9, 4, 5, 3), np.float32)},
            r"input 'image' expects float32 \(batch, 3, 4, 5\), got float32 \(9, 4, 5, 3\); "
            r"transpose it: array.transpose\(0, 3, 1, 2\)",
        ),
        ({"image": np.zeros((3, 4, 5), np.float32)}, r"give it a first axis that counts the samples"),
        ({"image": np.zeros((2, 3, 4, 9), np.float32)}, r"got float32 \(2, 3, 4, 9\)"),
        ({"image": np.zeros((2, 3, 4, 5), np.uint8)}, r"got uint8; scale the values as in training"),
        ({"image": np.zeros((2, 3, 4, 5), np.int64)}, r"got int64; convert it yourself"),
        ({"image": np.zeros((0, 3, 4, 5), np.float32)}, r"there are no samples"),
        ({"image": np.full((2, 3, 4, 5), 1e300)}, r"values that are not finite, first in sample 0"),
        ({"image": np.zeros((2, 3, 4, 5), np.float32), "label": [1, 2, 3]}, r"2 samples but the labels are 3"),
        ({"image": [[1], [2, 3]]}, r"image: it cannot be made an array"),
        ({"image": np.zeros(2, object)}, r"expected an array of numbers or strings"),
    ],
)
def test_refuses_arrays_that_do_not_fit(arrays: dict[str, object], message: str):
    with pytest.raises(DataError, match=message) as caught:
        open_data(arrays, IMAGE)
    assert "\n" not in str(caught.value)


def test_names_the_first_sample_that_is_not_finite():
    values = rows(200)
    values[123, 1] = np.nan

    with pytest.raises(DataError, match="first in sample 123"):
        open_data({"x": values}, ROWS)


def test_counts_samples_over_all_items_of_an_iterable():
    values = rows(200)
    values[123, 1] = np.nan

    with pytest.raises(DataError, match=r"item 2: .* first in sample 123"):
        open_data([values[:50], values[50:100], values[100:]], ROWS)


def test_infinities_are_allowed_in_masks_only():
    mask = [InputSpec("attention_mask", F32, ("N", 2))]

    assert open_data({"attention_mask": np.full((3, 2), -np.inf, np.float32)}, mask).size == 3
    with pytest.raises(DataError, match="not finite"):
        open_data({"attention_mask": np.full((3, 2), np.nan, np.float32)}, mask)


def test_refuses_inputs_of_different_counts():
    with pytest.raises(DataError, match="'ids' has 3, 'mask' has 4; their first axes must be equal"):
        open_data({"ids": np.zeros((3, 7), np.int64), "mask": np.zeros((4, 7), np.int64)}, PAIR)


def test_refuses_different_sizes_of_one_named_axis():
    with pytest.raises(DataError, match="axis 'L' is 7 in input 'ids' and 8 in input 'mask'"):
        open_data({"ids": np.zeros((3, 7), np.int64), "mask": np.zeros((3, 8), np.int64)}, PAIR)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.float64, np.float32),
        (np.float32, np.float16),
        (np.int32, np.int64),
        (np.int64, np.int32),
        (">f4", np.float32),
    ],
)
def test_converts_types_that_keep_their_meaning(source: type, target: type):
    data = open_data({"x": rows(4).astype(source)}, [InputSpec("x", np.dtype(target), ("N", 2))])

    got = read(data)
    assert got.dtype == target
    np.testing.assert_array_equal(got, rows(4))


def test_refuses_integers_that_do_not_fit():
    with pytest.raises(DataError, match="values from 0 to 3000000000 do not fit in -2147483648 to 2147483647"):
        open_data({"x": np.array([[0, 3_000_000_000]])}, [InputSpec("x", I32, ("N", 2))])


def test_refuses_bytes_that_are_no_text():
    with pytest.raises(DataError, match="input 't' holds strings that are no text"):
        open_data({"t": np.array([b"\xff\xff"])}, [InputSpec("t", TEXT, ("N",))])


def test_strings_are_fed_as_objects():
    data = open_data({"t": np.array([["a", "bc"], ["def", ""]])}, [InputSpec("t", TEXT, ("N", 2))])

    (feed,) = data.feeds()
    assert feed["t"].dtype == object
    assert feed["t"].tolist() == [["a", "bc"], ["def", ""]]


# Files


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_reads_an_npz_with_labels(tmp_path: Path, writer):
    writer(tmp_path / "calib.npz", x=rows(50), label=np.arange(50))

    data = open_data(tmp_path / "calib.npz", ROWS)

    assert (data.size, data.has_labels, data.generated) == (50, True, False)
    assert data.description == "calib.npz: 50 samples"
    np.testing.assert_array_equal(read(data), rows(50))
    np.testing.assert_array_equal(data.labels(), np.arange(50))


def test_reads_an_array_in_fortran_order(tmp_path: Path):
    path = save(tmp_path / "a.npz", x=np.asfortranarray(rows(50)))

    np.testing.assert_array_equal(read(open_data(path, ROWS)), rows(50))


def test_large_data_go_to_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxcomp.data.spool.MEMORY_BYTES", 100)
    monkeypatch.setattr("onnxcomp.data.npy._CHUNK_BYTES", 64)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    path = save(tmp_path / "a.npz", x=rows(500), label=np.arange(500))

    with open_data(path, ROWS) as data:
        assert list((tmp_path / "spool").iterdir()) == []
        for _ in range(2):
            np.testing.assert_array_equal(read(data), rows(500))
        np.testing.assert_array_equal(data.labels(), np.arange(500))


def test_a_closed_dataset_says_so():
    with open_data({"x": rows(4)}, ROWS) as data:
        pass

    with pytest.raises(DataError, match="closed"):
        data.batches()


def test_reads_no_more_than_the_limit(tmp_path: Path):
    path = save(tmp_path / "a.npz", x=rows(50))

    for source in (path, {"x": rows(50)}, (rows(7) for _ in iter(int, 1))):
        data = open_data(source, ROWS, limit=10)
        assert data.size == 10
        np.testing.assert_array_equal(read(data)[:7], rows(7))


def test_refuses_a_pickled_npy(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.array([[1, "a"]], dtype=object))

    with pytest.raises(DataError, match=r"a.npz: x: it holds pickled Python objects, which are never read"):
        open_data(tmp_path / "a.npz", ROWS)


def member(shape: tuple[int, ...], payload: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + payload


def test_refuses_a_header_that_claims_more_than_there_is(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", member((10**12, 2), bytes(64)))

    with pytest.raises(
        DataError, match=r"claims float32 \(1000000000000, 2\), 8,000,000,000,000 bytes, but it holds 64"
    ):
        open_data(tmp_path / "a.npz", ROWS)


def test_refuses_a_member_shorter_than_it_declares(tmp_path: Path):
    path, short = tmp_path / "a.npz", member((520, 2), bytes(64))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", short)
    sizes = (len(short).to_bytes(4, "little"), (len(short) + 4096).to_bytes(4, "little"))
    path.write_bytes(path.read_bytes().replace(*sizes))

    with pytest.raises(DataError, match=r"a\.npz: x: it ends 4,096 bytes too early"):
        open_data(path, ROWS)


def test_refuses_what_would_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxcomp.data.spool.MEMORY_BYTES", 50)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))

    with pytest.raises(DataError, match=r"it unpacks to 4,000 bytes.*has room for 100"):
        open_data(save(tmp_path / "a.npz", x=rows(500)), ROWS)


def test_samples_that_never_end_are_refused_before_they_fill_the_disk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxcomp.data.spool.MEMORY_BYTES", 50)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))

    with pytest.raises(DataError, match=r"repeat: \d+ samples fill most of .*, and there are more; end them earlier"):
        open_data(itertools.repeat({"x": rows(5)}), ROWS)


def test_refuses_an_archive_whose_names_are_no_text(tmp_path: Path):
    path = save(tmp_path / "a.npz", x=rows(2))
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")  # the entry of the directory says how its name is written, then the name
    entry = bytearray(content[start:])
    entry[9] |= 8
    path.write_bytes(content[:start] + bytes(entry).replace(b"x.npy", b"\xff.npy"))

    with pytest.raises(DataError, match=r"a\.npz: cannot be read: 'utf-8' codec can't decode byte 0xff"):
        open_data(path, ROWS)


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200)
def test_no_bytes_make_the_reader_fail_otherwise(content: bytes, magic: bool):
    stream = b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content if magic else content

    with pytest.raises(DataError):
        NpyReader(io.BytesIO(stream), len(stream), "x.npy")


@given(st.integers(0, 600), st.integers(0, 255))
@settings(max_examples=200)
def test_a_damaged_npz_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, position: int, value: int):
    path = save(tmp_path_factory.mktemp("npz") / "a.npz", x=rows(8))
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)

    try:
        open_data(path, ROWS)
    except OnnxcompError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("calb.npz", r"there is no such file or folder; did you mean 'calib.npz'\?"),
        ("text.txt", "expected an .npz or .npy file, or a folder"),
        ("broken.npz", "cannot be read: File is not a zip file"),
        ("empty", "there are no .npz, .npy or image files"),
        ("x" * 5000, "there is no such file or folder"),
    ],
)
def test_refuses_a_path_that_is_no_data(tmp_path: Path, name: str, message: str):
    save(tmp_path / "calib.npz", x=rows(8))
    (tmp_path / "text.txt").touch()
    (tmp_path / "broken.npz").write_bytes(b"no")
    (tmp_path / "empty").mkdir()

    with pytest.raises(DataError, match=message):
        open_data(tmp_path / name, ROWS)


# Folders


def test_joins_a_folder_of_npz_in_order_of_names(tmp_path: Path):
    for number in (2, 0, 1):
        save(tmp_path / f"{number}.npz", x=rows(9)[3 * number : 3 * number + 3])

    np.testing.assert_array_equal(read(open_data(tmp_path, ROWS)), rows(9))


def test_each_npy_in_a_folder_is_a_sample_with_or_without_an_axis_in_front(tmp_path: Path):
    np.save(tmp_path / "a.npy", rows(2)[0])
    np.save(tmp_path / "b.npy", rows(2)[1:])

    np.testing.assert_array_equal(read(open_data(tmp_path, ROWS)), rows(2))


def test_a_folder_an_input_for_several_inputs(tmp_path: Path):
    for name, value in (("ids", 1), ("mask", 2)):
        (tmp_path / name).mkdir()
        for number in range(3):
            np.save(tmp_path / name / f"{number}.npy", np.full(7, value + 10 * number))

    data = open_data(tmp_path, PAIR)

    assert read(data, "ids")[:, 0].tolist() == [1, 11, 21]
    assert read(data, "mask")[:, 0].tolist() == [2, 12, 22]
    (tmp_path / "mask" / "2.npy").unlink()
    with pytest.raises(DataError, match=r"'2.npy' is in only one of the folders 'ids' and 'mask'"):
        open_data(tmp_path, PAIR)


def image_folder(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    (folder / "sub").mkdir()
    for name, color in (("a.png", (255, 0, 0)), ("sub/b.bmp", (0, 0, 51))):
        image.new("RGB", (10, 8), color).save(folder / name)
    return folder


def test_reads_images_scaled_normalized_and_channels_first(tmp_path: Path):
    options = ImageOptions(mean=(0.5, 0, 0), std=(0.5, 1, 1))

    got = read(open_data(image_folder(tmp_path), IMAGE, image=options), "image")

    assert got.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(got[:, :, 0, 0], np.array([[1, 0, 0], [-1, 0, 0.2]]), atol=1e-7)


def test_reads_images_channels_last_in_other_color_orders(tmp_path: Path):
    folder = image_folder(tmp_path)

    bgr = read(open_data(folder, [InputSpec("i", F32, (1, 4, 5, 3))], image=ImageOptions(color="bgr")), "i")
    gray = read(open_data(folder, [InputSpec("i", U8, (1, None, None, 1))], image=ImageOptions(size=(2, 2))), "i")

    assert bgr[0, 0, 0].tolist() == [0, 0, 1]
    assert gray.shape == (2, 2, 2, 1)
    assert gray[0, 0, 0, 0] == 76  # 0.299 * 255


def test_images_take_their_labels_from_a_csv(tmp_path: Path):
    folder = image_folder(tmp_path)
    (folder / "labels.csv").write_text("filename,label\nsub/b.bmp,7\na.png,3\n")

    np.testing.assert_array_equal(open_data(folder, IMAGE).labels(), [3, 7])
    (folder / "labels.csv").write_text("a.png,3\n")
    with pytest.raises(DataError, match=r"labels.csv has no line for 'sub/b.bmp'"):
        open_data(folder, IMAGE)


def test_refuses_a_file_that_only_looks_like_an_image(tmp_path: Path):
    (image_folder(tmp_path) / "c.png").write_bytes(b"no image")

    with pytest.raises(DataError, match=r"c\.png: it is not an image that can be read"):
        open_data(tmp_path, IMAGE)


@pytest.mark.parametrize(
    "options", [{"layout": "chw"}, {"color": "cmyk"}, {"size": (0, 3)}, {"std": (0.0,)}, {"mean": (1.0, 2.0)}]
)
def test_refuses_image_options_that_make_no_sense(tmp_path: Path, options: dict[str, object]):
    with pytest.raises(OptionError):
        open_data(image_folder(tmp_path), IMAGE, image=ImageOptions(**options))  # type: ignore[arg-type]


def test_image_options_need_images():
    with pytest.raises(OptionError, match="image options are for a folder of images"):
        open_data({"x": rows(3)}, ROWS, image=ImageOptions())


# Objects that give data


class Reader:
    """As onnxruntime.quantization.CalibrationDataReader."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def test_reads_a_calibration_data_reader():
    data = open_data(Reader([{"x": rows(8)[:5]}, {"x": rows(8)[5:]}]), ROWS)

    np.testing.assert_array_equal(read(data), rows(8))


def test_whole_feeds_of_a_reader_are_runs():
    feed = {"audio": rows(1, 6), "state": np.ones((2, 1, 3), np.float32), "sr": np.array(16000)}

    data = open_data(Reader([feed] * 3), VOICE)

    assert data.size == 3
    assert [got["state"].shape for got in data.feeds()] == [(2, 1, 3)] * 3


def test_reads_a_torch_data_loader():
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    loader = data.DataLoader(data.TensorDataset(torch.tensor(rows(10)), torch.arange(10)), batch_size=4)

    got = open_data(loader, ROWS)

    np.testing.assert_array_equal(read(got), rows(10))
    np.testing.assert_array_equal(got.labels(), np.arange(10))


def singles() -> Iterator[tuple[dict[str, np.ndarray], int]]:
    for number, row in enumerate(rows(6)):
        yield {"x": row}, number


def not_data() -> int:
    return 3


def fails() -> Iterator[np.ndarray]:
    yield rows(1)
    message = "no more\nof it"
    raise KeyError(message)


def test_single_samples_with_labels_from_a_function():
    data = open_data(singles, ROWS)

    np.testing.assert_array_equal(read(data), rows(6))
    np.testing.assert_array_equal(data.labels(), np.arange(6))
    assert data.description == "singles: 6 samples"


def test_a_generator_may_reuse_its_array():
    def reuse() -> Iterator[np.ndarray]:
        buffer = np.zeros(2, np.float32)
        for row in rows(6):
            buffer[:] = row
            yield buffer

    np.testing.assert_array_equal(read(open_data(reuse(), ROWS)), rows(6))


def test_positional_inputs_in_the_models_order():
    data = open_data([(np.full((1, 7), 1), np.full((1, 7), 2), 9)], PAIR)

    assert (read(data, "ids")[0, 0], read(data, "mask")[0, 0]) == (1, 2)
    np.testing.assert_array_equal(data.labels(), [9])


@pytest.mark.parametrize("spill", [False, True])
def test_samples_of_different_lengths_stay_in_order(monkeypatch: pytest.MonkeyPatch, spill: bool):
    if spill:
        monkeypatch.setattr("onnxcomp.data.spool.MEMORY_BYTES", 100)
    lengths = [3, 3, 5, 5, 5, 4, 3]
    items = [({"ids": np.full(n, i), "mask": np.ones(n, np.int64)}, i) for i, n in enumerate(lengths)]

    data = open_data(items, PAIR)

    assert [batch.inputs["ids"].shape for batch in data.batches()] == [(2, 3), (3, 5), (1, 4), (1, 3)]
    assert [int(row) for batch in data.batches() for row in batch.inputs["ids"][:, 0]] == list(range(7))
    np.testing.assert_array_equal(data.labels(), np.arange(7))


def test_imports_a_function_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_calibration_data.py").write_text("def make():\n    return {'x': [[1.0, 2.0]]}\n")
    monkeypatch.chdir(tmp_path)

    assert read(open_data("my_calibration_data:make", ROWS)).tolist() == [[1, 2]]
    with pytest.raises(OptionError, match=r"there is no 'mak' in 'my_calibration_data'; did you mean 'make'\?"):
        open_data("my_calibration_data:mak", ROWS)
    with pytest.raises(OptionError, match="names code to run, which is not allowed here"):
        open_data("my_calibration_data:make", ROWS, allow_code=False)
    with pytest.raises(OptionError, match="module 'no_such_module' cannot be imported"):
        open_data("no_such_module:make", ROWS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (fails, r"fails: reading item 1 failed: KeyError"),
        (not_data, r"not_data: a int is not data that can be read"),
        (5, r"a int is not data that can be read"),
        ([{"x": rows(1)}, ({"x": rows(1)}, 3)], "some samples have a label and some have none"),
        (
            [{"x": rows(1)}, {"x": rows(1, 3)}],
            r"list: item 1: input 'x' expects float32 \(N, 2\), got float32 \(1, 3\)",
        ),
        ([], "there are no samples"),
        (b"abc", "it gave bytes"),
        ("", "the path of the data is empty"),
        ([(rows(1), 1, 2)], "it holds 3 values; expected the inputs 'x'"),
    ],
)
def test_refuses_an_object_that_is_no_data(source: object, message: str):
    with pytest.raises(DataError, match=message):
        open_data(source, ROWS)


# Digest, subsets, splits


def test_the_digest_depends_on_contents_and_names_only(tmp_path: Path):
    first = open_data(save(tmp_path / "a.npz", x=rows(50)), ROWS).digest

    assert open_data({"x": rows(50).astype(np.float64)}, ROWS).digest == first
    assert open_data([rows(50)[:20], rows(50)[20:]], ROWS).digest == first
    assert open_data({"y": rows(50)}, [InputSpec("y", F32, ("N", 2))]).digest != first
    assert open_data({"x": rows(50), "label": np.zeros(50)}, ROWS).digest != first
    changed = rows(50)
    changed[49, 1] += 1
    assert open_data({"x": changed}, ROWS).digest != first


def test_a_subset_keeps_the_order_of_its_indices():
    data = open_data({"x": rows(50), "label": np.arange(50)}, ROWS).subset(np.array([7, 3, 3, 40]))

    assert data.size == 4
    np.testing.assert_array_equal(read(data), rows(50)[[7, 3, 3, 40]])
    np.testing.assert_array_equal(data.subset([3, 0]).labels(), [40, 7])
    assert data.digest != data.subset([0, 1]).digest


@pytest.mark.parametrize("indices", [[], [50], [-1], [0.5], [[1]]])
def test_refuses_indices_outside(indices: list[int]):
    with pytest.raises(OptionError, match="indices of samples must be"):
        open_data({"x": rows(50)}, ROWS).subset(indices)


@given(
    size=st.integers(8, 300), seed=st.integers(0, 2**32), weights=st.lists(st.integers(1, 20), min_size=1, max_size=5)
)
def test_a_split_is_disjoint_and_complete(size: int, seed: int, weights: list[int]):
    shares = {str(number): weight / sum(weights) for number, weight in enumerate(weights)}
    data = open_data({"x": rows(size), "label": np.arange(size)}, ROWS)

    parts = {name: part.labels() for name, part in data.split(shares, seed).items()}

    assert list(parts) == list(shares)
    together = np.concatenate([labels for labels in parts.values() if labels is not None])
    assert sorted(together) == list(range(size))
    for name, labels in parts.items():
        assert labels is not None
        assert len(labels) >= 1
        # Largest remainder is off by less than one; a part raised to one sample takes at most one from another.
        assert abs(len(labels) - shares[name] * size) < 1 + len(weights)


def test_a_split_depends_on_the_seed_only():
    data = open_data({"x": rows(50), "label": np.arange(50)}, ROWS)
    first, again, other = (data.split({"a": 0.5, "b": 0.5}, seed)["a"] for seed in (1, 1, 2))

    assert first.digest == again.digest != other.digest


def test_too_few_samples_are_not_split():
    data = open_data({"x": rows(7)}, ROWS)

    assert [part.size for part in data.split({"a": 0.5, "b": 0.5}, seed=0).values()] == [7, 7]


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": 0.7, "b": 0.7}, {"a": float("nan")}])
def test_refuses_shares_that_make_no_sense(shares: dict[str, float]):
    with pytest.raises(OptionError, match="shares must be above 0"):
        open_data({"x": rows(50)}, ROWS).split(shares, seed=0)


def test_a_dataset_can_be_opened_again_for_the_same_inputs():
    data = open_data({"x": rows(50)}, ROWS)

    assert open_data(data, ROWS) is data
    assert open_data(data, ROWS, limit=3).size == 3
    with pytest.raises(DataError, match="it was opened for 'x'"):
        open_data(data, PAIR)


def test_a_model_without_inputs_has_nothing_to_feed():
    specs = input_specs(onnx.ModelProto())

    assert specs == []
    with pytest.raises(DataError, match="the model has no inputs"):
        open_data({"x": rows(3)}, specs)
