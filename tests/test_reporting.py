"""The report's facts: files, environment, and the decisions that can be replayed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.reporting import environment, file_facts, replayed_stages


def matmul_file(path: Path, *, external: bool) -> Path:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,64] x) => (float[N,64] y) {y = MatMul(x, W)}'
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.float32), "W"))
    Model.load(proto).save(path, external_data=external)
    return path


def test_hashes_and_sizes_count_external_data(tmp_path: Path) -> None:
    path = matmul_file(tmp_path / "m.onnx", external=True)

    facts = file_facts(path)

    data = path.read_bytes() + (tmp_path / "m.onnx.data").read_bytes()
    assert facts == {"path": str(path), "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def test_the_environment_names_versions_and_threads() -> None:
    facts = environment(threads=3)

    assert facts["threads"] == 3
    assert {"onnx", "onnxruntime", "onnxcomp", "numpy"} <= facts["versions"].keys()


def test_replays_the_kept_stages_with_their_options(tmp_path: Path) -> None:
    passes = [{"name": "quantize-weights", "options": {"per_channel": False, "skip": ["W"]}}]
    stages = [
        {"verdict": "kept", "attempts": [{"passes": passes}]},
        {"verdict": "dropped", "attempts": [{"passes": [{"name": "simplify", "options": {}}]}]},
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"stages": stages}))

    [stage] = replayed_stages(path)

    [step] = stage.passes
    assert (step.name, step.options()["per_channel"], list(step.options()["skip"])) == (
        "quantize-weights",
        False,
        ["W"],
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stages": [{"verdict": "kept"}]}'])
def test_refuses_to_replay_what_is_no_report(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)

    with pytest.raises(OptionError, match="is not a report"):
        replayed_stages(path)


def test_refuses_to_replay_options_that_a_pass_does_not_have(tmp_path: Path) -> None:
    passes = [{"name": "simplify", "options": {"magic": 1}}]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"stages": [{"verdict": "kept", "attempts": [{"passes": passes}]}]}))

    with pytest.raises(OptionError, match="magic"):
        replayed_stages(path)
