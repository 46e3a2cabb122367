"""Gradients of the bridge's operators against those of small changes, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onnxcomp.torch_bridge import NodeCall, operator_names
from onnxcomp.torch_bridge.registry import find_operator

Case = tuple[str, list[Any], dict[str, Any]]
"""Operator, inputs (a shape: float64 with a gradient) and attributes."""


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


IMAGE = (2, 3, 5, 6)

CASES: list[Case] = [
    *[
        (op, [(3, 4)], {})
        for op in ("Identity", "Neg", "Abs", "Exp", "Erf", "Sin", "Cos", "Atan", "Sinh", "Cosh", "Asinh")
    ],
    *[
        (op, [(3, 4)], {})
        for op in ("Sigmoid", "Tanh", "Softplus", "Softsign", "Mish", "HardSwish", "HardSigmoid", "Tan")
    ],
    *[(op, [(3, 4)], {}) for op in ("Relu", "Elu", "Celu", "Selu", "LeakyRelu", "ThresholdedRelu", "Shrink", "Swish")],
    *[(op, [(3, 4)], {}) for op in ("Gelu", "Softmax", "LogSoftmax", "Reciprocal", "LpNormalization")],
    *[(op, [torch.rand(3, 4) * 0.8 + 0.1], {}) for op in ("Sqrt", "Log", "Asin", "Acos", "Atanh")],
    ("Acosh", [torch.rand(3, 4) + 1.5], {}),
    ("Det", [(3, 3)], {}),
    ("Gelu", [(3, 4)], {"approximate": "tanh"}),
    *[(op, [(3, 4), (4,)], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Mod")],
    ("Pow", [torch.rand(3, 4) + 0.5, (3, 1)], {}),
    ("Pow", [(3, 4), torch.tensor(2.0)], {}),
    ("PRelu", [(2, 3, 4), (3, 1)], {}),
    ("PRelu", [(2, 3, 4), (2, 3, 4)], {}),
    ("Clip", [(3, 4), torch.tensor(-0.5), torch.tensor(0.5)], {}),
    ("Reshape", [(3, 4), ints(2, 0, -1)[[0, 2]]], {}),
    ("Transpose", [(3, 4, 2)], {"perm": [2, 0, 1]}),
    ("Squeeze", [(3, 1, 2), ints(1)], {}),
    ("Unsqueeze", [(3, 2), ints(0, -1)], {}),
    ("Flatten", [(3, 2, 2)], {"axis": 2}),
    ("Expand", [(3, 1), ints(2, 3, 4)], {}),
    ("Concat", [(3, 2), (3, 4)], {"axis": 1}),
    ("Split", [(3, 5), ints(2, 3)], {"axis": 1}),
    ("Slice", [(4, 6), ints(-1, 1), ints(-100, 6), ints(0, 1), ints(-1, 2)], {}),
    ("Tile", [(2, 3), ints(2, 2)], {}),
    *[("Pad", [(3, 4), ints(1, 2, 0, 2)], {"mode": mode}) for mode in ("constant", "reflect", "edge", "wrap")],
    ("Trilu", [(3, 4)], {}),
    ("DepthToSpace", [(1, 8, 2, 3)], {"blocksize": 2}),
    ("SpaceToDepth", [(1, 2, 4, 6)], {"blocksize": 2}),
    ("ReverseSequence", [(4, 3), ints(2, 4, 1)], {}),
    ("Gather", [(5, 3), ints(0, -1, 0)], {}),
    ("Gather", [(2, 5, 3), torch.tensor(2)], {"axis": 1}),
    ("GatherElements", [(3, 4), torch.tensor([[0, -1, 2, 1]])], {}),
    ("GatherND", [(2, 3, 4), torch.tensor([[0, 1], [1, -1]])], {}),
    ("ScatterElements", [(3, 4), torch.tensor([[0, -1, 2, 1]]), (1, 4)], {}),
    ("ScatterElements", [(3, 4), torch.tensor([[0, -1, 2, 1]]), (1, 4)], {"reduction": "mul"}),
    ("ScatterND", [(4, 3), torch.tensor([[1], [3]]), (2, 3)], {}),
    ("ScatterND", [(4, 3), torch.tensor([[1], [1]]), (2, 3)], {"reduction": "add"}),
    ("Where", [torch.tensor([[True], [False]]), (2, 3), (1, 3)], {}),
    ("Compress", [(3, 4), torch.tensor([True, False, True])], {"axis": 0}),
    ("TopK", [(3, 6), ints(2)], {}),
    *[
        (f"Reduce{kind}", [torch.rand(2, 3, 4) + 0.5, ints(0, -1)], {"keepdims": 0})
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    ],
    ("CumSum", [(3, 4), torch.tensor(1)], {"exclusive": 1, "reverse": 1}),
    ("CumProd", [(3, 4), torch.tensor(1)], {}),
    ("Conv", [IMAGE, (4, 3, 3, 2), (4,)], {"pads": [1, 0, 1, 2], "strides": [2, 1], "dilations": [1, 2]}),
    ("Conv", [(1, 4, 7), (4, 2, 3)], {"group": 2, "auto_pad": "SAME_LOWER", "strides": [2]}),
    ("ConvTranspose", [(1, 2, 3, 3), (2, 3, 3, 2), (3,)], {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ("ConvTranspose", [(1, 2, 3), (2, 3, 3), (3,)], {"strides": [2], "output_shape": [9]}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 0, 1, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [2, 3], "pads": [0, 1, 1, 0], "count_include_pad": 1}),
    ("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("LpPool", [IMAGE], {"kernel_shape": [2, 2]}),
    *[
        (op, [IMAGE], {})
        for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "LRN", "MeanVarianceNormalization")
    ],
    ("BatchNormalization", [IMAGE, (3,), (3,), torch.rand(3), torch.rand(3) + 0.5], {}),
    ("InstanceNormalization", [IMAGE, (3,), (3,)], {}),
    ("LayerNormalization", [(2, 3, 4), (3, 4), (3, 4)], {"axis": 1}),
    ("LayerNormalization", [(2, 3, 4), (1, 4), (4,)], {"axis": 1}),
    ("GroupNormalization", [(2, 4, 3), (4,), (4,)], {"num_groups": 2}),
    ("RMSNormalization", [(2, 3, 4), (4,)], {}),
    ("MatMul", [(2, 3, 4), (4, 5)], {}),
    ("Gemm", [(4, 3), (5, 4), (3, 1)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Attention", [(2, 2, 3, 4), (2, 1, 5, 4), (2, 1, 5, 4)], {}),
    ("Attention", [(2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4), ~torch.eye(3).bool()], {"is_causal": 1, "softcap": 2.0}),
    ("GridSample", [(1, 2, 4, 5), torch.rand(1, 3, 3, 2) * 1.2 - 0.6], {"align_corners": 1}),
    ("Einsum", [(3, 4), (4, 2)], {"equation": "ij, jk -> ik"}),
    *[
        ("Resize", [(1, 2, 4, 5), None, torch.tensor([1.0, 1.0, 1.5, 0.6])], {"mode": mode, "antialias": smooth})
        for mode, smooth in (("nearest", 0), ("linear", 0), ("cubic", 0), ("linear", 1))
    ],
    ("Resize", [(1, 2, 4, 5), None, torch.tensor([1.0, 1.0, 2.0, 2.0])], {"mode": "linear"}),
]
"""LRN and its like have defaults that make some gradients small, not wrong."""

ATTRIBUTES: dict[str, dict[str, Any]] = {"LRN": {"size": 3, "alpha": 0.5}, "LpNormalization": {"axis": -1}}

STEPS = {"Ceil", "Floor", "Round", "Sign"}
"""Constant but for jumps, so that their gradient is 0."""


def tensors(inputs: list[Any]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    found: list[Tensor | None] = []
    for given in inputs:
        if isinstance(given, tuple):
            found.append(torch.randn(given, generator=generator, dtype=torch.float64, requires_grad=True))
        elif given is not None and given.is_floating_point() and given.numel() > 4:
            found.append(given.double().requires_grad_())
        else:
            found.append(given.double() if given is not None and given.is_floating_point() else given)
    return found


@pytest.mark.parametrize(("op", "inputs", "attrs"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_gradients_are_those_of_small_changes(op, inputs, attrs):
    function = find_operator("", op)
    assert function is not None
    call = NodeCall("n", op, opset=18 if op != "GroupNormalization" else 21, attrs={**ATTRIBUTES.get(op, {}), **attrs})
    given = tensors(inputs)
    learnt = [each for each in given if each is not None and each.requires_grad]

    def run(*values: Tensor) -> Any:
        left = iter(values)
        found = function(call, *(next(left) if each is not None and each.requires_grad else each for each in given))
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(each for each in outputs if each is not None and each.is_floating_point())

    assert torch.autograd.gradcheck(run, learnt)


@pytest.mark.parametrize("op", sorted(STEPS))
def test_steps_have_no_slope(op):
    function = find_operator("", op)
    assert function is not None
    x = torch.tensor([0.3, -1.7], requires_grad=True)

    function(NodeCall("n", op), x).sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [0, 0]


WINDOWS = ("BlackmanWindow", "HammingWindow", "HannWindow")

WITHOUT_A_SLOPE = {
    "whole numbers or truth": (
        *("And", "ArgMax", "ArgMin", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Equal"),
        *(
            "Greater",
            "GreaterOrEqual",
            "IsInf",
            "IsNaN",
            "Less",
            "LessOrEqual",
            "NonZero",
            "Not",
            "Or",
            "Shape",
            "Size",
        ),
        *("Unique", "Xor"),
    ),
    "no float input of their own": ("Constant", "ConstantOfShape", "EyeLike", "OneHot", "Range", "Hardmax", *WINDOWS),
    "random": (
        *("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
        "RandomUniformLike",
    ),
    "straight through, tested in test_torch_quantization": (
        *("ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
        "QuantizeLinear",
    ),
    "tested in test_torch_control": (
        *("If", "Loop", "Scan", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement"),
        *("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
        *("SequenceMap", "SplitToSequence"),
    ),
    "tested in test_torch_recurrent": ("GRU", "LSTM", "RNN"),
    "a type, a place or a name of another one that is tested": (
        *("Cast", "CastLike", "CenterCropPad", "Col2Im", "MaxUnpool", "Scatter", "SimplifiedLayerNormalization"),
        *("TensorScatter", "Upsample"),
    ),
}
"""Why the table has no case of an operator."""


def test_each_operator_has_a_case_or_a_reason():
    tested = {case[0] for case in CASES} | STEPS
    reasons = {name for names in WITHOUT_A_SLOPE.values() for name in names}

    assert sorted(tested | reasons) == operator_names()
    assert not tested & reasons
