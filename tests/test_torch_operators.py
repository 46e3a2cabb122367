"""What the bridge's operators do beyond ONNX's own models, what it says of those it lacks, and the sample models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from onnxcomp.errors import RequirementError
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.torch_bridge import NodeCall, load
from onnxcomp.torch_bridge.registry import find_operator
from onnxcomp_passes import Float16
from tests.models import graph_model, random_weights

Array = np.ndarray[Any, Any]

SAMPLES = sorted((Path(__file__).parent.parent / "sample_models").glob("*.onnx"))

FORWARD_TOLERANCE = 1e-4
"""Of logits below ten after some tens of layers of float32."""

HALF_ROUNDING = 2e-2
"""Of logits below ten after three layers of float16: some roundings of 2**-11 relative."""

ROUNDING = 1e-5
"""Of values below ten, which are sums of some hundred products."""


def call(op: str, *inputs: Any, domain: str = "", opset: int = 17, outputs: int = 1, **attrs: Any) -> Any:
    function = find_operator(domain, op)
    assert function is not None
    return function(NodeCall("n", op, domain, opset, attrs, wanted=(True,) * outputs), *inputs)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_sample_models_give_what_onnxruntime_gives(path):
    images = np.load(path.parent / "fashion_test.npz")["image"][:16]
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"image": images})[0]
    model = Model.load(path)
    module = load(model)

    got = module(torch.from_numpy(images))
    got.sum().backward()

    np.testing.assert_allclose(got.detach(), expected, atol=FORWARD_TOLERANCE)
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.write_back(model) == []


def test_the_state_of_a_module_can_be_kept_and_loaded():
    module = load(SAMPLES[-1])
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    assert any("." in name for name in kept)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1

    module.load_state_dict(kept)

    assert all(value.equal(kept[name]) for name, value in module.state_dict().items())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other.weight"'):
        module.load_state_dict({**kept, "other.weight": torch.ones(1)})


def test_a_copy_of_a_module_is_another_one():
    module = load(SAMPLES[0])
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()

    images = torch.rand(2, 1, 28, 28)

    assert copied(images).count_nonzero() == 0
    assert module(images).count_nonzero() == 20


def test_images_may_lie_with_their_channels_last():
    path = SAMPLES[1]
    images = torch.from_numpy(np.load(path.parent / "fashion_test.npz")["image"][:4])
    model, plain, turned = Model.load(path), load(path), load(path)

    turned.to(memory_format=torch.channels_last)

    got = turned(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, plain(images), atol=FORWARD_TOLERANCE, rtol=FORWARD_TOLERANCE)
    assert turned.write_back(model) == []


def test_a_missing_operator_is_named_with_its_node_and_the_way_to_add_it():
    model = graph_model("g (float[N] x) => (float[N] y) { h = Relu(x)  [odd] y = custom.Strange(h) }")
    model.opset_import.append(helper.make_opsetid("custom", 1))

    with pytest.raises(RequirementError) as raised:
        load(model)

    assert "Strange (node 'odd')" in str(raised.value)
    assert "@onnxcomp.torch_bridge.operator('Strange', domain='custom')" in str(raised.value)


def test_a_failing_operator_is_named_with_its_node():
    module = load(graph_model("g (float[N, 2] x) => (float[N, 2] y) { [product] y = MatMul(x, W) }", W=np.eye(2)))

    with pytest.raises(Exception, match=r"node 'product' \(MatMul\) of inputs \(1, 3\), \(2, 2\)"):
        module(torch.ones(1, 3, dtype=torch.float64))


def test_an_operator_that_onnx_defines_by_others_is_run_as_these():
    text = """g (float[1, 2, 3, 4] x, float[3, 2] c, float[3, 2] s) => (float[1, 2, 3, 4] y) {
        h = Identity(x)  y = RotaryEmbedding(h, c, s, p)
    }"""
    model = graph_model(text, p=np.arange(3)[None], opset=23, ir_version=10)
    x, angles = torch.randn(1, 2, 3, 4, requires_grad=True), torch.rand(3, 2)

    y = load(model)(x, angles.cos(), angles.sin())
    y.sum().backward()

    first, second = x.detach().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    torch.testing.assert_close(y, torch.cat([cos * first - sin * second, sin * first + cos * second], -1))
    assert x.grad is not None


def test_constants_inside_of_functions_are_not_trained():
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]>
    g (float[N, 2] x) => (float[N, 2] y) <float[2] b = {1, 2}> { h = own.Twice(x)  y = Add(h, b) }
    <domain: "own", opset_import: ["": 17]>
    Twice (x) => (y) { two = Constant<value = float[2] {2, 2}>()  y = Mul(x, two) }"""
    model = Model.load(onnx.parser.parse_model(text))
    module = load(model)

    assert [name for name, _ in module.named_parameters()] == ["b"]
    assert module(torch.ones(1, 2)).tolist() == [[3, 4]]
    assert module.write_back(model) == []


# --- whole numbers ----------------------------------------------------------------------------------------------------


