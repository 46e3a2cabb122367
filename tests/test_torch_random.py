"""Any graph in the bridge: the values of ONNX Runtime, before and after training, and nothing changed without it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from hypothesis import HealthCheck, given, seed, settings

from onnxcomp.model import Model
from onnxcomp.torch_bridge import GraphModule, load
from tests.models import random_inputs
from tests.strategies import small_graphs

ROUNDING = 1e-4
"""Relative to the largest output: after up to ten layers of some dozens of roundings (6e-8) each."""

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(proto: onnx.ModelProto, module: GraphModule) -> dict[str, torch.Tensor]:
    """The bridge's outputs, which are those of ONNX Runtime."""
    feed = random_inputs(proto)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feed)
    got = module.run({name: torch.from_numpy(value) for name, value in feed.items()})
    for wanted, value in zip(expected, got.values(), strict=True):
        largest = float(np.abs(wanted).max(initial=1.0))
        np.testing.assert_allclose(value.detach(), wanted, atol=ROUNDING * largest)
    return got


@seed(11)
@given(small_graphs())
@SETTINGS
def test_any_graph_is_trained_and_written_back(proto):
    model = Model.load(proto)
    before = model.to_proto()
    module = load(model)

    got = check(proto, module)
    assert module.write_back(model) == []
    assert model.to_proto() == before

    learnt = [value for value in got.values() if value.requires_grad]
    if learnt:
        sum(value.square().mean() for value in learnt).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * torch.sign(parameter.grad)
        module.write_back(model)
        check(model.to_proto(), module)
