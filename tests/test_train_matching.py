"""Which inner tensors of a teacher and a student are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.torch_bridge import load
from onnxcomp.train.losses import Loss, matched_tensors
from tests.models import SMALL_NETWORK, graph_model, mlp_model, random_weights

BLOCKS = 12


def residual_model(*, channels: int = 4) -> Model:
    """Blocks of Conv, Relu, Conv, Add, Relu."""
    lines = ["h0 = Conv<pads=[1,1,1,1]>(x, W)"]
    weights = {"W": np.ones((4, 3, 3, 3), np.float32)}
    for n in range(BLOCKS):
        lines += [
            f"a{n} = Conv<pads=[1,1,1,1]>(h{n}, A{n})",
            f"b{n} = Relu(a{n})",
            f"c{n} = Conv<pads=[1,1,1,1]>(b{n}, C{n})",
            f"s{n} = Add(c{n}, h{n})",
            f"h{n + 1} = Relu(s{n})",
        ]
        weights[f"A{n}"] = np.ones((channels, 4, 3, 3), np.float32)
        weights[f"C{n}"] = np.ones((4, channels, 3, 3), np.float32)
    lines.append(f"y = GlobalAveragePool(h{BLOCKS})")
    return Model.load(graph_model(f"g (float[N, 3, 8, 8] x) => (float[N, 4, 1, 1] y) {{ {' '.join(lines)} }}", weights))


def attention_model(layers: int = 3) -> Model:
    """Layers of attention and a feed-forward part, each with a shortcut."""
    lines: list[str] = []
    weights: dict[str, Any] = {name: np.ones((8, 8), np.float32) for name in "QKF"}
    for n in range(layers):
        lines += [
            f"q{n} = MatMul(h{n}, Q)",
            f"qs{n} = Reshape(q{n}, split)",
            f"qt{n} = Transpose<perm=[0,2,1,3]>(qs{n})",
            f"kt{n} = Transpose<perm=[0,2,3,1]>(qs{n})",
            f"l{n} = MatMul(qt{n}, kt{n})",
            f"m{n} = Add(l{n}, mask)",
            f"p{n} = Softmax<axis=-1>(m{n})",
            f"v{n} = MatMul(p{n}, qt{n})",
            f"w{n} = Transpose<perm=[0,2,1,3]>(v{n})",
            f"o{n} = Reshape(w{n}, join)",
            f"r{n} = Add(o{n}, h{n})",
            f"f{n} = MatMul(r{n}, F)",
            f"g{n} = Relu(f{n})",
            f"h{n + 1} = Add(g{n}, r{n})",
        ]
    weights["split"], weights["join"] = np.array([0, 0, 2, 4]), np.array([0, 0, 8])
    text = f"g (float[N, T, 8] h0, float[N, 1, 1, T] mask) => (float[N, T, 8] h{layers}) {{ {' '.join(lines)} }}"
    return Model.load(graph_model(text, weights))


def test_chooses_the_ends_of_blocks_evenly():
    model = residual_model()
    assert matched_tensors(model, model) == ["h2", "h3", "h4", "h6", "h8", "h9", "h10", "h12"]
    assert matched_tensors(model, model, limit=3) == ["h4", "h8", "h12"]


def test_chooses_attention_weights_too():
    model = attention_model()
    assert matched_tensors(model, model) == ["p0", "r0", "h1", "p1", "r1", "h2", "p2", "r2"]
    assert matched_tensors(model, model, limit=4) == ["h1", "p1", "p2", "r2"]


def test_chooses_activations_too_where_there_is_one_block():
    text = """g (float[N, 2] x) => (float[N, 2] y) {
        a = MatMul(x, W) b = Relu(a) c = MatMul(b, W) d = Add(c, x) e = MatMul(d, W) f = Sigmoid(e) s = Mul(e, f)
        y = MatMul(s, W)
    }"""
    model = Model.load(graph_model(text, W=np.eye(2, dtype=np.float32)))
    assert matched_tensors(model, model) == ["b", "d", "s"]


def test_chooses_activations_where_there_are_no_blocks():
    model = Model.load(graph_model(SMALL_NETWORK))
    assert matched_tensors(model, model) == ["b", "d"]


def test_chooses_layers_where_there_are_no_activations():
    text = "g (float[N, 2] x) => (float[N, 2] y) { a = MatMul(x, W) b = MatMul(a, W) y = MatMul(b, W) }"
    model = Model.load(graph_model(text, W=np.eye(2, dtype=np.float32)))
    assert matched_tensors(model, model) == ["a", "b"]


def test_takes_nothing_that_only_one_of_the_models_has_or_has_otherwise():
    teacher, student = residual_model(), residual_model(channels=3)
    student.graph.nodes[5].outputs[0].name = "renamed"  # h1 is no more
    assert "h1" not in matched_tensors(teacher, student, limit=100)


def test_takes_other_channels_where_that_is_wanted():
    text = "g (float[N, 2, 4, 4] x) => (float[N, 1, 4, 4] y) { a = Conv(x, W) b = Relu(a) y = Conv(b, V) }"
    one, other = (
        Model.load(graph_model(text, W=np.ones((n, 2, 1, 1), np.float32), V=np.ones((1, n, 1, 1), np.float32)))
        for n in (3, 4)
    )
    assert matched_tensors(one, other) == []
    assert matched_tensors(one, other, any_channels=True) == ["b"]


def test_choosing_changes_neither_model():
    teacher, student = residual_model(), residual_model(channels=3)
    before = teacher.digest, student.digest
    matched_tensors(teacher, student)
    assert (teacher.digest, student.digest) == before


def test_fits_itself_to_two_models():
    teacher, student = residual_model(), residual_model(channels=3)
    loss = Loss(features=1).fitted(teacher, student)
    assert loss.outputs == ("y",)
    assert loss.watch == loss.tensors == tuple(matched_tensors(teacher, student))
    assert Loss().fitted(teacher, student).watch == ()
    assert Loss(features=1, tensors=("h1",)).fitted(teacher, student).tensors == ("h1",)


def test_a_loss_without_inner_tensors_to_fit_is_refused():
    model = Model.load(mlp_model((4, 2)))
    text = "g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }"
    with pytest.raises(OptionError, match="loss: graph need inner tensors, and teacher and student have none"):
        Loss(graph=1).fitted(Model.load(graph_model(text)), model)


def test_a_student_of_the_bridge_learns_by_it():
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        a = Add(x, W) b = Relu(a) c = Add(b, x) d = Add(c, V) e = Relu(d) f = Add(e, c) y = Add(f, V)
    }"""
    one, other = (
        Model.load(graph_model(text, W=random_weights(4, seed=n), V=random_weights(4, seed=n + 2))) for n in (0, 1)
    )
    loss = Loss(features=1, relational=1, graph=1).fitted(one, other)
    assert loss.watch == ("c", "f")
    teacher, student = load(one), load(other)
    feed = {"x": torch.randn(16, 4, generator=torch.Generator().manual_seed(0))}
    wanted = {name: tensor.detach() for name, tensor in teacher.run(feed, loss.watch).items()}
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    values = []
    for _ in range(200):
        value = loss(student.run(feed, loss.watch), wanted)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 20
