"""`deploy`: what a package holds, that it is what runs, and that it comes whole or not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import onnxcomp
from onnxcomp import deploy
from onnxcomp.cli import main
from onnxcomp.data import ImageOptions
from onnxcomp.deployment.readme import LANGUAGES
from onnxcomp.errors import ModelError, OptionError, OutputError
from onnxcomp.model import Model
from onnxcomp.ort_format import is_ort, read_ort, required_operators
from onnxcomp.targets import TARGETS
from tests import traps
from tests.models import graph_model, mlp_model

SNIPPETS = Path(onnxcomp.__file__).parent / "deployment" / "snippets"

MOBILE = ("arm64", "xnnpack", "nnapi", "coreml", "qnn", "web")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    Model.load(mlp_model()).save(path)
    return path


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def read(folder: Path, entry: dict[str, Any]) -> Any:
    return np.fromfile(folder / entry["file"], entry["dtype"]).reshape(entry["shape"])


# --- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", MOBILE)
def test_a_package_holds_the_file_that_the_target_wants_and_nothing_else(model, tmp_path, target):
    package = deploy(model, target, tmp_path / "app")
    files = {path.relative_to(package.folder).as_posix() for path in package.folder.rglob("*") if path.is_file()}
    name = "net.ort" if target == "arm64" else "net.onnx"
    samples = {f"samples/{index}/{side}_0.bin" for index in (0, 1) for side in ("input", "output")}
    assert files == {name, "manifest.json", "README.md", "required_operators_and_types.config"} | samples
    assert is_ort(package.folder / name) == (target == "arm64")


@pytest.mark.parametrize("target", TARGETS)
def test_the_samples_give_what_is_expected_of_them(model, tmp_path, target):
    package = deploy(model, target, tmp_path / "app")
    manifest = json.loads((package.folder / "manifest.json").read_text())
    assert len(manifest["samples"]) == 2
    for sample in manifest["samples"]:
        feed = {name: read(package.folder, entry) for name, entry in sample["inputs"].items()}
        results = session(package.folder / manifest["model"]["file"]).run(list(sample["outputs"]), feed)
        for entry, result in zip(sample["outputs"].values(), results, strict=True):
            np.testing.assert_allclose(result, read(package.folder, entry), rtol=1e-5, atol=1e-6)


def test_the_manifest_tells_what_the_model_is(model, tmp_path):
    image = ImageOptions(size=(28, 28), mean=(0.5,), std=(0.25,))
    text = "g (float[1, 1, 28, 28] x) => (float[1, 784] y) { y = Flatten(x) }"
    proto = graph_model(text)
    proto.metadata_props.add(key="labels", value="a,b")
    onnx.save(proto, model)
    manifest = deploy(model, "web", tmp_path / "app", image=image).manifest
    file = tmp_path / "app" / "net.onnx"
    assert manifest["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, 1, 28, 28]}]
    assert manifest["outputs"] == [{"name": "y", "dtype": "float32", "shape": [1, 784]}]
    assert manifest["model"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["source"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["metadata"] == {"labels": "a,b"}
    assert manifest["preprocessing"] == {"size": (28, 28), "mean": (0.5,), "std": (0.25,), "scale": 1 / 255}
    assert manifest["runtime"]["written_with"] == onnxruntime.__version__


def test_a_newer_opset_raises_the_least_runtime(tmp_path):
    text = "g (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }"
    old, new = (graph_model(text, opset=opset, ir_version=version) for opset, version in ((17, 8), (21, 10)))
    found = [deploy(one, "web", tmp_path / "app").manifest["runtime"]["minimum"] for one in (old, new)]
    assert found == ["1.16", onnxruntime.__version__]


def test_the_operators_of_a_reduced_build_are_those_of_the_file(tmp_path):
    package = deploy(traps.conv(activations="int8"), "arm64", tmp_path / "app")
    config = (package.folder / "required_operators_and_types.config").read_text()
    assert "QLinearConv" in config
    assert "DequantizeLinear" in config  # the result's
    assert required_operators([package.folder / "model.ort"]) == config
    assert read_ort(package.folder / "model.ort").saved_optimizations == 0


def test_a_file_that_is_optimized_on_the_device_has_kernels_for_before_and_after(tmp_path):
    package = deploy(traps.conv(), "web", tmp_path / "app")
    config = (package.folder / "required_operators_and_types.config").read_text()
    assert "QLinearConv" in config
    assert ",Conv" in config or ";Conv" in config


def test_data_become_the_samples(model, tmp_path):
    data = {"x": np.arange(40, dtype=np.float32).reshape(5, 8)}
    package = deploy(model, "arm64", tmp_path / "app", data=data)
    first = package.manifest["samples"][0]["inputs"]["x"]
    np.testing.assert_array_equal(read(package.folder, first), data["x"][:1])


# --- what the target wants --------------------------------------------------------------------------------------------


def test_dynamic_axes_are_fixed_where_the_target_wants_that(tmp_path):
    model = graph_model("g (float[N, 3, H, 8] x) => (float[N, 3, H, 8] y) { y = Relu(x) }")
    fixed = deploy(model, "nnapi", tmp_path / "a", shapes={"x": (1, 3, 5, 8)})
    assert fixed.manifest["inputs"][0]["shape"] == [1, 3, 5, 8]
    taken = deploy(model, "nnapi", tmp_path / "b", data={"x": np.ones((4, 3, 6, 8), np.float32)})
    assert taken.manifest["inputs"][0]["shape"] == [1, 3, 6, 8]
    kept = deploy(model, "arm64", tmp_path / "c", shapes={"x": (1, 3, 5, 8)})
    assert kept.manifest["inputs"][0]["shape"] == ["N", 3, "H", 8]


def test_axes_that_nobody_gave_are_an_error_of_the_lint(tmp_path):
    model = graph_model("g (float[N, 3, H, 8] x) => (float[N, 3, H, 8] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match=r"nnapi does not take it as it is \(dynamic-shape\)"):
        deploy(model, "nnapi", tmp_path / "app")
    assert not (tmp_path / "app").exists()


def test_what_the_target_does_not_take_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ModelError, match="onnxcomp optimize --target xnnpack"):
        deploy(traps.conv(), "xnnpack", tmp_path / "app")
    assert list(tmp_path.iterdir()) == []
    forced = deploy(traps.conv(), "xnnpack", tmp_path / "app", force=True)
    assert {finding.id for finding in forced.findings} == {"uint8-int8"}


def test_an_ort_file_is_no_source(model, tmp_path):
    written = deploy(model, "arm64", tmp_path / "app").folder / "net.ort"
    with pytest.raises(ModelError, match="already"):
        deploy(written, "arm64", tmp_path / "again")


def test_an_unknown_target_is_refused(model, tmp_path):
    with pytest.raises(OptionError, match="arm64"):
        deploy(model, "arm46", tmp_path / "app")


# --- the folder -------------------------------------------------------------------------------------------------------


def test_an_earlier_package_is_replaced_whole(model, tmp_path):
    deploy(model, "arm64", tmp_path / "app")
    deploy(model, "web", tmp_path / "app")
    assert not (tmp_path / "app" / "net.ort").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app", "net.onnx"]


def test_a_folder_with_other_files_is_refused_and_stays(model, tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        deploy(model, "arm64", folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_package_with_a_file_of_the_users_is_not_replaced(model, tmp_path):
    deploy(model, "arm64", tmp_path / "app")
    (tmp_path / "app" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        deploy(model, "arm64", tmp_path / "app")


def test_the_model_is_not_replaced_by_its_package(model, tmp_path):
    package = deploy(model, "web", tmp_path / "app")
    with pytest.raises(OutputError, match="would be replaced"):
        deploy(package.folder / "net.onnx", "web", package.folder)
    assert (package.folder / "net.onnx").exists()


def test_a_failure_on_the_way_leaves_the_earlier_package(model, tmp_path, monkeypatch):
    before = deploy(model, "arm64", tmp_path / "app").manifest["model"]["sha256"]

    def fail(_manifest: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcomp.deployment.deploying.package_readme", fail)
    with pytest.raises(KeyboardInterrupt):
        deploy(model, "web", tmp_path / "app")
    manifest = json.loads((tmp_path / "app" / "manifest.json").read_text())
    assert manifest["model"]["sha256"] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app", "net.onnx"]


@pytest.mark.parametrize("place", ["missing/app", "net.onnx"])
def test_a_place_that_is_no_folder_is_refused(model, tmp_path, place):
    with pytest.raises(OutputError):
        deploy(model, "arm64", tmp_path / place)


# --- the README -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_readme_has_the_lines_that_load_the_model(model, tmp_path, target):
    package = deploy(model, target, tmp_path / "app")
    text = (package.folder / "README.md").read_text()
    assert f"`{package.manifest['model']['file']}`" in text
    for word in ("MODEL_FILE", "MODEL_STEM", "INPUT", "OUTPUT", "OPTIONS", "SHAPE", "VERSION"):
        assert word not in text


@pytest.mark.parametrize("language", {one.file: one for each in LANGUAGES.values() for one in each}.values())
def test_snippets_keep_step_with_their_files(language):
    text = (SNIPPETS / language.file).read_text()
    for word in ("MODEL_FILE", "INPUT", "OUTPUT", "OPTIONS", "SHAPE"):
        assert word in text
    assert "" in language.options


def test_the_python_lines_run_and_give_what_is_expected(model, tmp_path):
    package = deploy(model, "x86", tmp_path / "app")
    text = (package.folder / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    entry = package.manifest["samples"][0]
    source, result = (next(iter(entry[side].values())) for side in ("inputs", "outputs"))
    code += f"\nresult = run(np.fromfile({source['file']!r}, np.float32))"
    code += f"\nnp.testing.assert_allclose(result.ravel(), np.fromfile({result['file']!r}, np.float32), rtol=1e-5)"
    subprocess.run([sys.executable, "-c", code], cwd=package.folder, check=True)


def test_a_name_with_quotes_stays_inside_its_string(tmp_path):
    model = mlp_model()
    model.graph.input[0].name = 'x"y'
    model.graph.node[0].input[0] = 'x"y'
    text = (deploy(model, "web", tmp_path / "app").folder / "README.md").read_text()
    assert '"x\\"y"' in text


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_package_and_lists_its_files(model, tmp_path):
    result = CliRunner().invoke(main, ["deploy", str(model), "--target", "arm64", "-o", str(tmp_path / "app")])
    assert result.exit_code == 0, result.output
    assert "net.ort for arm64" in result.output
    assert "samples/1/output_0.bin" in result.output


def test_the_command_tells_a_refusal_in_one_line(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(traps.conv(), path)
    result = CliRunner().invoke(main, ["deploy", str(path), "--target", "coreml", "-o", str(tmp_path / "app")])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "qdq-unsupported" in result.output
