"""Losses of a student against its teacher: their values, their gradients, and what they do not depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import DataError, ModelError, OptionError
from onnxcomp.train.losses import (
    Loss,
    attention_maps,
    feature_maps,
    graph_based,
    hard_targets,
    log_probabilities,
    normalised_mse,
    relational,
    soft_targets,
    user_loss,
)

CLOSE = 1e-9
"""Of values in float64, which formulas in another order compute."""

seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0, scale: float = 1.0, grad: bool = False) -> Any:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)
    return values.requires_grad_(grad)


def softmax(logits: Any) -> Any:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def huber(x: Any) -> Any:
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


# --- values against formulas in numpy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5)])
@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_soft_targets_are_the_divergence_times_the_square_of_the_temperature(shape, temperature):
    student, teacher = normal(*shape), normal(*shape, seed=1, scale=3)
    p, q = (softmax(each.numpy() / temperature) for each in (teacher, student))
    wanted = (p * np.log(p / q)).sum(-1).mean() * temperature**2
    assert soft_targets(student, teacher, temperature).item() == pytest.approx(wanted, abs=CLOSE)


def test_hard_targets_are_the_cross_entropy_and_leave_out_what_has_no_label():
    student, labels = normal(3, 4), torch.tensor([0, 3, -100])
    wanted = -(np.log(softmax(student.numpy()))[0, 0] + np.log(softmax(student.numpy()))[1, 3]) / 2
    assert hard_targets(student, labels).item() == pytest.approx(wanted, abs=CLOSE)
    assert hard_targets(student, torch.full((3,), -100)).item() == 0


def test_hard_targets_take_sequences():
    student, labels = normal(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 1]])
    wanted = -np.take_along_axis(np.log(softmax(student.numpy())), labels.numpy()[..., None], -1).mean()
    assert hard_targets(student, labels).item() == pytest.approx(wanted, abs=CLOSE)


def test_mse_is_over_the_variance_of_the_teacher():
    student, teacher = normal(4, 7), normal(4, 7, seed=1, scale=20) + 100
    wanted = ((student - teacher) ** 2).mean() / teacher.numpy().var()
    assert normalised_mse(student, teacher).item() == pytest.approx(wanted.item())


@pytest.mark.parametrize(("constant", "wanted"), [(5.0, 1 / 25), (0.0, 1.0), (0.1, 1 / 0.01)])
def test_mse_of_a_constant_teacher_is_over_its_square(constant, wanted):
    teacher = torch.full((1, 3), constant)
    assert normalised_mse(teacher + 1, teacher).item() == pytest.approx(wanted, rel=1e-5)


def test_mse_leaves_out_what_the_teacher_masks():
    teacher = torch.tensor([1.0, 3.0, -torch.inf, torch.nan])
    student = torch.tensor([1.0, 5.0, -torch.inf, 7.0], requires_grad=True)
    loss = normalised_mse(student, teacher)
    loss.backward()
    assert loss.item() == 2
    assert student.grad.tolist() == [0, 2, 0, 0]
    assert math.isnan(normalised_mse(torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, 1.0])).item())


@pytest.mark.parametrize(("shape", "other", "axis"), [((2, 3, 4, 5), (2, 6, 4, 5), 1), ((2, 6, 3), (2, 6, 8), 2)])
def test_attention_maps_are_unit_means_of_squares_over_channels(shape, other, axis):
    student, teacher = normal(*shape), normal(*other, seed=1)
    maps = [(each.numpy() ** 2).mean(axis).reshape(2, -1) for each in (student, teacher)]
    one, two = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in maps)
    wanted = ((one - two) ** 2).sum(1).mean()
    assert attention_maps(student, teacher).item() == pytest.approx(wanted, abs=CLOSE)
    assert feature_maps(student, teacher).item() == pytest.approx(wanted, abs=CLOSE)


def test_feature_maps_of_the_same_channels_are_compared_by_value():
    student, teacher = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    assert feature_maps(student, teacher).item() == normalised_mse(student, teacher).item()


def test_relations_are_distances_over_their_mean_and_cosines_of_angles():
    student, teacher = normal(6, 3), normal(6, 8, seed=1)

    def distances(x: Any) -> Any:
        found = np.array([np.linalg.norm(x[i] - x[j]) for i, j in itertools.combinations(range(6), 2)])
        return found / found.mean()

    def cosine(x: Any, i: int, j: int, k: int) -> Any:
        one, two = x[i] - x[j], x[k] - x[j]
        return one @ two / np.linalg.norm(one) / np.linalg.norm(two)

    def cosines(x: Any, count: int) -> Any:
        return np.array([cosine(x, *places) for places in itertools.permutations(range(count), 3)])

    s, t = student.numpy(), teacher.numpy()
    near = huber(distances(s) - distances(t)).mean()
    assert relational(student, teacher, angles=0).item() == pytest.approx(near, abs=CLOSE)
    for count in (6, 4):
        wanted = near + 2 * huber(cosines(s, count) - cosines(t, count)).mean()
        assert relational(student, teacher, samples=count).item() == pytest.approx(wanted, abs=CLOSE)


def test_similarities_are_rows_of_unit_norm():
    student, teacher = normal(4, 3, 2), normal(4, 5, seed=1)
    grams = [each.numpy().reshape(4, -1) @ each.numpy().reshape(4, -1).T for each in (student, teacher)]
    one, two = (gram / np.linalg.norm(gram, axis=1, keepdims=True) for gram in grams)
    assert graph_based(student, teacher).item() == pytest.approx(((one - two) ** 2).sum() / 16, abs=CLOSE)


# --- gradients --------------------------------------------------------------------------------------------------------

TERMS: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, ...]]] = {
    "soft_targets": (lambda s, t: soft_targets(s, t, 2.5), (3, 4)),
    "hard_targets": (lambda s, t: hard_targets(s, torch.tensor([0, 3, 1])), (3, 4)),
    "log_probabilities": (lambda s, t: log_probabilities(s.exp()).sum(), (3, 4)),
    "normalised_mse": (normalised_mse, (3, 4)),
    "attention_maps": (attention_maps, (3, 2, 3, 3)),
    "feature_maps": (lambda s, t: feature_maps(s, t[:, :1]), (3, 2, 3, 3)),
    "relational": (relational, (5, 3)),
    "graph_based": (graph_based, (4, 3)),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_the_values(name):
    function, shape = TERMS[name]
    student, teacher = normal(*shape, grad=True), normal(*shape, seed=1, grad=True)
    assert torch.autograd.gradcheck(lambda each: function(each, teacher), (student,))
    function(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", [name for name in TERMS if name != "log_probabilities"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradients_are_finite_where_samples_are_zero_or_alike(name, dtype):
    function, shape = TERMS[name]
    student = torch.zeros(shape, dtype=getattr(torch, dtype))
    student[-1] = 1
    student.requires_grad_()
    loss = function(student, normal(*shape).float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == student.dtype
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e3


def test_soft_targets_hold_out_masked_classes():
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    student = torch.tensor([[2.0, -torch.inf, 1.0]], requires_grad=True)
    loss = soft_targets(student, logits, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(soft_targets(student[:, ::2], logits[:, ::2], 2.0).item())
    assert torch.isfinite(student.grad).all()


def test_soft_targets_of_large_logits_are_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = soft_targets(student, -student.detach(), 1.0)
    loss.backward()
    assert loss.item() == 2e4
    assert student.grad.tolist() == [[1, -1, 0]]


@pytest.mark.parametrize("name", ["soft_targets", "normalised_mse", "attention_maps", "relational", "graph_based"])
def test_a_student_comes_near_its_teacher(name):
    function, shape = TERMS[name]
    student, teacher = normal(*shape, grad=True), normal(*shape, seed=1)
    optimizer = torch.optim.Adam([student], lr=0.05)
    start = function(student, teacher).item()
    for _ in range(200):
        optimizer.zero_grad()
        function(student, teacher).backward()
        optimizer.step()
    assert function(student, teacher).item() < start / 100


# --- what does not matter ---------------------------------------------------------------------------------------------


@given(seed=seeds, temperature=st.floats(0.5, 20), shift=st.floats(-50, 50))
@settings(deadline=None, max_examples=30)
def test_soft_targets_of_equal_classes_are_nothing_and_pull_nowhere(seed, temperature, shift):
    student = normal(3, 4, seed=seed, scale=5, grad=True)
    loss = soft_targets(student, student.detach() + shift, temperature)
    loss.backward()
    assert abs(loss.item()) < CLOSE
    assert student.grad.abs().max() < CLOSE


@given(seed=seeds, temperature=st.floats(0.5, 20))
@settings(deadline=None, max_examples=30)
def test_soft_targets_are_not_negative_and_the_same_from_log_probabilities(seed, temperature):
    student, teacher = normal(3, 4, seed=seed), normal(3, 4, seed=seed + 1)
    loss = soft_targets(student, teacher, temperature)
    student, teacher = (log_probabilities(torch.softmax(each, -1)) for each in (student, teacher))
    assert loss.item() >= -CLOSE
    assert soft_targets(student, teacher, temperature).item() == pytest.approx(loss.item(), abs=CLOSE)


@given(seed=seeds, scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
@settings(deadline=None, max_examples=30)
def test_mse_does_not_depend_on_the_unit(seed, scale, shift):
    student, teacher = normal(5, 3, seed=seed), normal(5, 3, seed=seed + 1)
    wanted = normalised_mse(student, teacher).item()
    assert normalised_mse(scale * (student + shift), scale * (teacher + shift)).item() == pytest.approx(wanted)
    assert normalised_mse(teacher, teacher).item() == 0


@given(seed=seeds, scale=st.floats(1e-3, 1e3), size=st.integers(2, 7))
@settings(deadline=None, max_examples=30)
def test_relations_do_not_depend_on_rotation_scale_and_place(seed, scale, size):
    student, teacher = normal(size, 3, seed=seed), normal(size, 4, seed=seed + 1)
    turn, _ = torch.linalg.qr(normal(3, 3, seed=seed + 2))
    moved = scale * (student @ turn + normal(1, 3, seed=seed + 3))
    assert relational(moved, teacher).item() == pytest.approx(relational(student, teacher).item(), abs=1e-7)
    assert relational(moved, student).item() == pytest.approx(0, abs=1e-7)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_attention_does_not_depend_on_scale_or_the_order_of_channels(seed, scale):
    student, teacher = normal(2, 3, 4, 4, seed=seed), normal(2, 5, 4, 4, seed=seed + 1)
    wanted = attention_maps(student, teacher).item()
    assert attention_maps(scale * student.flip(1), teacher).item() == pytest.approx(wanted, abs=CLOSE)
    assert 0 <= wanted <= 2


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_similarities_do_not_depend_on_rotation_and_scale(seed, scale):
    student, teacher = normal(5, 3, seed=seed), normal(5, 4, seed=seed + 1)
    turn, _ = torch.linalg.qr(normal(3, 3, seed=seed + 2))
    wanted = graph_based(student, teacher).item()
    assert graph_based(scale * student @ turn, teacher).item() == pytest.approx(wanted, abs=CLOSE)


@pytest.mark.parametrize("size", [1, 2])
def test_few_samples_have_few_relations(size):
    student = normal(size, 3, grad=True)
    relational(student, normal(size, 3, seed=1)).backward()
    assert student.grad.abs().max() < CLOSE


# --- the loss ---------------------------------------------------------------------------------------------------------


def named(**tensors: Any) -> dict[str, Any]:
    return tensors


def test_outputs_are_compared_by_squared_error_unless_they_are_said_to_be_classes():
    student, teacher = named(y=normal(3, 4)), named(y=normal(3, 4, seed=1))
    assert Loss()(student, teacher).item() == normalised_mse(student["y"], teacher["y"]).item()
    soft = Loss(classes=True, temperature=3)(student, teacher)
    assert soft.item() == soft_targets(student["y"], teacher["y"], 3).item()
    assert list(Loss(classes=True).terms(named(y=normal(3)), named(y=normal(3)))) == ["mse"]
    assert list(Loss(classes=True).terms(named(y=normal(3, 1)), named(y=normal(3, 1)))) == ["mse"]
    assert list(Loss(kind="soft").terms(named(y=normal(1, 3, 4)), named(y=normal(1, 3, 4)))) == ["soft"]
    assert list(Loss(kind="mse", classes=True).terms(student, teacher)) == ["mse"]


def test_labels_take_their_share():
    student, teacher, labels = named(y=normal(3, 4)), named(y=normal(3, 4, seed=1)), torch.tensor([0, 1, 3])
    terms = Loss(classes=True, temperature=3, alpha=0.7).terms(student, teacher, labels)
    assert terms["soft"].item() == pytest.approx(0.7 * soft_targets(student["y"], teacher["y"], 3).item())
    assert terms["hard"].item() == pytest.approx(0.3 * hard_targets(student["y"], labels).item())
    assert list(Loss().terms(student, teacher, labels)) == ["mse"]


def test_probabilities_are_taken_for_what_they_are():
    student, teacher = normal(3, 4).float(), normal(3, 4, seed=1).float()
    one, other = (named(y=torch.softmax(each, -1)) for each in (student, teacher))
    loss, labels = Loss(classes=True, temperature=3, alpha=0.5), torch.tensor([0, 1, 3])
    wanted = loss(named(y=student), named(y=teacher), labels).item()
    assert loss(one, other, labels).item() == pytest.approx(wanted, rel=1e-5)
    sure = named(y=torch.eye(4, requires_grad=True))
    assert torch.isfinite(loss(sure, named(y=torch.eye(4).flip(0)), torch.arange(4)))


def test_several_outputs_share_the_weight_and_integers_are_left_out():
    student = named(boxes=normal(2, 3, 4), scores=normal(2, 5), count=torch.tensor([1, 2]))
    teacher = named(boxes=normal(2, 3, 4, seed=1), scores=normal(2, 5, seed=2), count=torch.tensor([3, 4]))
    terms = Loss(classes=True, output_weight=4).terms(student, teacher)
    assert terms["mse"].item() == pytest.approx(2 * normalised_mse(student["boxes"], teacher["boxes"]).item())
    assert terms["soft"].item() == pytest.approx(2 * soft_targets(student["scores"], teacher["scores"], 2).item())
    only = Loss(outputs=("scores",))(student, teacher)
    assert only.item() == normalised_mse(student["scores"], teacher["scores"]).item()


def test_terms_are_weighted_and_add_up():
    student = named(y=normal(3, 4), a=normal(3, 2, 4, 4), b=normal(3, 6))
    teacher = named(y=normal(3, 4, seed=1), a=normal(3, 2, 4, 4, seed=2), b=normal(3, 6, seed=3))
    loss = Loss(features=0.5, attention=2, relational=3, graph=4, tensors=("a", "b"), outputs=("y",))
    terms = loss.terms(student, teacher)
    pairs = [(student[name], teacher[name]) for name in "ab"]
    assert list(terms) == ["mse", "features", "attention", "relational", "graph"]
    assert terms["features"].item() == pytest.approx(0.25 * sum(normalised_mse(*pair).item() for pair in pairs))
    assert terms["attention"].item() == pytest.approx(2 * attention_maps(*pairs[0]).item())
    assert terms["relational"].item() == pytest.approx(1.5 * sum(relational(*pair).item() for pair in pairs))
    assert terms["graph"].item() == pytest.approx(2 * sum(graph_based(*pair).item() for pair in pairs))
    assert loss(student, teacher).item() == pytest.approx(sum(value.item() for value in terms.values()))
    assert loss.watch == ("a", "b")


def test_an_output_may_be_compared_as_an_inner_tensor_too():
    student, teacher = named(y=normal(3, 4)), named(y=normal(3, 4, seed=1))
    loss = Loss(relational=1, tensors=("y",), outputs=("y",))
    assert list(loss.terms(student, teacher)) == ["mse", "relational"]
    assert loss.watch == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hard"}, "loss: kind must be one of auto, soft, mse, got 'hard'"),
        ({"classes": 1}, "loss: classes must be True or False, got 1"),
        ({"temperature": 0}, "loss: temperature must be a number above 0, got 0"),
        ({"temperature": math.inf}, "loss: temperature must be a number above 0, got inf"),
        ({"alpha": 1.5}, "loss: alpha must be in [0, 1], got 1.5"),
        ({"features": -1}, "loss: features must be a number of at least 0, got -1"),
        ({"graph": "1"}, "loss: graph must be a number of at least 0, got '1'"),
        ({"tensors": "a"}, "loss: tensors must be a list of names or 'auto', got 'a'"),
        ({"outputs": ("a", "a")}, "loss: outputs must be names, each once, got ('a', 'a')"),
        ({"outputs": ()}, "loss: outputs must be names, or None for all, got 'none'"),
        ({"tensors": (), "graph": 1}, "loss: tensors must be names for graph, got 'none'"),
        ({"output_weight": 0}, "loss: weights must be one above 0, or a loss of the user's, got 'none'"),
        ({"user": "loss.py"}, "loss: user must be module:function, got 'loss.py'"),
        ({"user": "losses:mine"}, "'losses:mine' names code to run, which is not allowed here"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(OptionError) as caught:
        Loss(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph": 1}, "tensors must be names for graph (Loss.fitted chooses them), got 'auto'"),
        ({"graph": 1, "tensors": ("b",)}, "tensors must be 'b' among the student's, got 'y'"),
        ({"attention": 1, "tensors": ("y",), "outputs": ("y",)}, "tensors must be one of rank 3 or 4 for attention"),
        ({"outputs": ("z",)}, "tensors must be 'z' among the teacher's, got 'y'"),
    ],
)
def test_refuses_tensors_that_are_not_there(options, message):
    tensors = named(y=normal(3, 4))
    with pytest.raises(OptionError) as caught:
        Loss(**options)(tensors, tensors)
    assert message in str(caught.value)


def test_refuses_what_is_not_of_classes():
    with pytest.raises(OptionError, match=r"kind must be 'auto' or 'mse' for the output 'y' of shape \[3\]"):
        Loss(kind="soft")(named(y=normal(3)), named(y=normal(3)))
    with pytest.raises(OptionError, match="outputs must be one of floats"):
        Loss()(named(y=torch.arange(3)), named(y=torch.arange(3)))
    with pytest.raises(OptionError, match=r"labels must be the shape of the positions .* got \[5\]"):
        Loss(classes=True)(named(y=normal(3, 4)), named(y=normal(3, 4)), torch.arange(5))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"labels: expected whole numbers of shape \[2\], got float32 of shape \[2\]"),
        (torch.tensor([0, 1, 2]), r"labels: expected whole numbers of shape \[2\], got int64 of shape \[3\]"),
        (torch.tensor([0, 7]), "labels: expected classes from 0 to 3, got 7"),
        (torch.tensor([-1, 0]), "labels: expected classes from 0 to 3, got -1"),
    ],
)
def test_refuses_labels(labels, message):
    with pytest.raises(DataError, match=message):
        hard_targets(normal(2, 4), labels)


def test_refuses_shapes_that_do_not_fit():
    with pytest.raises(ModelError, match=r"the output 'y' must have the teacher's shape \[2, 4\], got \[2, 3\]"):
        Loss()(named(y=normal(2, 3)), named(y=normal(2, 4)))
    with pytest.raises(ModelError, match=r"the tensor 'a': .* same batch on axis 0, got \[2, 3\] and \[3, 3\]"):
        Loss(graph=1, output_weight=0, tensors=("a",))(named(a=normal(2, 3)), named(a=normal(3, 3)))
    with pytest.raises(ModelError, match=r"the same batch and positions, got \[1, 2, 3, 3\] and \[1, 2, 3, 4\]"):
        attention_maps(normal(1, 2, 3, 3), normal(1, 2, 3, 4))
    with pytest.raises(ModelError, match="tensors of rank 3 or 4"):
        feature_maps(normal(2, 3), normal(2, 4))


# --- a user's loss ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "loss_of_mine.py").write_text(
        "import torch\n"
        "def good(student, teacher, labels): return 3 * (student['y'] - teacher['y']).abs().mean()\n"
        "def rows(student, teacher, labels): return student['y'].abs().mean(1)\n"
        "def number(student, teacher, labels): return 1.0\n"
        "def whole(student, teacher, labels): return torch.tensor(1)\n"
        "def cut(student, teacher, labels): return student['y'].detach().sum()\n"
        "def bad(student, teacher, labels): return student['z']\n"
    )
    monkeypatch.chdir(tmp_path)


def test_a_loss_of_the_users_is_a_term(mine):
    student, teacher = named(y=normal(2, 3, grad=True)), named(y=normal(2, 3, seed=1))
    loss = Loss(user="loss_of_mine:good", allow_code=True, output_weight=0)
    terms = loss.terms(student, teacher)
    assert list(terms) == ["user"]
    assert terms["user"].item() == pytest.approx(3 * (student["y"] - teacher["y"]).abs().mean().item())
    assert list(Loss(user="loss_of_mine:good", allow_code=True).terms(student, teacher)) == ["mse", "user"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows", "must give a scalar tensor of floats, got a tensor of torch.float64 and shape [2]"),
        ("number", "must give a scalar tensor of floats, got a float"),
        ("whole", "must give a scalar tensor of floats, got a tensor of torch.int64 and shape []"),
        ("cut", "must give a tensor with a gradient, got one that does not depend on the student"),
        ("bad", "failed: KeyError: 'z'"),
    ],
)
def test_refuses_a_loss_of_the_users_that_is_none(mine, name, message):
    loss = user_loss(f"loss_of_mine:{name}", allow_code=True)
    with pytest.raises(OptionError) as caught:
        loss(named(y=normal(2, 3, grad=True)), named(y=normal(2, 3)), None)
    assert str(caught.value) == f"the loss 'loss_of_mine:{name}' {message}"


def test_a_loss_of_the_users_needs_no_gradient_where_there_is_none(mine):
    loss = user_loss("loss_of_mine:good", allow_code=True)
    with torch.no_grad():
        assert not loss(named(y=normal(2, 3)), named(y=normal(2, 3)), None).requires_grad
