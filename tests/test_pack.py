"""Packed weights: the same bits after ONNX Runtime decodes them, and after `unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from onnxcomp import Context, Model, OptionError, optimize
from onnxcomp.analysis import count_parameters, weight_table
from onnxcomp.packed import find_packed
from onnxcomp_passes import Cluster, Pack, QuantizeWeights, Simplify, Unpack
from onnxcomp_passes._packing import contents, gaps, layouts, pack_bits
from tests.models import external_model

Array = np.ndarray[Any, Any]
SAMPLES = Path(__file__).parent.parent / "sample_models"


def holding(value: Array, opset: int = 13) -> Model:
    """A model that gives back its weight W, and reads it in a second place."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["W"], ["y"]), helper.make_node("Shape", ["W"], ["s"])],
        "g",
        [],
        [
            helper.make_tensor_value_info("y", kind, list(value.shape)),
            helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [value.ndim]),
        ],
        [numpy_helper.from_array(value, "W")],
    )
    return Model.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7))


def session(model: Model, level: Any = ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(model.to_proto().SerializeToString(), options)


def weights(dtype: str, elements: int) -> st.SearchStrategy[Array]:
    """Weights of few or many values, none to all of them the same, with runs of zeros of any length."""

    def made(seed: int, zeros: float, values: int, shape: tuple[int, ...]) -> Array:
        rng = np.random.default_rng(seed)
        pool = rng.integers(0, 256, values * np.dtype(dtype).itemsize, np.uint8).view(dtype)
        array = rng.choice(pool, shape)
        array[rng.random(shape) < zeros] = 0
        return array

    shapes = st.sampled_from([(elements,), (elements // 7, 7), (3, elements // 15, 5), (elements + 1,)])
    zeros = st.sampled_from([0.0, 0.3, 0.7, 0.9, 0.99, 0.999, 1.0])
    return st.builds(made, st.integers(0, 1 << 30), zeros, st.sampled_from([1, 2, 3, 15, 100, 5000]), shapes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_every_bit_comes_back_from_onnxruntime_and_from_unpack(dtype: str, data: st.DataObject) -> None:
    value = data.draw(weights(dtype, 6000))
    model = holding(value)
    before = model.size_bytes
    changes = Pack().rewrite(model, Context())
    if changes.count:
        assert model.size_bytes < before
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert session(model, level).run(["y"], {})[0].tobytes() == value.tobytes()
    Unpack().rewrite(model, Context())
    [constant] = model.constants()
    assert constant.name == "W"
    assert constant.values.tobytes() == value.tobytes()


@given(
    places=st.lists(st.integers(0, 3000), unique=True, max_size=60).map(sorted),
    bits=st.sampled_from([4, 8]),
)
def test_gaps_lead_to_every_place(places: list[int], bits: int) -> None:
    steps, index = gaps(np.array(places, np.int64), bits)
    assert steps.max(initial=0) < 1 << bits
    reached = np.cumsum(steps.astype(np.int64))
    assert reached[index >= 0].tolist() == places
    assert not set(reached[index < 0].tolist()) & set(places) or not places


@given(codes=st.lists(st.integers(0, 15), max_size=40), bits=st.just(4))
def test_codes_share_bytes_lowest_bits_first(codes: list[int], bits: int) -> None:
    packed = pack_bits(np.array(codes, np.uint8), bits)
    assert packed.size == -(-len(codes) // 2)
    unpacked = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    assert unpacked[: len(codes)].tolist() == codes


def test_minus_zero_and_nan_payloads_are_kept() -> None:
    value = np.zeros(4000, np.float32)
    value[::50] = -0.0
    value[7] = np.array([0x7FC12345], np.uint32).view(np.float32)[0]
    model = holding(value)
    assert Pack().rewrite(model, Context()).count == 1
    assert session(model).run(["y"], {})[0].tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("zeros", "values", "told"),
    [
        (0.0, 16, "4-bit codes:"),
        (0.0, 200, "8-bit codes:"),
        (0.5, 15, "4-bit codes and a mask"),
        (0.8, 15, "4-bit codes and 4-bit gaps"),
        (0.97, 15, "4-bit codes and 8-bit gaps"),
        (0.97, 4000, "values and 8-bit gaps"),
        (0.5, 4000, "values and a mask"),
        (0.998, 4000, "8-bit codes and 8-bit gaps"),
        (1.0, 1, "one value"),
    ],
)
def test_the_smallest_form_is_taken(zeros: float, values: int, told: str) -> None:
    rng = np.random.default_rng(3)
    value = rng.choice(rng.normal(size=values).astype(np.float32), 20_000)
    value[rng.random(20_000) < zeros] = 0
    [change] = Pack().rewrite(holding(value), Context()).changed
    assert told in change.what


@pytest.mark.parametrize("ones", [0, 1, 9])
def test_a_packed_bias_passes_the_full_check(ones: int) -> None:
    bias = np.zeros(400, np.float32)
    bias[:ones] = 1
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 8] x) => (float[N, 400] y) { y = Gemm(x, w, b) }'
    )
    weight = np.random.default_rng(0).normal(size=(8, 400)).astype(np.float32)
    proto.graph.initializer.extend([numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")])
    model = Model.load(proto)

    assert Pack().rewrite(model, Context()).changed[0].where == "b"

    onnx.checker.check_model(model.to_proto(), full_check=True)


@pytest.mark.parametrize(("zeros", "packed"), [(0.05, 0), (0.1, 1)])
def test_a_weight_that_saves_next_to_nothing_stays_dense(zeros: float, packed: int) -> None:
    value = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    value[: round(zeros * value.size)] = 0

    assert Pack().rewrite(holding(value), Context()).count == packed


def test_weights_of_all_different_values_stay_dense() -> None:
    model = holding(np.random.default_rng(0).normal(size=5000).astype(np.float32))
    before = model.digest
    assert not Pack().rewrite(model, Context()).count
    assert model.digest == before


def pruned(path: Path, share: float = 0.8) -> Model:
    """A sample model with its smallest weights cut and 16 values a weight."""
    model = Model.load(path)
    Simplify().rewrite(model, Context())
    for constant in list(model.constants()):
        value = constant.values
        if value.dtype == np.float32 and value.size > 500:
            constant.values = np.where(np.abs(value) < np.quantile(np.abs(value), share), np.float32(0), value)
    Cluster(bits=4).rewrite(model, Context())
    return model


@pytest.mark.parametrize("name", ["fashion_lenet", "fashion_mobilenet", "fashion_vit"])
@pytest.mark.parametrize(
    "level", [ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]
)
def test_packed_models_compute_the_same_bits_with_the_same_kernels(name: str, level: Any, tmp_path: Path) -> None:
    dense = pruned(SAMPLES / f"{name}.onnx")
    packed = dense.fork()
    assert Pack().rewrite(packed, Context()).count
    assert packed.size_bytes < dense.size_bytes / 5
    feed = {"image": np.load(SAMPLES / "fashion_calib.npz")["image"][:4]}
    wanted = session(dense, level).run(None, feed)
    for one, other in zip(wanted, session(packed, level).run(None, feed), strict=True):
        assert one.tobytes() == other.tobytes()
    ops = []
    for number, model in enumerate((dense, packed)):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(tmp_path / f"{number}.onnx")
        ort.InferenceSession(model.to_proto().SerializeToString(), options)
        ops.append([node.op_type for node in onnx.load(tmp_path / f"{number}.onnx").graph.node])
    assert ops[0] == ops[1]


def test_simplify_and_a_second_pack_leave_packed_weights_alone() -> None:
    model = pruned(SAMPLES / "fashion_lenet.onnx")
    Pack().rewrite(model, Context())
    before = model.digest
    assert not Pack().rewrite(model, Context()).count
    assert not Simplify().rewrite(model, Context()).count
    assert model.digest == before
    assert len(find_packed(model)) == 3


def test_stored_and_dequantized_codes_are_packed() -> None:
    model = pruned(SAMPLES / "fashion_lenet.onnx")
    QuantizeWeights().rewrite(model, Context())
    stored = model.size_bytes
    assert Pack().rewrite(model, Context()).count >= 3
    assert model.size_bytes < stored / 2


def test_external_data_may_be_packed(tmp_path: Path) -> None:
    model = Model.load(external_model(tmp_path))
    for constant in list(model.constants()):
        constant.values = np.sign(constant.values).astype(constant.dtype)
    assert Pack().rewrite(model, Context()).count
    model.save(tmp_path / "out.onnx")
    assert find_packed(Model.load(tmp_path / "out.onnx"))


def test_layouts_tell_the_bytes_that_are_written() -> None:
    rng = np.random.default_rng(1)
    value = np.where(rng.random(10_000) < 0.9, 0, rng.integers(-7, 8, 10_000)).astype(np.int8)
    found = contents(value)
    assert found is not None
    assert found.book is not None
    entries = gaps(found.others, 8)[0].size
    by_name = {(layout.places, layout.bits): layout.nbytes for layout in layouts(found)}
    assert by_name["gaps8", 4] == -(-entries * 12 // 8) + found.book.size
    assert by_name["mask", 0] == 1250 + found.others.size + 1


def test_unpack_keeps_a_model_larger_than_its_input(tmp_path: Path) -> None:
    packed = pruned(SAMPLES / "fashion_lenet.onnx")
    dense = packed.weight("1.weight")
    Pack().rewrite(packed, Context())
    result = optimize(packed, passes=[Unpack()])
    assert [stage.verdict for stage in result.report.stages] == ["kept"]
    assert result.model.size_bytes > 5 * packed.size_bytes
    assert result.model.weight("1.weight").tobytes() == dense.tobytes()


def test_a_lossy_pass_after_pack_is_refused_before_any_work() -> None:
    with pytest.raises(OptionError, match="cluster cannot look into the weights that pack has written"):
        optimize(SAMPLES / "fashion_lenet.onnx", passes=[Pack(), Cluster(bits=4)])
    optimize(pruned(SAMPLES / "fashion_lenet.onnx"), passes=[Pack(), Unpack(), Cluster(bits=3), Pack()], force=True)


def test_parameters_and_zeros_of_packed_weights_are_those_of_the_dense_ones() -> None:
    dense = pruned(SAMPLES / "fashion_lenet.onnx")
    packed = dense.fork()
    Pack().rewrite(packed, Context())
    assert count_parameters(packed) == count_parameters(dense)
    rows = {row.name: row for row in weight_table(packed)}
    assert rows["1.weight"].op == "Gemm"
    assert rows["1.weight"].bytes < 235_200


def test_optimizing_a_packed_model_again_changes_nothing() -> None:
    packed = pruned(SAMPLES / "fashion_lenet.onnx")
    Pack().rewrite(packed, Context())
    assert optimize(packed).model.digest == packed.digest


def test_what_is_excluded_is_told_and_stays_dense() -> None:
    model = pruned(SAMPLES / "fashion_lenet.onnx")
    changes = Pack(skip=("1.weight",)).rewrite(model, Context())
    assert [(left.where, left.why) for left in changes.left] == [("1.weight", "excluded")]
    assert {change.where for change in changes.changed} == {"3.weight", "5.weight"}


@given(seed=st.integers(0, 1000), zeros=st.sampled_from([0.0, 0.02, 0.03, 0.04, 0.1]))
def test_what_is_looked_at_no_further_would_not_have_become_smaller(seed: int, zeros: float) -> None:
    rng = np.random.default_rng(seed)
    value = rng.normal(size=4000).astype(np.float32)
    value[rng.random(4000) < zeros] = 0
    mask_bytes = 4000 / 8
    if contents(value) is None:
        assert 4 * np.count_nonzero(value == 0) <= mask_bytes
    else:
        assert 4 * np.count_nonzero(value == 0) > mask_bytes
