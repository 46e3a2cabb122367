from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes import Quantize, QuantizeWeights
from onnxcomp_passes._codes import Width, group, nearest, pack
from tests.models import (
    assert_same_outputs,
    external_model,
    graph_model,
    matmul_model,
    mlp_model,
    random_inputs,
    random_weights,
    run,
)
from tests.test_quantize_weights import KINDS, kind_model

Array = np.ndarray[Any, Any]

HALF_STEP = 0.5 + 1e-4
"""Of a scale: rounding to nearest, and float32 rounding of quotient and product."""

NEWEST = 25
"""The first opset that has all the types."""

WIDTHS = [(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
every_width = pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as running:
        yield running


def stored(source: onnx.ModelProto | Model, context: Context | None = None, **options: Any) -> tuple[Model, Changes]:
    """Apply the pass."""
    model = Model.load(source)
    changes = QuantizeWeights(**options).rewrite(model, context or Context())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def left(changes: Changes) -> dict[str, str]:
    return {item.where: item.why for item in changes.left}


def value(model: Model, name: str) -> Array:
    """An inner tensor as ONNX Runtime computes it, with its optimizations off."""
    proto = model.to_proto()
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return np.asarray(run(proto, random_inputs(model.to_proto()))[0])


def tensor_types(model: Model) -> dict[str, int]:
    """The number of initializers by element type."""
    kinds = [onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.to_proto().graph.initializer]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def relative(wanted: Array, got: Array) -> float:
    return float(np.linalg.norm(wanted - got) / np.linalg.norm(wanted))


# --- codes ------------------------------------------------------------------------------------------------------------


@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3).map(lambda n: 16 * n), st.integers(1, 5)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1.0, 1.0, width=32) | st.just(0.0),
    ),
    width=st.sampled_from(WIDTHS),
    form=st.sampled_from(["block", "channel", "tensor"]),
)
def test_no_value_is_off_by_more_than_half_a_scale(weight: Array, width: tuple[int, bool], form: str):
    grouping = group(weight.shape, 1 if form == "channel" else None, 0, 16 if form == "block" else 0)
    made = nearest(weight, grouping, Width(*width))

    values = made.decode().reshape(weight.shape).astype(np.float64)
    scale = np.broadcast_to(made.scale, grouping.shape).reshape(weight.shape).astype(np.float64)

    assert np.all(made.scale >= np.finfo(np.float32).tiny)
    assert made.codes.min() >= Width(*width).low
    assert made.codes.max() <= Width(*width).high
    # Two float32 roundings of code times scale, and of the zero point's place: 255 * 6e-8 each.
    assert np.all(np.abs(values - weight) <= HALF_STEP * scale)
    np.testing.assert_array_equal(values[weight == 0], 0)


@given(
    codes=hnp.arrays(np.int8, st.integers(1, 70), elements=st.integers(-2, 1)),
    stored_bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
)
def test_codes_are_packed_as_onnx_reads_them(codes: Array, stored_bits: int, symmetric: bool):
    codes = codes if symmetric else (codes + 2).astype(np.uint8)
    kind = Width(stored_bits, symmetric).onnx_type(stored_bits)

    tensor = onnx.helper.make_tensor("t", kind, codes.shape, pack(codes, stored_bits), raw=True)

    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(int), codes)


def test_channels_of_denormals_and_of_one_value_decode():
    weight = random_weights(32, 4)
    weight[:, 1] = 1e-40
    weight[:, 2] = -0.75

    for symmetric in (True, False):
        made = nearest(weight, group(weight.shape, 1), Width(4, symmetric))
        assert made.scale[0, 1] == 1.0
        np.testing.assert_array_equal(made.decode()[:, 1], 0)
        np.testing.assert_allclose(made.decode()[:, 2], -0.75, rtol=1e-6)


# --- the form "load" --------------------------------------------------------------------------------------------------


@every_width
def test_every_width_is_decoded_at_load(bits: int, symmetric: bool, runtime: Runtime, tmp_path: Path):
    weight = random_weights(64, 48)
    context = Context(runtime=runtime, workdir=tmp_path)

    model, changes = stored(matmul_model(weight), context, bits=bits, symmetric=symmetric, max_opset=NEWEST)
    model.save(tmp_path / "after.onnx")

    assert changes.count == 1, left(changes)
    assert runtime.census(tmp_path / "after.onnx").counts() == {"MatMul": 1}
    peak = np.abs(weight).max(axis=0) if symmetric else weight.max(axis=0) - weight.min(axis=0)
    step = peak / Width(bits, symmetric).high
    assert np.all(np.abs(value(model, "W") - weight) <= HALF_STEP * step)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_is_stored_in_blocks_where_they_fit(
    kind: str, symmetric: bool, runtime: Runtime, tmp_path: Path
):
    proto, weights = kind_model(kind)
    context = Context(runtime=runtime, workdir=tmp_path)

    model, changes = stored(proto, context, bits=4, block=16, symmetric=symmetric, max_opset=21)

    assert changes.count, left(changes)
    plain = Model.load(proto)
    for change in changes.changed:
        found = value(model, change.where)
        assert relative(weights[change.where], found) < 0.15
        plain.set_weight(change.where, found)
    assert_same_outputs(plain, model, random_inputs(proto), exact=True)


