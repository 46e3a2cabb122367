"""The layers of two models side by side."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from onnxcomp.comparison import Comparison, compare
from onnxcomp.data import input_specs, open_data
from onnxcomp.layer_table import LayerRow, ModelLayers, layer_rows
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.report.views import print_comparison
from onnxcomp.runtime import Census, KernelNode, Runtime
from onnxcomp.targets import find_target
from onnxcomp_passes.quantize import Quantize
from onnxcomp_passes.simplify import Simplify
from tests.models import graph_model, if_model, mlp_model, random_weights

SAMPLES = Path(__file__).parent.parent / "sample_models"
DATA = SAMPLES / "fashion_calib.npz"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def rows_of(one: Any, other: Any, data: Any = None) -> list[LayerRow]:
    found = compare(one, other, data=data, timing=False, layers=True).layers
    assert found is not None
    return found


def by_name(rows: list[LayerRow]) -> dict[str, LayerRow]:
    return {row.name: row for row in rows}


def census_of(*kernels: tuple[str, str, str]) -> Census:
    """Kernels by operator, name and output."""
    return Census(tuple(KernelNode(op, "", name, (), (output,), False) for op, name, output in kernels), 0)


@pytest.fixture(scope="module", params=["x86-vnni", "arm64"])
def int8(request: pytest.FixtureRequest, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory):
    """The mobilenet with its batch norms, and made int8 for a target."""
    folder = tmp_path_factory.mktemp(request.param)
    model = Model.load(SAMPLES / "fashion_mobilenet.onnx")
    data = open_data(DATA, input_specs(model.proto())).subset(range(16))
    context = Context(data=data, runtime=runtime, workdir=folder, target=find_target(request.param))
    for step in (Simplify(), Quantize()):
        step.rewrite(model, context)
    model.save(folder / "int8.onnx")
    found = compare(
        SAMPLES / "fashion_mobilenet.onnx", folder / "int8.onnx",
        data={"image": np.concatenate([feed["image"] for feed in data.feeds()])},
        target=request.param, timing=False, layers=True,
    )  # fmt: skip
    return request.param, found


# --- a quantized model ------------------------------------------------------------------------------------------------


def test_every_layer_of_a_quantized_model_has_its_int8_kernel_and_its_error(int8):
    target, found = int8
    layers = [
        node for node in onnx.load(SAMPLES / "fashion_mobilenet.onnx").graph.node if node.op_type in {"Conv", "Gemm"}
    ]

    assert sorted(row.name for row in found.layers) == sorted(node.name for node in layers)
    for row in found.layers:
        assert row.where == "both"
        assert row.kernel_before == row.op
        assert row.kernel_after == {"Conv": "QLinearConv", "Gemm": "QGemm"}[row.op] or target == "arm64"
        assert row.reason is None or target == "arm64"
        assert 20 < row.sqnr_db < 50
        assert row.error == pytest.approx(10 ** (-row.sqnr_db / 20))


def test_the_worst_layer_comes_first(int8):
    decibels = [row.sqnr_db for row in int8[1].layers]
    assert decibels == sorted(decibels)


def test_shapes_and_bytes_are_told(int8):
    row = by_name(int8[1].layers)["/14/Gemm"]
    assert (row.output_shape, row.weight_shape) == ((1, 10), (10, 240))
    assert (row.weight_bytes_before, row.weight_bytes_after) == (9600, 2400)


def test_a_quantized_layer_without_an_int8_kernel_says_why():
    text = """g (float[N,3,8,8] x) => (float[N,4,6,6] y) {
        xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear(w, s)
        [conv] y = Conv(xd, wd)
    }"""
    weights = {"s": np.float32(0.02), "z": np.uint8(128), "w": np.ones((4, 3, 3, 3), np.int8)}
    plain = graph_model("g (float[N,3,8,8] x) => (float[N,4,6,6] y) { [conv] y = Conv(x, w) }",
                        w=np.full((4, 3, 3, 3), 0.02, np.float32))  # fmt: skip
    (row,) = rows_of(plain, graph_model(text, weights))

    assert row.kernel_after == "Conv"
    assert row.reason is not None
    assert "is a graph output" in row.reason
    assert row.tensor == "y"


def test_16_bit_activations_are_no_miss_for_a_target_that_has_their_kernels():
    text = """g (float[N,3,8,8] x) => (float[N,4,6,6] y) {
        xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear(w, s)
        [conv] c = Conv(xd, wd) q = QuantizeLinear(c, s, z) y = DequantizeLinear(q, s, z)
    }"""
    weights = {"s": np.float32(0.02), "z": np.uint16(32768), "w": np.ones((4, 3, 3, 3), np.int8)}
    model = graph_model(text, weights, opset=21, ir_version=10)
    for target, missed in (("qnn", False), ("x86-vnni", True)):
        found = compare(model, model, target=target, timing=False, layers=True)
        assert found.layers is not None
        assert (found.layers[0].reason is not None) is missed
        assert (found.after.int8_macs == 0) is missed


# --- which layers belong together -------------------------------------------------------------------------------------


def test_equal_models_have_no_error_in_any_layer():
    rows = rows_of(mlp_model((8, 16, 4)), mlp_model((8, 16, 4)))
    assert [(row.sqnr_db, row.error, row.where) for row in rows] == [(math.inf, 0.0, "both")] * 2


def test_the_layer_with_a_changed_weight_comes_first_with_the_exact_error():
    text = "g (float[N,8] x) => (float[N,4] y) { [a] p = MatMul(x, u) [b] q = MatMul(x, v) y = Add(p, q) }"
    u, v, noise = (random_weights(8, 4, seed=seed) for seed in range(3))
    x = random_weights(32, 8, seed=5)
    changed = v + np.float32(0.1) * noise
    rows = rows_of(graph_model(text, u=u, v=v), graph_model(text, u=u, v=changed), {"x": x})

    wide = x.astype(np.float64)
    signal, error = wide @ v, wide @ (changed.astype(np.float64) - v)
    assert [row.name for row in rows] == ["b", "a"]
    assert rows[0].sqnr_db == pytest.approx(20 * math.log10(np.linalg.norm(signal) / np.linalg.norm(error)), abs=1e-4)
    assert rows[1].sqnr_db == math.inf


def test_a_convolution_is_compared_behind_the_batch_norm_that_the_other_model_folded():
    weights = {"w": random_weights(4, 3, 3, 3), "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32)}
    text = "g (float[N,3,8,8] x) => (float[N,4,6,6] y) {{ {} }}"
    one = graph_model(
        text.format("[a] c = Conv(x, w) n = BatchNormalization(c, one, zero, zero, one) y = Relu(n)"), weights
    )
    other = graph_model(text.format("[b] n = Conv(x, w) y = Relu(n)"), weights)
    (row,) = rows_of(one, other)

    assert (row.name, row.where, row.tensor) == ("a", "both", "n")
    assert row.error is not None
    assert row.error < 1e-4


def test_layers_that_only_one_model_has_come_last_and_say_so():
    weight = random_weights(8, 4)
    one = graph_model("g (float[N,8] x) => (float[N,4] y) { [all] y = MatMul(x, w) }", w=weight)
    other = graph_model(
        "g (float[N,8] x) => (float[N,4] y) { [thin] t = MatMul(x, a) [wide] y = MatMul(t, b) }",
        a=weight, b=np.eye(4, dtype=np.float32),
    )  # fmt: skip
    rows = rows_of(one, other)

    assert [(row.name, row.where, row.tensor) for row in rows] == [("all", "both", "y"), ("thin", "new", None)]
    assert (rows[1].sqnr_db, rows[1].error) == (None, None)
    assert (rows[1].weight_bytes_before, rows[1].kernel_before) == (None, None)
    assert rows[1].weight_bytes_after == weight.nbytes
    assert [(row.name, row.where) for row in rows_of(other, one)] == [("wide", "both"), ("thin", "original")]


def test_a_layer_in_a_subgraph_is_listed_without_an_error():
    model = graph_model(
        """g (bool flag, float[2,3] x) => (float[2,3] y) {
            y = If(flag) <then_branch = a () => (float[2,3] p) { [inner] p = MatMul(x, w) },
                          else_branch = b () => (float[2,3] q) { q = Identity(x) }>
        }""",
        w=random_weights(3, 3),
    )
    (row,) = rows_of(model, model)
    assert (row.name, row.where, row.tensor, row.kernel_after) == ("inner", "both", None, "MatMul")


def test_a_recurrent_layer_may_leave_its_first_output_out():
    model = graph_model(
        """g (float[5,N,3] x) => (float[1,N,2] y) {
            [cell] , y = LSTM<hidden_size = 2>(x, w, r)
        }""",
        w=random_weights(1, 8, 3), r=random_weights(1, 8, 2),
    )  # fmt: skip
    (row,) = rows_of(model, model)
    assert (row.op, row.tensor, row.kernel_after, row.sqnr_db) == ("LSTM", "y", "LSTM", math.inf)
    assert row.output_shape == (1, 1, 2)
    assert row.weight_shape == (1, 8, 3)


def test_a_model_without_layers_has_none():
    assert rows_of(if_model(), if_model()) == []


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (("QLinearConv", "c1_token_3", "t"), "QLinearConv"),
        (("FusedConv", "fused c1", "r"), "FusedConv"),
        (("Conv", "r_nchwc", "reorder"), "Conv"),
        (("FusedConv", "other", "r"), "FusedConv"),
        (("Relu", "other", "r"), None),
        (("Conv", "other", "else"), None),
    ],
)
def test_a_kernel_is_found_by_its_name_or_by_what_it_writes(kernel: tuple[str, str, str], expected: str | None):
    model = Model.load(
        graph_model("g (float[N,3,8,8] x) => (float[N,4,6,6] y) { [c1] c = Conv(x, w) r = Relu(c) y = Neg(r) }",
                    w=random_weights(4, 3, 3, 3))
    )  # fmt: skip
    layers = ModelLayers(model, census_of(kernel), {"x": (1, 3, 8, 8)})
    (row,) = layer_rows(layers, layers, {})
    assert row.kernel_before == row.kernel_after == expected


def test_a_layer_tells_how_its_weight_is_stored_and_how_much_of_it_is_zero():
    weight = random_weights(4, 3, 3, 3)
    weight[0] = 0
    text = "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { [c1] y = Conv(x, w) }"
    layers = ModelLayers(Model.load(graph_model(text, w=weight)), census_of(("Conv", "c1", "y")), {"x": (1, 3, 8, 8)})
    (row,) = layer_rows(layers, layers, {})
    assert (row.weight_before, row.weight_type_before, row.weight_zeros_before) == ("w", "float32", 0.25)
    assert (row.weight_after, row.weight_type_after, row.weight_zeros_after) == ("w", "float32", 0.25)


# --- shown ------------------------------------------------------------------------------------------------------------


def shown(comparison: Comparison, *, terminal: bool = False, verbose: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)
    print_comparison(comparison, console, verbose=verbose)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(mlp_model((8, 16, 4)), mlp_model((8, 16, 4), seed=3), timing=False, layers=True)


@pytest.fixture
def altered(comparison: Comparison) -> Callable[..., Comparison]:
    assert comparison.layers is not None
    row = comparison.layers[0]
    return lambda count=1, **changes: dataclasses.replace(
        comparison, layers=[dataclasses.replace(row, **changes)] * count
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_is_shown(comparison: Comparison, terminal: bool):
    text = shown(comparison, terminal=terminal)
    line = next(line for line in text.splitlines() if "16x4" in line)
    assert all(part in line for part in ("y", "Gemm", "1x4", "256 B", " dB"))
    assert text.isascii() or terminal


def test_without_layers_there_is_no_table(comparison: Comparison):
    assert "layer " not in shown(dataclasses.replace(comparison, layers=None))
    assert "none has a Conv" in shown(dataclasses.replace(comparison, layers=[]))


def test_long_names_keep_their_end_and_verbose_all_of_them(altered: Callable[..., Comparison]):
    name = "/model/" + "encoder/" * 8 + "query/MatMul"
    text = shown(altered(name=name))
    assert name not in text
    assert "query/MatMul" in text
    assert name in shown(altered(name=name), verbose=True)


def test_many_layers_are_cut_but_for_verbose(altered: Callable[..., Comparison]):
    assert "and 10 more (-v shows them)" in shown(altered(30))
    assert "more (-v" not in shown(altered(30), verbose=True)


def test_what_is_not_known_is_told_in_words(altered: Callable[..., Comparison]):
    nothing = {"tensor": None, "sqnr_db": None, "error": None}
    assert "not in both: new only" in shown(altered(where="new", **nothing))
    assert "not in both" in shown(altered(**nothing))
    assert "exact" in shown(altered(sqnr_db=math.inf, error=0.0))
    assert "no match" in shown(altered(sqnr_db=-math.inf, error=math.inf))
    assert "its result goes to Relu" in shown(altered(reason="its result goes to Relu"))


def test_names_cannot_move_the_cursor(altered: Callable[..., Comparison]):
    for terminal in (False, True):
        assert "\x1b[2J" not in shown(altered(name="a\x1b[2J", op="b\x1b[2J"), terminal=terminal)
