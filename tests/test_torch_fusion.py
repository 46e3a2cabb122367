"""Steps that run as one function: the same values but for rounding, and still there to be watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxcomp.torch_bridge import load
from onnxcomp.torch_bridge.plan import Plan, run_plan
from tests.models import graph_model, random_weights

Array = np.ndarray[Any, Any]

ROUNDING = 2e-6
"""Of values below ten: some float32 roundings (6e-8 relative)."""

HALF, ONE, ROOT = np.array(0.5, np.float32), np.array(1, np.float32), np.array(2**0.5, np.float32)
INVERSE = np.array(0.5**0.5, np.float32)

GELUS = [
    "d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(m, half)",
    "d = Mul(x, inverse)  e = Erf(d)  a = Add(one, e)  m = Mul(half, x)  y = Mul(m, a)",
    "d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(a, half)  y = Mul(x, m)",
    "d = Mul(inverse, x)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(half, m)",
]
NORM = """a = ReduceMean<axes = [-1]>(x)  b = Sub(x, a)  c = Pow(b, two)  d = ReduceMean<axes = [-1]>(c)
    e = Add(d, epsilon)  f = Sqrt(e)  h = Div(b, f)  i = Mul(h, scale)  y = Add(i, bias)"""


def gelu_model(body: str, **more: Array) -> onnx.ModelProto:
    weights = {"half": HALF, "one": ONE, "root": ROOT, "inverse": INVERSE, **more}
    used = {name: value for name, value in weights.items() if name in body}
    return graph_model(f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}", used)


def norm_model(body: str = NORM, outputs: str = "float[N, 8] y") -> onnx.ModelProto:
    weights = {"two": np.array(2, np.float32), "epsilon": np.array(1e-5, np.float32)}
    weights |= {"scale": random_weights(8), "bias": random_weights(8, seed=1)}
    return graph_model(f"g (float[N, 8] x) => ({outputs}) {{ {body} }}", weights)


def linear_model() -> onnx.ModelProto:
    body = "h = MatMul(x, W)  y = Add(b, h)"
    weights = {"W": random_weights(8, 8), "b": random_weights(8, seed=1)}
    return graph_model(f"g (float[N, 3, 8] x) => (float[N, 3, 8] y) {{ {body} }}", weights)


ATTENTIONS = [
    "a = MatMul(q, k)  b = Mul(a, half)  c = Softmax(b)  y = MatMul(c, v)",
    "a = MatMul(q, k)  b = Div(a, root)  c = Add(b, mask)  d = Softmax<axis = 3>(c)  y = MatMul(d, v)",
    "a = MatMul(q, k)  c = Add(mask, a)  d = Softmax<axis = -1>(c)  y = MatMul(d, v)",
    "a = MatMul(q, k)  c = Add(a, mask)  d = Softmax(c)  e = IsNaN(d)  f = Where(e, zero, d)  y = MatMul(f, v)",
]


def attention_model(body: str) -> onnx.ModelProto:
    """Queries x, and keys and values that are trained."""
    weights = {
        "half": HALF,
        "root": ROOT,
        "mask": np.array([[0, -1, -1e9, 0, 1]], np.float32),
        "zero": np.zeros((), np.float32),
    }
    trained = {"W": random_weights(8, 8), "k": random_weights(2, 3, 8, 5), "v": random_weights(2, 3, 5, 4, seed=1)}
    used = {name: value for name, value in weights.items() if name in body}
    text = f"g (float[2, 3, N, 8] x) => (float[2, 3, N, 4] y) {{ q = MatMul(x, W)  {body} }}"
    return graph_model(text, {**used, **trained})


def operators(plan: Plan) -> list[str]:
    return [step.call.op for step in plan.steps]


def step_by_step(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs and the gradients of each step on its own."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    values = {**module._buffers, **module._parameters, "x": x}
    run_plan(module.plan, values)
    (values["y"] ** 2).sum().backward()
    return [values["y"].detach(), x.grad, *(each.grad.clone() for each in module.parameters())]


def fused(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    (y**2).sum().backward()
    return [y.detach(), x.grad, *(each.grad.clone() for each in module.parameters())]


@pytest.mark.parametrize(
    ("model", "expected", "shape"),
    [
        *[(gelu_model(body), ["gelu"], (5, 8)) for body in GELUS],
        (norm_model(), ["normalize"], (5, 8)),
        (norm_model(NORM.replace("Pow(b, two)", "Mul(b, b)")), ["normalize"], (5, 8)),
        (linear_model(), ["linear"], (5, 3, 8)),
        *[(attention_model(body), ["MatMul", "attend"], (2, 3, 6, 8)) for body in ATTENTIONS],
    ],
)
def test_a_group_becomes_one_step_and_changes_values_and_gradients_by_rounding_alone(model, expected, shape):
    module = load(model, freeze=["mask"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    assert operators(module._fast) == expected
    for got, wanted in zip(fused(module, x), step_by_step(module, x), strict=True):
        torch.testing.assert_close(got, wanted, atol=10 * ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize(
    "model",
    [
        gelu_model(GELUS[0], half=np.array(0.4, np.float32)),
        gelu_model(GELUS[0], root=np.array(1.4, np.float32)),
        gelu_model(GELUS[0].replace("Mul(m, half)", "Mul(m, e)")),
        gelu_model(GELUS[1].replace("Mul(half, x)", "Mul(half, e)")),
        attention_model(ATTENTIONS[0].replace("Softmax(b)", "Softmax<axis = 2>(b)")),
        attention_model(ATTENTIONS[3].replace("zero, d", "half, d")),
        norm_model(NORM.replace("Sub(x, a)", "Sub(a, x)")),
        norm_model(NORM.replace("axes = [-1]>(c)", "axes = [0]>(c)")),
        norm_model(NORM, "float[N, 8] y, float[N, 8] h"),
        graph_model("g (float[N, 8] x, float[8] b) => (float[N, 8] y) { h = MatMul(x, W)  y = Add(h, b) }",
                    W=random_weights(8, 8)),
    ],
)  # fmt: skip
def test_what_is_not_quite_the_pattern_stays(model):
    module = load(model)

    assert operators(module._fast) == operators(module.plan)


def test_the_inside_of_a_group_can_be_watched():
    module = load(linear_model())
    x = torch.ones(2, 3, 8)

    found = module.run({"x": x}, watch=["h"])

    torch.testing.assert_close(found["h"], x @ module._parameters["W"])
    torch.testing.assert_close(found["y"], module(x), atol=ROUNDING, rtol=ROUNDING)