def test_blocks_hold_off_an_outlier():
    weight = random_weights(256, 48)
    weight[7] *= 100

    whole, blocks = (value(stored(matmul_model(weight), bits=4, block=block)[0], "W") for block in (0, 32))

    others = np.arange(256) // 32 != 0
    assert relative(weight[others], blocks[others]) < 0.15 < relative(weight[others], whole[others])


def test_codes_take_the_smallest_type_that_the_opset_has():
    proto = matmul_model(random_weights(64, 48))

    assert tensor_types(stored(proto, bits=4)[0]) == {"FLOAT": 1, "INT8": 1}
    assert tensor_types(stored(proto, bits=3, max_opset=21)[0]) == {"FLOAT": 1, "INT4": 1}
    assert tensor_types(stored(proto, bits=2, max_opset=21)[0]) == {"FLOAT": 1, "INT4": 1}
    assert tensor_types(stored(proto, bits=2, max_opset=25)[0]) == {"FLOAT": 1, "INT2": 1}
    assert tensor_types(stored(proto, bits=5, max_opset=25, symmetric=False)[0]) == {"FLOAT": 2, "UINT8": 1}


def test_the_opset_stays_where_no_type_needs_another():
    proto = matmul_model(random_weights(64, 48))

    assert stored(proto, bits=4)[0].opset == 17
    assert stored(proto, bits=8, max_opset=25)[0].opset == 17
    model, _ = stored(proto, bits=4, max_opset=25)
    assert (model.opset, model.ir_version) == (21, 10)


def test_says_that_the_opset_was_raised():
    _, changes = stored(matmul_model(random_weights(64, 48)), bits=4, max_opset=21)

    assert changes.notes == ["the opset is 21, was 17: the first that can decode them"]


def test_below_opset_7_the_opset_is_raised_to_the_first_whose_mul_onnx_runtime_has():
    text = "g (float[N, 64] x) => (float[N, 48] y) { h = MatMul(x, W) y = Relu(h) }"

    model, changes = stored(graph_model(text, opset=6, W=random_weights(64, 48)))

    assert (model.opset, changes.count) == (7, 1)


@pytest.mark.parametrize("opset", [7, 11, 13, 17, 21, 23, 25])
def test_works_from_opset_7_to_the_newest(opset: int):
    text = "g (float[N, 64] x) => (float[N, 48] y) { h = MatMul(x, W) y = Relu(h) }"
    proto = graph_model(text, opset=opset, ir_version=3 if opset < 9 else 10, W=random_weights(64, 48))
    if proto.ir_version < 4:
        proto.graph.input.append(onnx.helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [64, 48]))

    model, changes = stored(proto, bits=4, block=32, symmetric=False)

    assert changes.count == 1
    assert model.opset == opset
    assert relative(run(proto, feeds := {"x": random_weights(3, 64)})[0], run(model, feeds)[0]) < 0.15


def test_says_which_codes_are_held_in_more_bits_than_they_need():
    _, changes = stored(matmul_model(random_weights(64, 48)), bits=6)

    assert changes.changed[0].what == "64x48 float32 stored as int6 (held in 8 bits)"
    assert changes.notes == ["codes of 6 bits are held in 8: nothing packs them yet"]


# --- options and what is there already --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 8, 24, 48])
def test_refuses_blocks_that_no_kernel_has(block: int):
    message = f"quantize-weights: block must be 0 or a power of two from 16 on, got {block}"

    with pytest.raises(OptionError, match=message):
        QuantizeWeights(block=block)


@pytest.mark.parametrize("bits", [1, 9])
def test_refuses_widths_out_of_range(bits: int):
    with pytest.raises(OptionError, match=f"quantize-weights: bits must be from 2 to 8, got {bits}"):
        QuantizeWeights(bits=bits)


@pytest.mark.parametrize("form", ["load", "compute"])
def test_a_second_time_changes_nothing(form: str):
    model, first = stored(mlp_model((64, 48, 64)), bits=4, block=16, form=form, max_opset=21)
    digest = model.digest

    _, again = stored(model, bits=4, block=16, form=form, max_opset=21)

    assert (first.count, again.count, model.digest) == (2, 0, digest)


