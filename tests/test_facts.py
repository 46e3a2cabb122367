from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from rich.console import Console

import onnxcomp
from onnxcomp.advice import Advice, advise
from onnxcomp.errors import ModelError, OptionError
from onnxcomp.facts import ModelFacts, inspect
from onnxcomp.passes import registered_passes
from onnxcomp.report.document import jsonable
from onnxcomp.report.views import print_facts
from tests.small import CLASSES, HIDDEN, INPUTS, classifier

MACS = INPUTS * HIDDEN + HIDDEN * CLASSES


def model(body: str, **weights: np.ndarray[Any, Any]) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {body}')
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return proto


def shown(
    facts: ModelFacts, advice: Sequence[Advice] = (), *, width: int = 100, terminal: bool = False, verbose: bool = False
) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    print_facts(facts, list(advice), console, verbose=verbose)
    return file.getvalue()


def test_tells_what_is_in_a_model():
    facts = inspect(classifier())
    assert [(end.name, end.type) for end in facts.inputs] == [("x", "float32 (N, 32)")]
    assert [(end.name, end.type) for end in facts.outputs] == [("scores", "float32 (N, 4)")]
    assert facts.operators == {"Gemm": 2, "Relu": 1, "Identity": 1}
    assert facts.opset == 17
    assert facts.parameters == MACS + HIDDEN
    assert facts.total_macs == MACS
    assert facts.macs["first"] == INPUTS * HIDDEN
    assert not facts.quantized


def test_shapes_change_the_multiply_accumulates():
    assert inspect(classifier(), shapes={"x": [8, INPUTS]}).total_macs == 8 * MACS
    with pytest.raises(OptionError, match="'x'"):
        inspect(classifier(), shapes={"x": [8, 5]})


def test_typical_sizes_stand_in_for_dynamic_ones():
    facts = inspect(
        model(
            "g (int64[batch,seq] ids) => (float[batch,seq,6] y) { e = Gather(t, ids) [mm] y = MatMul(e, w) }",
            t=np.ones((50, 8), np.float32),
            w=np.ones((8, 6), np.float32),
        )
    )
    assert facts.mac_shapes == {"ids": (1, 16)}
    assert facts.total_macs == 16 * 48


def test_a_model_that_cannot_be_fed_is_inspected_all_the_same():
    facts = inspect(model("g (seq(float[N]) x) => (int64 n) { n = SequenceLength(x) }"))
    assert facts.inputs[0].type == "sequence"
    assert "typical input shapes could not be settled" in facts.notes[0]


def test_is_plain_data_for_json():
    document = json.loads(json.dumps(jsonable(inspect(classifier()).to_dict()), allow_nan=False))
    assert document["total_macs"] == MACS
    assert document["weights"][0]["name"] == "w1"
    assert document["path"] is None


def test_is_public():
    assert onnxcomp.inspect is inspect
    assert onnxcomp.advise is advise


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        inspect(tmp_path / "no.onnx")


# --- advice -----------------------------------------------------------------------------------------------------------


def techniques(proto: onnx.ModelProto) -> dict[str, Advice]:
    return {item.technique: item for item in advise(inspect(proto))}


def big(**changes: np.ndarray[Any, Any]) -> onnx.ModelProto:
    weights = {"w": np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32), **changes}
    return model("g (float[N,512] x) => (float[N,512] y) { i = Identity(x) y = MatMul(i, w) }", **weights)


def test_every_estimate_is_called_one():
    assert all(item.estimate.startswith("estimated: ") for item in advise(inspect(big())))


def test_float_weights_are_worth_storing_small():
    item = techniques(big())["quantize-weights"]
    assert item.reason == "1.05 MB of 1.05 MB are float32 weights"
    assert "3.8 times smaller" in item.estimate
    assert item.available


def test_much_work_on_weights_is_worth_int8():
    assert "faster" in techniques(big())["quantize"].estimate


def test_little_work_is_not_worth_int8():
    assert techniques(classifier())["quantize"].estimate == "estimated: little or no gain in speed"


def test_a_quantized_model_is_left_alone():
    quantized = model(
        "g (float[N,64] x) => (float[N,64] y) { w = DequantizeLinear(q, s) y = MatMul(x, w) }",
        q=np.ones((64, 64), np.int8),
        s=np.array(0.1, np.float32),
    )
    item = techniques(quantized)["quantize"]
    assert (item.reason, item.estimate) == ("it computes in quantized values already", "estimated: nothing to gain")
    assert "quantize-weights" not in techniques(quantized)


def test_large_matrices_suit_a_low_rank():
    assert "low-rank" in techniques(big())
    assert "low-rank" not in techniques(classifier())


def test_many_zeros_suit_packing():
    weight = np.zeros((512, 512), np.float32)
    weight[:64] = 1
    assert "87.5% of the parameters are zero" in techniques(big(w=weight))["pack"].reason


def test_what_no_installed_pass_does_is_said_to_be_missing(monkeypatch):
    others = {name: found for name, found in registered_passes().items() if name != "low-rank"}
    monkeypatch.setattr("onnxcomp.advice.registered_passes", lambda: others)
    facts = inspect(big())
    assert "low-rank" in {item.technique for item in advise(facts) if not item.available}
    assert "(no such pass is installed)" in shown(facts, advise(facts))


# --- showing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_shows_layers_with_their_shares(terminal):
    text = shown(inspect(classifier()), terminal=terminal)
    line = next(line for line in text.splitlines() if "head" in line and "Gemm" in line)
    cells = [cell for cell in line.split() if cell.isascii()]  # the rest are bars
    assert cells == ["head", "Gemm", "48x4", "float32", "768", "B", "0%", "11.1%"]


@pytest.mark.parametrize("width", [50, 100])
def test_fits_the_terminal(width):
    facts = inspect(big())
    assert all(len(line) <= width for line in shown(facts, advise(facts), width=width, terminal=True).splitlines())


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_neither_markup_nor_control_codes(terminal):
    proto = classifier()
    proto.graph.node[0].name = "\x1b[31m[red]evil[/red]\nnext"
    text = shown(inspect(proto), width=200, terminal=terminal)
    assert "\\x1b[31m[red]evil[/red]\\nnext" in text
    assert "\x1b" not in text