def test_division_of_whole_numbers_cuts_towards_zero():
    assert call("Div", torch.tensor([7, -7, 7]), torch.tensor([2, 2, -2])).tolist() == [3, -3, -3]


def test_the_remainder_has_the_sign_that_the_node_asks_for():
    a, b = torch.tensor([7, -7]), torch.tensor([3, 3])

    assert call("Mod", a, b).tolist() == [1, 2]
    assert call("Mod", a, b, fmod=1).tolist() == [1, -1]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("Add", 12),
        ("Sub", 8),
        ("Mul", 20),
        ("Div", 5),
        ("Mod", 0),
        ("Max", 10),
        ("Min", 2),
        ("BitwiseAnd", 2),
        ("Pow", 100),
    ],
)
def test_unsigned_types_that_torch_hardly_knows_are_computed_in(op, expected, dtype):
    found = call(op, torch.tensor([10]).to(dtype), torch.tensor([2]).to(dtype))

    assert found.dtype == dtype
    assert found.tolist() == [expected]


def test_the_largest_unsigned_numbers_compare_and_shift_as_such():
    large, small = torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([1], dtype=torch.uint64)

    assert call("Greater", large, small).tolist() == [True]
    assert call("BitShift", large, small, direction="RIGHT").tolist() == [2**63 - 1]


@pytest.mark.parametrize(("values", "kind", "expected"), [([-1.9, 1.9], 6, [-1, 1]), ([300.0, -1.0], 2, [44, 255])])
def test_casts_cut_towards_zero_and_wrap(values, kind, expected):
    assert call("Cast", torch.tensor(values).to(torch.float64).trunc().to(torch.int64), to=kind).tolist() == expected


def test_operators_of_old_opsets_broadcast_along_an_axis():
    a, b = torch.zeros(2, 3, 4), torch.tensor([1.0, 2.0, 3.0])

    assert call("Add", a, b, opset=6, broadcast=1, axis=1)[0, :, 0].tolist() == [1, 2, 3]


# --- against ONNX Runtime ---------------------------------------------------------------------------------------------


def node_model(op: str, inputs: dict[str, Array], outputs: int, domain: str = "", opset: int = 17, **attrs: Any) -> Any:
    names = [f"y{index}" for index in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), names, domain=domain, **attrs)],
        "g",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [helper.make_value_info(name, onnx.TypeProto()) for name in names],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


MICROSOFT = {"domain": "com.microsoft"}
X = random_weights(2, 3, 8)
NODES: list[tuple[str, list[Array], int, dict[str, Any]]] = [
    ("Gelu", [X], 1, MICROSOFT),
    ("QuickGelu", [X], 1, {**MICROSOFT, "alpha": 1.5}),
    ("FastGelu", [X, random_weights(8)], 1, MICROSOFT),
    ("BiasGelu", [X, random_weights(8)], 1, MICROSOFT),
    ("FusedMatMul", [X, random_weights(2, 5, 8)], 1, {**MICROSOFT, "transB": 1, "alpha": 0.5}),
    ("FusedMatMul", [X, random_weights(2, 3, 5)], 1, {**MICROSOFT, "transA": 1}),
    ("FusedMatMul", [random_weights(3, 2, 8), random_weights(2, 8, 5)], 1, {**MICROSOFT, "transBatchA": 1}),
    ("SkipSimplifiedLayerNormalization", [X, X[::-1].copy(), random_weights(8)], 1, MICROSOFT),
    ("Softmax", [X], 1, {"opset": 12, "axis": 1}),
    ("Hardmax", [X], 1, {"opset": 12, "axis": 0}),
    ("Clip", [X, np.array(0.5, np.float32), np.array(-0.5, np.float32)], 1, {}),
    ("GatherElements", [np.arange(6, dtype=np.uint32).reshape(2, 3), np.array([[0, -1], [1, 1]])], 1, {"axis": 1}),
    ("ScatterND", [np.arange(6, dtype=np.uint16), np.array([[5], [-6]]), np.array([9, 8], np.uint16)], 1, {}),
    ("Gather", [np.arange(6, dtype=np.uint16), np.array([5, -6])], 1, {}),
    ("ReduceMax", [np.arange(6, dtype=np.uint8).reshape(2, 3)], 1, {"axes": [1]}),
    ("ReduceMean", [np.arange(6, dtype=np.int32).reshape(2, 3)], 1, {"axes": [0]}),
    ("CumSum", [np.arange(6, dtype=np.int32), np.array(0)], 1, {"reverse": 1}),
    ("SkipLayerNormalization", [X, X[::-1].copy(), random_weights(8), random_weights(8)], 1, MICROSOFT),
    ("ConvTranspose", [random_weights(1, 2, 4, 5), random_weights(2, 3, 3, 2)], 1,
     {"strides": [2, 3], "output_padding": [1, 2], "pads": [1, 0, 1, 1], "dilations": [1, 2]}),
    ("ConvTranspose", [random_weights(1, 4, 5), random_weights(4, 2, 4), random_weights(4)], 1,
     {"strides": [3], "auto_pad": "SAME_LOWER", "group": 2}),
    ("ConvTranspose", [random_weights(1, 2, 4), random_weights(2, 3, 4)], 1, {"strides": [2], "output_shape": [7]}),
    ("Conv", [random_weights(1, 2, 4, 5, 6), random_weights(3, 2, 2, 3, 3)], 1, {"auto_pad": "SAME_UPPER"}),
    ("MaxPool", [random_weights(1, 2, 7, 9)], 2,
     {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1], "ceil_mode": 1, "dilations": [1, 2]}),
    ("AveragePool", [random_weights(1, 2, 7, 9)], 1,
     {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1], "ceil_mode": 1}),
    ("AveragePool", [random_weights(1, 2, 7, 9)], 1,
     {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("LRN", [random_weights(1, 6, 3, 3)], 1, {"size": 5, "alpha": 0.5, "beta": 0.6, "bias": 1.5}),
    ("InstanceNormalization", [random_weights(2, 3, 1, 1), random_weights(3), random_weights(3, seed=1)], 1, {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "outputs", "options"), NODES)
def test_nodes_give_what_onnxruntime_gives(op, inputs, outputs, options):
    feed = {f"x{index}": value for index, value in enumerate(inputs)}
    model = node_model(op, feed, outputs, **options)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)

    got = call(op, *map(torch.from_numpy, inputs), domain=options.get("domain", ""), outputs=outputs,
               **{key: value for key, value in options.items() if key != "domain"})  # fmt: skip

    for wanted, value in zip(expected, got if isinstance(got, tuple) else (got,), strict=True):
        np.testing.assert_allclose(value, wanted, atol=ROUNDING, rtol=ROUNDING)


RESIZES = [
    (mode, coordinates, factors)
    for mode in ("nearest", "linear", "cubic")
    for coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    for factors in ([2.0, 2.0], [1.5, 0.6], [0.5, 3.0])
]


@pytest.mark.parametrize(("mode", "coordinates", "factors"), RESIZES)
def test_resize_gives_what_onnxruntime_gives(mode, coordinates, factors):
    sizes = [int(size * factor) for size, factor in zip((6, 10), factors, strict=True)]
    feed = {"x": random_weights(1, 2, 6, 10)}
    attrs = {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": "floor"}
    model = node_model("Resize", feed, 1, **attrs)
    model.graph.node[0].input.extend(["", "", "sizes"])
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, *sizes]), "sizes"))
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]

    got = load(model)(torch.from_numpy(feed["x"]))

    np.testing.assert_allclose(got, expected, atol=ROUNDING)


