"""Reports as rows for data frames."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import pytest

from onnxcomp.compared import Comparisons
from onnxcomp.errors import OptionError
from onnxcomp.ledger import Report, StageEntry
from onnxcomp.report import from_json, schema, to_json
from tests.comparisons import candidate, failed, sample_comparison
from tests.reports import layer, sample_report

KINDS = [
    *((sample_report, kind) for kind in ("attempts", "stages", "figures", "layers")),
    *((sample_comparison, kind) for kind in ("models", "layers")),
]


def late() -> Report:
    """A report whose figures and texts are known of its last layers and stages only."""
    unknown = dict.fromkeys(("sqnr_db", "error", "macs", "reason", "weight_bytes_after", "tensor", "weight_shape"))
    report = sample_report(layers=[*(layer(f"conv{number}", **unknown) for number in range(300)), layer("last")])
    report.stages[:0] = [StageEntry(f"stage {number}", "unchanged", "nothing to do", 0.0) for number in range(300)]
    return report


@pytest.fixture(params=["pandas", "polars"])
def frames(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.mark.parametrize(("made", "kind"), KINDS)
def test_every_row_has_the_same_columns_and_a_column_one_type(made, kind):
    rows = made().to_frame(kind) + (late().to_frame(kind) if made is sample_report else [])
    if kind == "layers" and made is sample_report:
        rows += sample_report(layers=[layer("a")]).to_frame(kind)
    types = {tuple((name, type(value)) for name, value in row.items()) for row in rows}
    assert len(types) == 1
    assert {kind for _, kind in next(iter(types))} <= {str, float, bool}


@pytest.mark.parametrize("kind", ["attempts", "stages", "figures", "layers"])
def test_a_data_frame_is_made_of_a_report_whatever_comes_first(frames, kind):
    rows = late().to_frame(kind)
    frame: Any = frames.DataFrame(rows)
    assert list(frame.columns) == list(rows[0])
    assert frame.shape == (len(rows), len(rows[0]))


@pytest.mark.parametrize("kind", ["models", "layers"])
def test_a_data_frame_is_made_of_a_comparison(frames, kind):
    rows = sample_comparison(failed(), candidate(layers=[layer("a")])).to_frame(kind)
    frame: Any = frames.DataFrame(rows)
    assert frame.shape == (len(rows), len(rows[0]))


def test_the_figures_in_a_frame_are_numbers(frames):
    frame: Any = frames.DataFrame(sample_report().to_frame())
    assert list(frame["drop"])[-2:] == [0.021, 0.002]
    assert frame["drop"].max() == 0.021


def test_each_form_of_each_stage_has_a_row_and_so_has_a_stage_without_any():
    rows = sample_report().to_frame()
    assert [(row["stage"], row["form"], row["verdict"], row["kept"]) for row in rows[2:]] == [
        ("quantize", 1.0, "dropped", False),
        ("quantize", 2.0, "kept", True),
    ]
    assert rows[1]["stage"] == "quantize-weights"
    assert isinstance(rows[1]["form"], float)
    assert math.isnan(rows[1]["form"])
    assert (rows[2]["drop_low"], rows[2]["drop_high"]) == (0.01, 0.03)
    assert rows[3]["setting"] == "float_nodes=/head/Gemm"


def test_shapes_are_text():
    [row] = sample_report(layers=[layer("a", output_shape=[None, 24, "h", 14])]).to_frame("layers")
    assert (row["output_shape"], row["weight_shape"]) == ("?x24xhx14", "24x1x3x3")


def test_a_row_of_a_layer_has_all_that_the_report_tells_of_it_but_the_panel():
    [row] = sample_report(layers=[layer("a", rank=[8, 16], cause="rounding", time_ms_after=0.5)]).to_frame("layers")
    assert row.keys() == schema()["$defs"]["layer"]["properties"].keys() - {"detail"}
    assert (row["rank"], row["cause"], row["time_ms_after"]) == ("8x16", "rounding", 0.5)


def test_what_is_read_back_from_json_gives_the_same_rows():
    report = sample_report(layers=[layer("a")])
    assert from_json(to_json(report)).to_frame("layers") == report.to_frame("layers")


def test_the_original_is_the_first_of_the_models_and_a_failed_one_has_no_figures():
    rows = sample_comparison().to_frame()
    assert [row["verdict"] for row in rows] == ["original", "better", "no gain", "over", "failed"]
    assert (rows[0]["speed"], rows[0]["size_bytes"], rows[1]["speed"]) == (1.0, 754_883.0, 1.8)
    figures = {name: value for name, value in rows[-1].items() if isinstance(value, float)}
    assert all(math.isnan(value) for value in figures.values())


def test_layers_of_a_comparison_name_their_model():
    assert [(row["model"], row["name"]) for row in sample_comparison().to_frame("layers")] == [
        ("int8.onnx", "conv1"),
        ("int8.onnx", "conv2"),
        ("pruned.onnx", "conv1"),
    ]


def test_a_pair_has_a_row_for_each_of_the_two():
    found = sample_comparison()
    rows = found.pair(found.candidates[0]).to_frame()
    assert [(row["model"], row["size"]) for row in rows] == [("model.onnx", 1.0), ("int8.onnx", 3.6)]


@pytest.mark.parametrize("made", [sample_report, sample_comparison])
def test_rows_that_there_are_not_are_refused_with_those_that_there_are(made):
    found: Report | Comparisons = made()
    with pytest.raises(OptionError, match=r"to_frame: expected rows to be one of .*layers, got 'colours'"):
        found.to_frame("colours")
