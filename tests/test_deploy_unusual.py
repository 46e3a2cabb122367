"""`deploy` of models with unusual names, types and files; and folders that it must not harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp import deploy
from onnxcomp.deployment.readme import JAVASCRIPT, KOTLIN, SWIFT, snippet
from onnxcomp.errors import ModelError, OutputError, RuntimeFailure
from tests.models import graph_model, mlp_model


def relu(name: str = "x") -> onnx.ModelProto:
    model = graph_model("g (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }")
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    return model


def manifest_of(name: str) -> dict[str, Any]:
    ends = {"inputs": [{"name": name, "shape": [1, None]}], "outputs": [{"name": "y"}]}
    return {"model": {"file": "m.onnx"}, "target": "web", **ends}


@pytest.mark.parametrize("name", ["OUTPUT", "MODEL_OUTPUT", "SHAPE", "INPUT__0", 'a "b"', "a\\b"])
def test_a_snippet_says_the_name_of_an_input_whatever_it_is(name):
    text = snippet(JAVASCRIPT, manifest_of(name))
    assert f"run({{ {json.dumps(name)}: input }})" in text
    assert 'outputs["y"]' in text
    assert "[1, 1]" in text


def test_a_dollar_is_a_dollar_in_kotlin():
    assert '"a\\$b" to input' in snippet(KOTLIN, manifest_of("a$b"))
    assert '"a$b": input' in snippet(SWIFT, manifest_of("a$b"))


def test_weights_of_a_second_file_come_into_the_one_that_is_shipped(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(mlp_model((64, 64)), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    package = deploy(path, "web", tmp_path / "app")
    assert package.manifest["model"]["data"] == []
    assert package.findings == ()
    assert not list((tmp_path / "app").glob("*.data"))


def test_weights_too_large_for_one_file_are_in_the_manifest_and_replaced_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxcomp.model.INLINE_LIMIT_BYTES", 1000)
    for _ in range(2):
        package = deploy(mlp_model((64, 64)), "web", tmp_path / "app")
        (part,) = package.manifest["model"]["data"]
        assert (tmp_path / "app" / part["file"]).stat().st_size == part["bytes"]
        assert part["file"] in (tmp_path / "app" / "README.md").read_text(encoding="utf-8")


def test_a_stranger_among_the_samples_keeps_the_folder_from_being_replaced(tmp_path):
    deploy(relu(), "web", tmp_path / "app")
    (tmp_path / "app" / "samples" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="holds other files"):
        deploy(relu(), "web", tmp_path / "app")
    assert (tmp_path / "app" / "samples" / "mine.txt").exists()


def test_the_old_package_is_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    deploy(relu(), "web", tmp_path / "app")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name != "app" and self.name != "old":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        deploy(relu("other"), "web", tmp_path / "app")
    assert json.loads((tmp_path / "app" / "manifest.json").read_text())["inputs"][0]["name"] == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["app"]


def test_integer_operators_have_the_tolerance_of_int8(tmp_path):
    model = graph_model("g (uint8[1, 4] x) => (int32[1, 2] y) { y = MatMulInteger(x, W) }", W=np.ones((4, 2), np.int8))
    manifests = [deploy(one, "web", tmp_path / name).manifest for name, one in (("a", model), ("b", relu()))]
    assert manifests[0]["tolerance"] > manifests[1]["tolerance"]


def test_a_sequence_is_called_one(tmp_path):
    model = graph_model("g (float[2, 4] x) => (seq(float[N]) y) { y = SplitToSequence(x) }")
    manifest = deploy(model, "web", tmp_path / "app").manifest
    assert manifest["outputs"][0]["dtype"] == "seq(tensor(float))"


def test_what_no_command_mends_is_told_with_what_the_user_can_do(tmp_path):
    body = "then_branch = a () => (float[2] t) { t = Relu(x) }, else_branch = b () => (float[2] e) { e = Neg(x) }"
    model = graph_model(f"g (bool c, float[2] x) => (float[2] y) {{ [choose] y = If(c) <{body}> }}")
    with pytest.raises(ModelError, match="choose: If has bodies; export the model without them") as caught:
        deploy(model, "qnn", tmp_path / "app")
    assert "optimize" not in str(caught.value)


def test_a_model_that_cannot_be_written_is_told_by_its_own_name(tmp_path):
    model = graph_model("g (float[2, 8] x) => (optional(float[2, 8]) y) { y = Optional(x) }")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(RuntimeFailure, match=r"^m\.onnx: ") as caught:
        deploy(tmp_path / "m.onnx", "arm64", tmp_path / "app")
    assert "/tmp" not in str(caught.value)
    assert not (tmp_path / "app").exists()


def test_open_sizes_are_taken_from_an_array_too(tmp_path):
    model = graph_model("g (float[N, 3, H, H] x) => (float[N, 3, H, H] y) { y = Relu(x) }")
    manifest = deploy(model, "nnapi", tmp_path / "app", data=np.ones((2, 3, 6, 6), np.float32)).manifest
    assert manifest["inputs"][0]["shape"] == [1, 3, 6, 6]


def test_a_file_for_onnx_is_written_though_the_ort_format_cannot_hold_it(tmp_path):
    model = graph_model("g (float[2, 8] x) => (optional(float[2, 8]) y) { y = Optional(x) }")
    package = deploy(model, "web", tmp_path / "app")
    assert package.manifest["operators"] is None
    assert sorted(path.name for path in package.folder.iterdir() if path.is_file()) == [
        "README.md",
        "manifest.json",
        "model.onnx",
    ]
    assert "include_ops_by_config" not in (package.folder / "README.md").read_text(encoding="utf-8")


def test_sizes_that_are_given_are_those_of_made_up_samples_for_every_target(tmp_path):
    model = graph_model("g (float[N, H] x) => (float[N, H] y) { y = Relu(x) }")
    manifest = deploy(model, "web", tmp_path / "app", shapes={"x": (3, 5)}).manifest
    assert manifest["samples"][0]["inputs"]["x"]["shape"] == [3, 5]
