from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.data import Dataset, generate
from onnxcomp.errors import ModelError, OptionError

FLOAT, INT64, INT32, BOOL, UINT8, STRING = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.BOOL,
    TensorProto.UINT8,
    TensorProto.STRING,
)
Input = tuple[str, int, list[int | str | None]]


def model(
    inputs: Sequence[Input], nodes: Sequence[onnx.NodeProto] = (), weights: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """A model whose outputs are the outputs of its nodes, or its inputs where it has no nodes."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    made = [helper.make_empty_tensor_value_info(name) for node in nodes for name in node.output if name]
    graph = helper.make_graph(
        list(nodes), "g", values, made, [numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), **attributes)


def table(rows: int, width: int = 4) -> np.ndarray:
    return np.ones((rows, width), np.float32)


def all_of(data: Dataset, name: str) -> np.ndarray:
    return np.concatenate([np.atleast_1d(batch.inputs[name])[: batch.count] for batch in data.batches()])


def run(proto: onnx.ModelProto, **options) -> list[np.ndarray]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [output for feed in generate(proto, **options).feeds() for output in session.run(None, feed)]


def test_generated_data_say_so_and_depend_on_the_seed_only():
    proto = model([("x", FLOAT, ["N", 5])])

    data = generate(proto, count=6, seed=1)

    assert (data.generated, data.has_labels, data.size) == (True, False, 6)
    assert data.description == "generated: 6 samples"
    assert data.digest == generate(proto, count=6, seed=1).digest != generate(proto, count=6, seed=2).digest


def test_ids_stay_in_the_table_they_index():
    proto = model(
        [("tokens", INT64, ["N", "L"])],
        [
            node("Cast", "tokens", "c", to=INT32),
            node("Unsqueeze", "c axes", "u"),
            node("Gather", "table u", "y"),
        ],
        {"table": table(7), "axes": np.array([0])},
    )

    ids = all_of(generate(proto, count=50), "tokens")

    assert ids.shape == (50, 16)
    assert sorted(set(ids.flat)) == list(range(7))


def test_ids_with_an_offset_or_two_tables_stay_in_the_smallest():
    proto = model(
        [("tokens", INT64, ["N", 9])],
        [node("Add", "tokens two", "a"), node("Gather", "small a", "y"), node("Gather", "large tokens", "z")],
        {"small": table(12), "large": table(100), "two": np.array(2)},
    )

    assert all_of(generate(proto, count=50), "tokens").max() == 9
    assert run(proto)


def test_floats_that_become_ids_are_whole_and_in_the_table():
    proto = model(
        [("tokens", FLOAT, ["N", 9])],
        [node("Cast", "tokens", "c", to=INT64), node("Gather", "table c", "y")],
        {"table": table(7)},
    )

    assert sorted(set(all_of(generate(proto, count=50), "tokens").flat)) == list(range(7))


def test_the_axis_of_the_gather_counts():
    proto = model([("i", INT64, ["N"])], [node("Gather", "table i", "y", axis=1)], {"table": table(100, 3)})

    assert all_of(generate(proto, count=50), "i").max() == 2


def test_a_quantized_and_transposed_table_is_found():
    proto = model(
        [("i", INT64, ["N", 9])],
        [
            node("DequantizeLinear", "q s", "f"),
            node("Transpose", "f", "t", perm=[1, 0]),
            node("Gather", "t i", "y"),
        ],
        {"q": np.ones((4, 6), np.uint8), "s": np.float32(0.5)},
    )

    assert all_of(generate(proto, count=50), "i").max() == 5


def test_ids_used_in_a_subgraph_are_found():
    def branch(name: str) -> onnx.GraphProto:
        gather = helper.make_node("Gather", ["table", "i"], [name])
        return helper.make_graph([gather], name, [], [helper.make_tensor_value_info(name, FLOAT, None)])

    choose = node("If", "c", "y", then_branch=branch("a"), else_branch=branch("b"))
    proto = model([("c", BOOL, []), ("i", INT64, ["N", 9])], [choose], {"table": table(5)})

    assert all_of(generate(proto, count=50), "i").max() == 4
    assert run(proto)


def test_ids_used_in_a_function_are_found():
    function = helper.make_function(
        "mine", "Embed", ["t", "i"], ["o"], [node("Gather", "t i", "o")], [helper.make_opsetid("", 17)]
    )
    proto = model([("i", INT64, ["N", 9])], [node("Embed", "table i", "y", domain="mine")], {"table": table(5)})
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("mine", 1))

    assert all_of(generate(proto, count=50), "i").max() == 4


def test_weights_may_be_stubs_without_values():
    proto = model([("i", INT64, ["N", 9])], [node("Gather", "table i", "y")])
    proto.graph.initializer.append(TensorProto(name="table", dims=[5, 1000], data_type=FLOAT))

    assert all_of(generate(proto, count=50), "i").max() == 4


def bert() -> onnx.ModelProto:
    return model(
        [
            ("input_ids", INT64, ["batch", "sequence"]),
            ("attention_mask", INT64, ["batch", "sequence"]),
            ("token_type_ids", INT64, ["batch", "sequence"]),
            ("position_ids", INT64, ["batch", "sequence"]),
        ],
        [
            node("Gather", "words input_ids", "w"),
            node("Gather", "types token_type_ids", "t"),
            node("Gather", "positions position_ids", "p"),
            node("Cast", "attention_mask", "m", to=FLOAT),
            node("Sub", "one m", "inverse"),
            node("Mul", "inverse large", "bias"),
        ],
        {
            "words": table(1000),
            "types": table(2),
            "positions": table(12),
            "one": np.float32(1),
            "large": np.float32(-10000),
        },
    )


def test_a_transformer_gets_ids_masks_types_and_positions():
    data = generate(bert(), count=40)

    assert {all_of(data, name).shape for name in ("input_ids", "attention_mask", "token_type_ids")} == {(40, 16)}
    mask = all_of(data, "attention_mask")
    assert set(mask.flat) == {0, 1}
    assert mask.mean() > 0.8
    assert (np.diff(mask, axis=1) <= 0).all()
    assert not all_of(data, "token_type_ids").any()
    np.testing.assert_array_equal(all_of(data, "position_ids")[3], [*range(12), 11, 11, 11, 11])
    assert run(bert())


def test_a_mask_is_known_by_its_use():
    proto = model(
        [("a", FLOAT, ["N", 8]), ("b", INT64, ["N", 8])],
        [node("Equal", "b zero", "e"), node("Where", "e zero_f a", "y")],
        {"zero": np.array(0), "zero_f": np.float32(0)},
    )

    assert set(all_of(generate(proto), "b").flat) <= {0, 1}


def test_a_mask_that_is_added_is_zero():
    proto = model([("x", FLOAT, ["N", 8]), ("attn_mask", FLOAT, ["N", 8])], [node("Add", "x attn_mask", "y")])

    assert not all_of(generate(proto), "attn_mask").any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["N", 3, "H", "W"], (8, 3, 224, 224)),
        ([None, None, None, None], (8, 3, 224, 224)),
        (["N", 1, 49, 10], (8, 1, 49, 10)),
        (["N", 64, 32, 3], (8, 64, 32, 3)),
        (["N", None, None, 3], (8, 224, 224, 3)),
    ],
)
def test_images_are_smooth_and_in_range(shape: list[int | str | None], expected: tuple[int, ...]):
    images = all_of(generate(model([("x", FLOAT, shape)])), "x")

    assert images.shape == expected
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert 0.1 < images.std() < 0.4
    rows = 2 if expected[1] in (1, 3) else 1
    # Neighbours are alike: white noise would differ by 1.4 standard deviations.
    assert np.abs(np.diff(images, axis=rows)).mean() < 0.5 * images.std()


def test_uint8_images_fill_the_range():
    images = all_of(generate(model([("x", UINT8, ["N", 32, 32, 3])])), "x")

    assert images.dtype == np.uint8
    assert images.max() > 200


def test_a_convolution_tells_the_channels():
    proto = model(
        [("x", FLOAT, ["N", "C", "H", "W"])], [node("Conv", "x w", "y")], {"w": np.ones((4, 1, 3, 3), np.float32)}
    )

    assert all_of(generate(proto, count=2), "x").shape == (2, 1, 224, 224)


def test_a_matrix_tells_the_features():
    proto = model([("x", FLOAT, ["N", "F"])], [node("Gemm", "x w", "y", transB=1)], {"w": table(3, 7)})

    assert all_of(generate(proto), "x").shape == (8, 7)
    assert len(run(proto)) == 1


def test_voice_detection_gets_state_and_rate():
    proto = model([("input", FLOAT, [None, 512]), ("state", FLOAT, [2, None, 128]), ("sr", INT64, [])])

    feeds = list(generate(proto, count=4).feeds())

    assert [{name: array.shape for name, array in feed.items()} for feed in feeds] == [
        {"input": (1, 512), "state": (2, 1, 128), "sr": ()}
    ] * 4
    assert {feed["sr"].item() for feed in feeds} == {16000}
    assert not feeds[0]["state"].any()
    assert np.abs(feeds[1]["state"]).max() < 1


def test_the_batch_axis_keeps_its_size_in_other_places():
    proto = model([("input", FLOAT, ["B", 512]), ("memory", FLOAT, [2, "B", 128])])

    assert [feed["memory"].shape for feed in generate(proto, count=3).feeds()] == [(2, 1, 128)] * 3


def test_initial_states_and_lengths_of_a_recurrent_layer_are_known_by_their_use():
    weights = {"w": np.ones((1, 16, 6), np.float32), "r": np.ones((1, 16, 4), np.float32)}
    proto = model(
        [("x", FLOAT, [5, 1, "F"]), ("n", INT32, [1]), ("a", FLOAT, [1, 1, 4]), ("b", FLOAT, [1, 1, 4])],
        [node("LSTM", "x w r - n a b", "y h c", hidden_size=4)],
        weights,
    )

    feed = next(iter(generate(proto).feeds()))

    assert feed["x"].shape == (5, 1, 6)
    assert not feed["a"].any()
    assert not feed["b"].any()
    assert feed["n"].item() in range(1, 7)


def test_lengths_are_those_of_the_dynamic_axis():
    data = generate(model([("features", FLOAT, ["N", 512, "T"]), ("feature_lens", INT64, ["N"])]))

    assert set(all_of(data, "feature_lens")) == {all_of(data, "features").shape[2]}


def test_hidden_states_of_a_transformer_are_not_states():
    assert all_of(generate(model([("hidden_states", FLOAT, ["N", 8, 64])])), "hidden_states").std() > 0.9


def test_what_a_logarithm_is_taken_of_is_positive():
    proto = model(
        [("x", FLOAT, ["N", 50])], [node("Reshape", "x s", "r"), node("Log", "r", "y")], {"s": np.array([-1])}
    )

    assert all_of(generate(proto), "x").min() > 0
    assert all(np.isfinite(output).all() for output in run(proto))


def test_a_size_is_small():
    proto = model([("x", FLOAT, ["N", 8]), ("k", INT64, [1])], [node("TopK", "x k", "v i")])

    assert {feed["k"].item() for feed in generate(proto).feeds()} == {1}
    assert run(proto)


def test_strings_are_words():
    feed = next(iter(generate(model([("text", STRING, ["N"])])).feeds()))

    assert feed["text"].dtype == object
    assert all(isinstance(word, str) and word for word in feed["text"])


@pytest.mark.parametrize(("name", "expected"), [("past_sequence_length + 1", 17), ("total_sequence_length", 32)])
def test_a_sum_of_axes_follows_its_terms(name: str, expected: int):
    proto = model(
        [
            ("input_ids", INT64, ["batch", "sequence_length"]),
            ("attention_mask", INT64, ["batch", name]),
            ("past_key_values.0.key", FLOAT, ["batch", 4, "past_sequence_length", 8]),
        ]
    )

    data = generate(proto, count=2)

    assert all_of(data, "input_ids").shape == (2, 16)
    assert all_of(data, "past_key_values.0.key").shape == (2, 4, 16, 8)
    assert all_of(data, "attention_mask").shape == (2, expected)


def test_given_shapes_hold_for_inputs_that_share_an_axis():
    data = generate(bert(), count=4, shapes={"input_ids": (2, 9)})

    assert [feed["attention_mask"].shape for feed in data.feeds()] == [(2, 9)] * 2


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"input_id": (1, 9)}, r"no input 'input_id' to give a shape to; did you mean 'input_ids'\?"),
        ({"input_ids": (1, 9, 1)}, "it has 2 axes"),
        ({"input_ids": (1, 9), "attention_mask": (1, 8)}, "axis 'sequence' is 9 in the shape of 'input_ids' and 8"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]], message: str):
    with pytest.raises(OptionError, match=message):
        generate(bert(), shapes=shapes)


def test_refuses_to_generate_nothing():
    with pytest.raises(OptionError, match="count must be at least 1, got 0"):
        generate(bert(), count=0)
    with pytest.raises(ModelError, match="the model has no inputs"):
        generate(model([]))


def test_large_samples_are_fewer():
    assert generate(model([("x", FLOAT, ["N", 16 << 20])]), count=8).size == 4
    with pytest.raises(OptionError, match="one sample would take 8,589,934,592 bytes; give smaller shapes"):
        generate(model([("x", FLOAT, ["N", "L"])]), shapes={"x": (1, 2 << 30)})


def one_hot(classes: list[int]) -> onnx.ModelProto:
    """Compares ids with a row of numbers."""
    nodes = [node("Unsqueeze", "ids axis", "column"), node("Equal", "column row", "y")]
    weights = {"axis": np.array([-1]), "row": np.array(classes)}
    return model([("ids", INT64, ["N", 32])], nodes, weights)


def test_ids_that_are_compared_with_all_classes_are_of_all_classes():
    ids = all_of(generate(one_hot(list(range(40)))), "ids")

    assert set(ids.ravel().tolist()) == set(range(40))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stub_of_all_classes_is_taken_for_what_its_size_says(elsewhere: bool):
    proto = one_hot(list(range(400)))
    row = next(tensor for tensor in proto.graph.initializer if tensor.name == "row")
    row.ClearField("raw_data")
    if elsewhere:
        row.data_location = TensorProto.EXTERNAL

    assert all_of(generate(proto), "ids").max() > 300


@pytest.mark.parametrize("row", [[0, 1], [3, 1, 2]])
def test_ids_that_are_compared_with_other_numbers_are_a_mask(row: list[int]):
    ids = all_of(generate(one_hot(row)), "ids")

    assert set(ids.ravel().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("low", "high", "shape"), [("fmin", "fmax", []), ("min_pitch", "max_pitch", [1]), ("minimum", "maximum", [])]
)
def test_a_least_and_a_largest_value_cut_nothing_off(low: str, high: str, shape: list[int | str | None]):
    data = generate(model([("audio", FLOAT, ["N", "T"]), (low, FLOAT, shape), (high, FLOAT, shape)]))

    assert 0 < all_of(data, low).max() < 0.1
    assert all_of(data, high).min() > 1000


@pytest.mark.parametrize(("name", "shape"), [("scales", [3]), ("noise_scale", []), ("speed", [1]), ("temperature", [])])
def test_a_factor_that_a_user_sets_is_1(name: str, shape: list[int | str | None]):
    values = all_of(generate(model([("ids", INT64, ["N", "L"]), (name, FLOAT, shape)])), name)

    assert set(values.ravel().tolist()) == {1.0}


def test_a_large_input_with_such_a_name_is_not_constant():
    assert all_of(generate(model([("scale", FLOAT, ["N", 8])])), "scale").std() > 0.1


def test_a_wanted_size_holds_for_axes_that_nothing_implies():
    proto = model(
        [("image", FLOAT, ["N", None, "H", "W"]), ("x", FLOAT, ["N", "L", None]), ("ids", INT64, ["N", "T"])],
        [node("MatMul", "x w", "y")],
        {"w": table(12)},
    )

    feed = next(generate(proto, size=20).feeds(1))

    assert {name: array.shape for name, array in feed.items()} == {
        "image": (1, 3, 20, 20),
        "x": (1, 20, 12),
        "ids": (1, 20),
    }


KINDS = st.sampled_from([FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, INT64, INT32, BOOL, UINT8, TensorProto.INT8])
SHAPES = st.lists(st.one_of(st.integers(1, 5), st.sampled_from(["N", "L", None])), max_size=5)
NAMES = st.sampled_from(
    ["x", "mask", "state", "sr", "lens", "position", "timestep", "audio", "cache", "label", "token_type"]
)


@given(st.dictionaries(NAMES, st.tuples(KINDS, SHAPES), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_every_model_can_be_fed(inputs: dict[str, tuple[int, list[int | str | None]]]):
    given_inputs = [(name, kind, shape) for name, (kind, shape) in inputs.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    proto = model(given_inputs, nodes)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])

    for feed in generate(proto, count=3).feeds():
        session.run(None, feed)  # refuses a wrong type, rank or static size