def test_weights_that_are_quantized_already_are_left():
    text = """g (float[N, 64] x) => (float[N, 48] y) { w = DequantizeLinear<axis = 1>(W8, scale) y = MatMul(x, w) }"""
    codes = np.random.default_rng(0).integers(-127, 128, (64, 48)).astype(np.int8)
    proto = graph_model(text, W8=codes, scale=np.full(48, 0.01, np.float32))

    model, changes = stored(proto, bits=4, form="compute", block=16, max_opset=21)

    assert (changes.count, model.to_proto()) == (0, proto)


def test_one_element_weights_and_vectors_are_left():
    text = "g (float[N, 1] x) => (float[N, 1] y, float[N] z) { y = MatMul(x, W) z = MatMul(x, v) }"
    proto = graph_model(text, W=random_weights(1, 1), v=random_weights(1))

    _, changes = stored(proto, bits=4, block=16, min_elements=1)

    assert (changes.count, sorted(left(changes))) == (0, ["W", "v"])


@pytest.mark.parametrize("options", [{}, {"bits": 4, "block": 32, "form": "compute", "max_opset": 21}])
def test_what_is_measured_is_what_a_fresh_process_computes(options: dict[str, Any], tmp_path: Path):
    """W8 and W4 round trip: the model in memory, and its file in a worker that never saw it."""
    proto = mlp_model((64, 96, 32))
    feed = random_inputs(proto)
    model, changes = stored(proto, **options)
    here = run(model, feed, optimized=True)

    model.save(tmp_path / "model.onnx")
    with Runtime() as fresh:
        there = next(iter(fresh.run(tmp_path / "model.onnx", [feed])))

    assert changes.count == 2
    np.testing.assert_array_equal(there[0], here[0])
    assert Model.load(tmp_path / "model.onnx").digest == model.digest


MEASURE = """
import sys
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes import QuantizeWeights

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

before = peak_mb()
model = Model.load(sys.argv[1])
changes = QuantizeWeights(bits=4, block=32, form="compute", max_opset=21).rewrite(model, Context())
model.save(sys.argv[2])
print(changes.count, peak_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_a_model_needs_memory_for_its_largest_weights_only(tmp_path: Path):
    path = external_model(tmp_path, layers=16, size=1536)
    weight_mb = 1536 * 1536 * 4 / 2**20

    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "after.onnx")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split()

    assert int(output[0]) == 16
    assert float(output[1]) < 5 * weight_mb  # the weight, its codes, and what Python takes for itself


def test_no_weight_stays_in_memory(tmp_path: Path):
    """Codes and scales are in a file until they are asked for, and survive the temporary folder."""
    model, _ = stored(matmul_model(random_weights(256, 256)), bits=4, block=32, max_opset=21)

    kinds = {type(constant._values.blob).__name__ for constant in model.constants() if constant._values.nbytes > 255}
    copy = model.fork()
    digest = model.digest
    del model

    assert kinds == {"SpooledBlob"}
    assert copy.digest == digest
    copy.save(tmp_path / "model.onnx")
    assert Model.load(tmp_path / "model.onnx").digest == digest


# --- int8 compute on top ----------------------------------------------------------------------------------------------


def test_quantize_takes_over_codes_of_fewer_bits(runtime: Runtime, tmp_path: Path):
    proto = mlp_model((64, 48, 24))
    model, _ = stored(proto, bits=5)
    codes = {constant.values.tobytes() for constant in model.fork().constants() if constant.dtype == np.int8}
    x = random_weights(32, 64, seed=3)
    before = run(model, {"x": x})[0]

    context = Context(data=open_data({"x": x}, input_specs(proto)), runtime=runtime, workdir=tmp_path)
    changes = Quantize().rewrite(model, context)

    assert changes.count == 2
    after = {constant.values.tobytes() for constant in model.fork().constants() if constant.dtype == np.int8}
    assert codes <= after
    assert relative(before, run(model, {"x": x}, optimized=True)[0]) < 0.05


@pytest.mark.parametrize("options", [{"symmetric": False}, {"block": 16}, {"bits": 4, "max_opset": 21}])
def test_quantize_leaves_other_storage_forms_as_they_are(options: dict[str, Any], runtime: Runtime, tmp_path: Path):
    proto = mlp_model((64, 48, 32))
    model, _ = stored(proto, **options)
    digest = model.digest
    x = random_weights(32, 64, seed=3)

    context = Context(data=open_data({"x": x}, input_specs(proto)), runtime=runtime, workdir=tmp_path)
    changes = Quantize().rewrite(model, context)

    assert (changes.count, model.digest) == (0, digest)
    reason = "its weight is stored in blocks, with zero points or packed: int8 kernels take none of these"
    assert set(left(changes).values()) == {reason}
