from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onnxcomp.train.fixed import Fixed, Ties
from onnxcomp.train.options import Pruning
from onnxcomp.train.pruner import Pruner, lamp_scores


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32)))


def step(fixed: Fixed, *parameters: nn.Parameter) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for number in range(3):
        optimizer.zero_grad()
        loss = sum((each * torch.linspace(-1, 1, each.numel()).reshape(each.shape)).sum() for each in parameters)
        (loss * (number + 1)).backward()
        fixed.before_step()
        optimizer.step()
        fixed.after_step()


def test_zeros_stay_zeros_and_the_rest_moves():
    weight = parameter(8, 6)
    with torch.no_grad():
        weight[::2] = 0
    before = weight.detach().clone()
    fixed = Fixed([("w", weight)], codebooks=False)

    step(fixed, weight)

    assert bool((weight[::2] == 0).all())
    assert bool((weight[1::2] != before[1::2]).any())


def test_zeros_are_not_negative():
    weight = nn.Parameter(-torch.ones(4, 4))
    fixed = Fixed([("w", weight)], codebooks=False)
    fixed.set_mask("w", torch.eye(4, dtype=torch.bool))
    step(fixed, weight)

    assert not bool(torch.signbit(weight.detach())[~torch.eye(4, dtype=torch.bool)].any())


def test_zeros_of_biases_are_trained():
    bias = nn.Parameter(torch.zeros(6))
    fixed = Fixed([("b", bias)])

    step(fixed, bias)

    assert int(torch.count_nonzero(bias)) == 6


def test_places_that_share_a_value_go_on_sharing_it():
    values = torch.tensor([-0.5, 0.0, 0.25, 1.0])
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (16, 12)))
    weight = nn.Parameter(values[codes])
    fixed = Fixed([("w", weight)])

    step(fixed, weight)

    found = [torch.unique(weight.detach()[codes == code]) for code in range(4)]
    assert [len(each) for each in found] == [1, 1, 1, 1]
    assert found[1].item() == 0.0
    assert all(found[code].item() != values[code].item() for code in (0, 2, 3))


def test_places_that_became_zero_say_nothing_of_the_value_that_they_shared():
    weight = nn.Parameter(torch.tensor([0.5, -1.0]).repeat(8, 8))
    fixed = Fixed([("w", weight)])
    kept = torch.ones(8, 16, dtype=torch.bool)
    kept[1:] = False
    fixed.set_mask("w", kept)

    weight.grad = torch.ones(8, 16)
    fixed.before_step()

    assert weight.grad[0].tolist() == [8.0] * 16


def test_large_weights_of_16_bits_are_no_codebook():
    weight = nn.Parameter(parameter(300, 800).detach().half().float())
    assert len(torch.unique(weight)) < weight.numel() / 8

    assert not Fixed([("w", weight)]).ties


@pytest.mark.parametrize("axis", [0, 1])
def test_each_channel_may_have_a_codebook_of_its_own(axis: int):
    values = parameter(60, 16).detach()
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 16, (60, 200)))
    weight = nn.Parameter(values.gather(1, codes) if axis == 0 else values.gather(1, codes).T.contiguous())
    assert len(torch.unique(weight)) > 256

    assert Fixed([("w", weight)]).ties


def test_the_gradient_of_a_shared_value_is_the_sum_over_its_places():
    weight = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    gradient = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])

    np.testing.assert_array_equal(Ties(weight).apply(gradient), [[1001.0, 110.0], [110.0, 1001.0]])


def test_a_weight_of_many_values_has_no_codebook():
    assert not Fixed([("w", parameter(16, 12))]).ties


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40, unique_by=abs))
def test_scores_order_a_layer_as_magnitudes_do(values: list[float]):
    weight = torch.tensor(values)
    scores = lamp_scores(weight)
    order = np.argsort(np.abs(values), kind="stable")

    assert (np.diff(scores.numpy()[order]) >= -1e-12).all()
    assert float(scores.max()) <= 1.0


def test_scores_are_shares_of_what_is_no_smaller():
    np.testing.assert_allclose(lamp_scores(torch.tensor([3.0, 1.0, 2.0])), [9 / 9, 1 / 14, 4 / 13])


def ramp(how: str, total: int = 100, end: float = 0.5) -> list[float]:
    fixed = Fixed([("a", parameter(20, 30)), ("b", parameter(30, 10, seed=1))])
    pruner = Pruner(fixed, Pruning(sparsity=0.9, how=how, end=end, steps=10), total)
    found = []
    for number in range(total):
        pruner.before_step(number)
        found.append(fixed.sparsity())
    return found


def test_the_ramp_is_cubic_and_ends_at_the_target():
    found = ramp("gradual")

    assert found[0] == 0.0
    assert found[25] == pytest.approx(0.9 * (1 - 0.5**3), abs=0.002)
    assert found[50] == pytest.approx(0.9, abs=0.002)
    assert found[99] == found[50]
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))


def test_once_is_before_the_first_step():
    assert ramp("once")[0] == pytest.approx(0.9, abs=0.002)


@pytest.mark.parametrize("how", ["gradual", "penalty"])
@pytest.mark.parametrize("total", [1, 2, 40])
def test_the_target_is_reached_within_the_training(how: str, total: int):
    assert ramp(how, total, end=1.0)[-1] == pytest.approx(0.9, abs=0.002)


def test_with_a_penalty_weights_go_at_the_end_of_the_ramp():
    found = ramp("penalty")

    assert found[49] == 0.0
    assert found[50] == pytest.approx(0.9, abs=0.002)


def test_what_stays_is_chosen_anew_by_the_weights_of_the_time():
    weight = parameter(10, 10)
    fixed = Fixed([("w", weight)])
    pruner = Pruner(fixed, Pruning(sparsity=0.8, end=1.0, steps=2), 10)
    pruner.before_step(0)
    small = weight.detach().abs() < weight.detach().abs().quantile(0.5)
    with torch.no_grad():
        weight[small] = 5.0
    for number in range(1, 11):
        pruner.before_step(number)

    assert fixed.sparsity() == pytest.approx(0.8)
    assert bool((weight.detach()[~small] == 0).all())


def test_a_ramp_that_waits_goes_on_where_it_was():
    fixed = Fixed([("w", parameter(20, 20))])
    pruner = Pruner(fixed, Pruning(sparsity=0.9, end=0.5, steps=10), 100)
    for number in range(20):
        pruner.before_step(number)
    before = fixed.sparsity()
    pruner.waits = True
    for number in range(20, 60):
        pruner.before_step(number)
    assert fixed.sparsity() == before
    pruner.waits = False
    for number in range(60, 100):
        pruner.before_step(number)

    assert fixed.sparsity() == pytest.approx(0.9, abs=0.003)


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_a_penalty_draws_weights_to_zero(norm: str):
    weight = parameter(10, 10)
    pruner = Pruner(Fixed([("w", weight)]), Pruning(sparsity=0.5, how="penalty", penalty=1.0, norm=norm), 100)

    value = pruner.penalty(10)

    assert isinstance(value, torch.Tensor)
    value.backward()
    assert bool((torch.sign(weight.grad) == torch.sign(weight.detach())).all())


def test_the_grid_of_codes_is_no_codebook_and_its_zeros_may_move():
    weight = nn.Parameter(torch.round(parameter(16, 12).detach() * 2))
    fixed = Fixed([("w", weight)], codes={"w"}, rounded={"w"})

    step(fixed, weight)

    assert not fixed.ties
    assert not fixed.masks
    assert len(torch.unique(weight.detach())) > 20
