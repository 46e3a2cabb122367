"""Compressed models in the bridge: what they are made of is trained, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from onnxcomp import Context, Model
from onnxcomp.packed import find_packed
from onnxcomp.torch_bridge import load
from onnxcomp_passes import Cluster, LowRank, Pack, Prune
from tests.models import graph_model, random_weights

Array = np.ndarray[Any, Any]

ROUNDING = 1e-5
"""Of values below ten, which are sums of hundreds of products."""

WIDTH = 96


def network() -> Model:
    text = f"""g (float[N, {WIDTH}] x) => (float[N, {WIDTH}] y) {{
        a = MatMul(x, W)  b = Relu(a)  y = Gemm(b, V, c)
    }}"""
    scale = WIDTH**-0.5
    weights = {"W": random_weights(WIDTH, WIDTH, scale=scale), "V": random_weights(WIDTH, WIDTH, seed=1, scale=scale)}
    return Model.load(graph_model(text, {**weights, "c": random_weights(WIDTH, seed=2)}))


def packed(sparsity: float, bits: int) -> Model:
    model = network()
    if sparsity:
        Prune(sparsity=sparsity).rewrite(model, Context())
    if bits:
        Cluster(bits=bits).rewrite(model, Context())
    assert Pack().rewrite(model, Context()).count
    return model


def run(model: Model, x: Array) -> Array:
    return np.asarray(onnxruntime.InferenceSession(model.to_proto().SerializeToString()).run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("sparsity", "bits"), [(0.0, 4), (0.0, 8), (0.5, 4), (0.8, 4), (0.9, 0), (0.97, 4), (0.5, 0), (0.998, 0)]
)
def test_a_packed_model_is_trained_through_its_codebooks(sparsity, bits):
    model = packed(sparsity, bits)
    before = model.to_proto().SerializeToString()
    forms = len(find_packed(model))
    x = random_weights(5, WIDTH)
    module = load(model)

    y = module(torch.from_numpy(x))
    np.testing.assert_allclose(y.detach(), run(model, x), atol=ROUNDING)
    assert module.write_back(model) == []
    assert model.to_proto().SerializeToString() == before

    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 1e-3 * parameter.grad
    changed = module.write_back(model)
    assert len(changed) == len(list(module.parameters())) >= 3
    assert len(find_packed(model)) == forms
    np.testing.assert_allclose(run(model, x), module(torch.from_numpy(x)).detach(), atol=ROUNDING)


def test_a_codebook_is_a_parameter_of_few_numbers():
    module = load(packed(0.0, 4))

    sizes = sorted(parameter.numel() for parameter in module.parameters())

    assert sizes == [16, 16, WIDTH]


def test_a_low_rank_model_is_trained_in_its_factors():
    model = network()
    assert LowRank(rank=8, min_elements=1).rewrite(model, Context()).count == 2
    x = random_weights(5, WIDTH)
    module = load(model)

    y = module(torch.from_numpy(x))
    y.square().sum().backward()

    np.testing.assert_allclose(y.detach(), run(model, x), atol=ROUNDING)
    assert sorted(tuple(parameter.shape) for parameter in module.parameters()) == [
        *[(8, WIDTH)] * 2,
        (WIDTH,),
        *[(WIDTH, 8)] * 2,
    ]
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.write_back(model) == []