@pytest.mark.parametrize("zero", [False, True])
def test_packed_products_of_few_bits_give_what_onnxruntime_gives(zero):
    rng = np.random.default_rng(0)
    feed = {"x": random_weights(3, 40)}
    packed = rng.integers(0, 256, (6, 2, 16)).astype(np.uint8)
    weights: dict[str, Array] = {
        "B": packed,
        "s": rng.uniform(0.1, 0.2, 12).astype(np.float32),
        "z": rng.integers(0, 256, 6).astype(np.uint8),
    }
    if not zero:
        del weights["z"]
    model = node_model("MatMulNBits", feed, 1, "com.microsoft", N=6, K=40, bits=4, block_size=32)
    model.graph.node[0].input.extend(weights)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]

    module = load(model)

    np.testing.assert_allclose(module(torch.from_numpy(feed["x"])), expected, atol=10 * ROUNDING)
    assert not list(module.parameters())
    assert [name for name, _ in load(model, learn_scales=True).named_parameters()] == ["s"]


def test_16_bit_weights_are_trained_as_32_bit_ones_and_written_back_as_they_were():
    model = Model.load(SAMPLES[0])
    Float16().rewrite(model, Context())
    images = np.load(SAMPLES[0].parent / "fashion_test.npz")["image"][:8]
    module = load(model)
    kinds = {name: model.weight(name).dtype for name, _ in module.named_parameters()}

    y = module(torch.from_numpy(images))
    y.sum().backward()

    assert np.float16 in kinds.values()
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in module.parameters())
    expected = onnxruntime.InferenceSession(model.to_proto().SerializeToString()).run(None, {"image": images})[0]
    np.testing.assert_allclose(y.detach(), expected, atol=HALF_ROUNDING)
    assert module.write_back(model) == []
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 2
    assert sorted(module.write_back(model)) == sorted(kinds)
    assert {name: model.weight(name).dtype for name in kinds} == kinds


def test_dropout_is_in_training_only_where_the_node_says_so():
    x = torch.ones(1000)

    assert call("Dropout", x) is x
    assert call("Dropout", x, torch.tensor(0.5), torch.tensor(False)) is x
    kept, mask = call("Dropout", x, torch.tensor(0.5), torch.tensor(True))
    assert set(kept.tolist()) == {0.0, 2.0}
    assert (kept != 0).equal(mask)


def test_random_numbers_of_a_node_with_a_seed_are_the_same_each_time():
    first, second = (call("RandomNormal", shape=[4], seed=3.0) for _ in range(2))

    assert first.equal(second)
    assert not first.equal(call("RandomNormal", shape=[4], seed=4.0))
