"""The sample models: small, sound, as accurate as they are said to be, and free of traces of where they were made."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.markdown import ROOT, read, table

FOLDER = ROOT / "sample_models"
LIMIT_BYTES = 6_000_000
ACCURACY_ROUNDING = 0.0025
"""Accuracies are told with three digits; two images of 1,000 may fall to the other side on another processor."""

MODELS = sorted(path.name for path in FOLDER.glob("*.onnx") if not path.name.endswith(".opt.onnx"))


@pytest.fixture(scope="module")
def told():
    """The README's accuracies on the 1,000 images, by file name."""
    text = " ".join(read("sample_models/README.md").split())
    match = re.search(r"On the 1,000 images.*?it is ([\d.]+), ([\d.]+) and ([\d.]+)\.", text)
    assert match
    names = [row["model"].strip("`") for row in table(read("sample_models/README.md"))]
    return dict(zip(names, map(float, match.groups()), strict=True))


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_the_folder_is_small():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    kept = [path for path in files if not path.name.endswith(".opt.onnx")]
    assert sum(path.stat().st_size for path in kept) < LIMIT_BYTES


def test_the_readme_tells_of_every_model(told):
    assert sorted(told) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_is_valid_and_has_the_inputs_and_outputs_that_are_told(name):
    model = onnx.load(FOLDER / name)
    onnx.checker.check_model(model, full_check=True)
    session = _session(FOLDER / name)
    described = [(info.name, info.type, info.shape) for info in (*session.get_inputs(), *session.get_outputs())]
    assert described == [
        ("image", "tensor(float)", ["batch", 1, 28, 28]),
        ("logits", "tensor(float)", ["batch", 10]),
    ]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]


@pytest.mark.parametrize("name", MODELS)
def test_is_as_accurate_as_told(name, told):
    with np.load(FOLDER / "fashion_test.npz") as test:
        [logits] = _session(FOLDER / name).run(None, {"image": test["image"]})
        accuracy = np.mean(logits.argmax(axis=1) == test["label"])
    assert accuracy == pytest.approx(told[name], abs=ACCURACY_ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_its_size_is_the_one_that_is_told(name):
    row = next(row for row in table(read("sample_models/README.md")) if row["model"].strip("`") == name)
    assert int(row["file bytes"].replace(",", "")) == (FOLDER / name).stat().st_size


@pytest.mark.parametrize("name", [*MODELS, "fashion_calib.npz", "fashion_test.npz", "train.py", "README.md"])
def test_names_no_path_of_a_machine(name):
    data = (FOLDER / name).read_bytes()
    found = re.findall(rb"/(?:home|root|tmp|work|usr/lib|opt|Users)/[\w./-]+|site-packages|dist-packages", data)
    assert not found


def test_calibration_data_have_no_labels_and_no_test_image():
    with np.load(FOLDER / "fashion_calib.npz") as calibration, np.load(FOLDER / "fashion_test.npz") as test:
        assert calibration.files == ["image"]
        assert sorted(test.files) == ["image", "label"]
        images = {image.tobytes() for image in test["image"]}
        assert not [image for image in calibration["image"] if image.tobytes() in images]
        assert (calibration["image"].shape, test["image"].shape) == ((512, 1, 28, 28), (1000, 1, 28, 28))
