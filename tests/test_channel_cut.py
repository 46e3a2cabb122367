"""Units of channel groups that are cut from a graph leave it valid, smaller, and what it was without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.data import generate
from onnxcomp.model import Model
from onnxcomp.passes import Context, Pass
from onnxcomp_passes import Float16, QuantizeWeights
from onnxcomp_passes._channels_cut import cut
from onnxcomp_passes._channels_groups import Channels, Group, Slot, find_channels
from onnxcomp_passes._stored import lift_constants
from tests.cuttable_graphs import CASES
from tests.models import FLOAT_ROUNDING, graph_model, random_weights, run

Array = np.ndarray[Any, Any]

every_case = pytest.mark.parametrize("case", CASES)


def load(proto: onnx.ModelProto) -> Model:
    model = Model.load(proto)
    lift_constants(model.graph)
    return model


def constants_behind(model: Model, slot: Slot) -> list[str]:
    """The constant of a slot, or the codes that its weight is decoded from."""
    names = {tensor.name for tensor in model.constants()}
    name = slot.tensor
    while name not in names:
        maker = next(node for node in model.graph.nodes if node.outputs[0].name == name)
        name = maker.inputs[0].name
    return [name]


def silence(model: Model, group: Group, units: Array) -> None:
    """Zero what reads the units; where only other activations do, what makes them."""
    for slot in group.consumers or (*group.producers, *group.coupled):
        for name in constants_behind(model, slot):
            value = np.array(model.weight(name))
            index: list[Any] = [slice(None)] * value.ndim
            index[slot.axis] = slot.entries[units].ravel()
            value[tuple(index)] = 0
            model.set_weight(name, value)


def some_units(channels: Channels, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    wanted = {group.name: rng.permutation(group.units)[: (group.units + 1) // 2] for group in channels.groups}
    return channels.allowed(wanted)


@every_case
def test_the_groups_of_a_graph_are_found(case: str):
    found = find_channels(load(CASES[case].model()))

    assert {(group.name, group.kind, group.units) for group in found.groups} == CASES[case].groups


@every_case
def test_a_cut_graph_computes_what_it_did_with_the_units_silenced(case: str):
    model = load(CASES[case].model())
    channels = find_channels(model)
    removed = some_units(channels)
    for group in channels.groups:
        silence(model, group, removed.get(group.name, np.zeros(0, np.int64)))
    small = model.fork()

    cut(small, channels, removed)

    onnx.checker.check_model(small.to_proto(), full_check=True)
    assert removed
    assert small.size_bytes < model.size_bytes
    for feeds in generate(model.to_proto(), count=4, seed=1).feeds():
        for before, after in zip(run(model, feeds), run(small, feeds), strict=True):
            np.testing.assert_allclose(after, before, rtol=0, atol=FLOAT_ROUNDING * np.abs(before).max())


@every_case
def test_what_is_cut_was_not_idle(case: str):
    """Else the comparison above would hold for any cut."""
    model = load(CASES[case].model())
    channels = find_channels(model)
    [feeds, *_] = generate(model.to_proto(), count=4, seed=1).feeds()
    read = [group for group in channels.groups if group.consumers or not group.carriers]
    small = model.fork()

    cut(small, channels, {name: units for name, units in some_units(channels).items() if channels.group(name) in read})

    before, after = run(model, feeds)[0], run(small, feeds)[0]
    assert np.abs(after - before).max() > 100 * FLOAT_ROUNDING * np.abs(before).max()


@every_case
def test_a_cut_graph_has_the_same_units_but_those_that_went(case: str):
    model = load(CASES[case].model())
    channels = find_channels(model)
    removed = {group.name: [group.units - 1] for group in channels.groups if group.units > 1}

    cut(model, channels, removed)

    left = [group.units - len(removed.get(group.name, ())) for group in channels.groups]
    assert [group.units for group in find_channels(model).groups] == left


@pytest.mark.parametrize(
    "stored",
    [
        QuantizeWeights(choose=False),
        QuantizeWeights(choose=False, symmetric=False),
        QuantizeWeights(choose=False, bits=4),
        Float16(),
    ],
    ids=["int8", "zero points", "int4", "float16"],
)
def test_weights_are_cut_in_the_form_that_they_are_held_in(stored: Pass):
    """The stored form has the groups of the float one; codes and scales of silenced units go with them."""
    model = load(onnx.load(Path(__file__).parent.parent / "sample_models" / "fashion_lenet.onnx"))
    channels = find_channels(model)
    removed = some_units(channels)
    for group in channels.groups:
        silence(model, group, removed[group.name])
    stored.rewrite(model, Context())
    held = find_channels(model)
    small = model.fork()

    cut(small, held, removed)

    assert [(group.name, group.units) for group in held.groups] == [(g.name, g.units) for g in channels.groups]
    assert small.size_bytes < 0.6 * model.size_bytes
    for feeds in generate(model.to_proto(), count=2, seed=1).feeds():
        [before], [after] = run(model, feeds), run(small, feeds)
        np.testing.assert_allclose(after, before, rtol=0, atol=FLOAT_ROUNDING * np.abs(before).max())


def test_bytes_and_products_of_a_unit_are_what_its_cut_saves():
    model = load(CASES["depthwise"].model())
    [group] = find_channels(model).groups
    weights = {"W0": 3 * 9, "W1": 2 * 9, "b1": 2, "W2": 5 * 2}

    assert group.size_bytes == 4 * sum(weights.values())
    assert group.macs == 36 * weights["W0"] + 16 * weights["W1"] + 16 * weights["W2"]


def test_no_axis_is_emptied():
    model = load(CASES["few groups"].model())
    channels = find_channels(model)

    allowed = channels.allowed({"wide": [5, 3, 1, 0, 2, 4], "grouped": [0]})

    assert {name: units.tolist() for name, units in allowed.items()} == {"wide": [5, 3, 1, 0, 2], "grouped": [0]}
    with pytest.raises(ValueError, match="would lose all of its 12 entries"):
        cut(model, channels, {"wide": range(6)})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[m] y = MatMul(x, W)", "is an output of the model"),
        ("h = MatMul(x, W) n = LayerNormalization(h, v, v) y = MatMul(n, V)", "computes across them"),
        ("h = MatMul(x, W) s = Softmax(h) y = MatMul(s, V)", "computes across them"),
        ("h = MatMul(x, W) s = Add(h, x) y = MatMul(s, V)", "not made by a weight"),
        ("h = MatMul(x, W) c = CumSum(h, one) y = MatMul(c, V)", "computes across them"),
        ("h = MatMul(x, W) s, i = TopK(h, eight) y = MatMul(s, V)", "computes across them"),
        ("h = MatMul(x, W) e = Einsum<equation = 'ij,jk->ik'>(h, V) y = Identity(e)", "channels are not followed"),
        ("h = MatMul(x, W) s = Shape(h) c = Cast<to = 1>(s) k = MatMul(h, V) y = Add(k, k) z = Add(c, c)", "Shape"),
        ("h = MatMul(x, W) y = MatMul(h, V) z = Einsum<equation = 'ij->ji'>(W)", "z (Einsum) reads it"),
    ],
)
def test_what_cannot_be_proven_safe_is_left_alone_with_its_reason(body: str, reason: str):
    outputs = "float[N, 8] y, float[K] z" if " z = Add" in body else "float[N, 8] y"
    outputs = "float[N, 8] y, float[8, 8] z" if "(W)" in body else outputs
    text = f"g (float[N, 8] x) => ({outputs}) {{ {body} }}".replace("'", '"')
    weights: dict[str, Array] = {"W": random_weights(8, 8), "V": random_weights(8, 8, seed=1), "v": random_weights(8)}
    model = load(graph_model(text, weights, one=np.array(1), eight=np.array([8])))

    found = find_channels(model)

    assert not found.groups
    assert reason in next(iter(found.left.values()))
