"""Arithmetic and functions of one element, comparison, logic and bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES
from onnxcomp.torch_bridge.operators.common import UNSIGNED, in_order, is_quantized, type_of, wide
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

BROADCASTING = 7
"""Since this opset inputs are broadcast as numpy does; before, two attributes said how."""

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Det": torch.linalg.det,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}

WHOLE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "BitwiseNot": torch.bitwise_not,
    "Neg": torch.neg,
    "Sign": torch.sign,
}
"""Of integers too."""


def _of_one(function: Callable[[Tensor], Tensor]) -> Callable[[NodeCall, Tensor], Tensor]:
    return lambda call, x: function(x)


def _of_one_wide(function: Callable[[Tensor], Tensor]) -> Callable[[NodeCall, Tensor], Tensor]:
    return lambda call, x: wide(function, x)


for _name, _function in FUNCTIONS.items():
    operator(_name)(_of_one(_function))
for _name, _function in WHOLE_FUNCTIONS.items():
    operator(_name)(_of_one_wide(_function))


@operator("Identity")
def _identity(call: NodeCall, x: Any) -> Any:
    return x


@operator("Constant")
def _constant(call: NodeCall) -> Tensor:
    if "value" in call.attrs:
        return call.attrs["value"]
    for name, dtype in (("float", torch.float32), ("int", torch.int64)):
        for key in (f"value_{name}", f"value_{name}s"):
            if key in call.attrs:
                return torch.tensor(call.attrs[key], dtype=dtype)
    message = "only tensors and numbers can be constants here"
    raise NotImplementedError(message)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _aligned(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    """The second input, brought in line with the first as opsets before `BROADCASTING` have it."""
    if call.opset >= BROADCASTING or not call.get("broadcast") or "axis" not in call.attrs:
        return b
    axis = call.attrs["axis"] % a.ndim
    return b.reshape(*b.shape, *(1 for _ in range(a.ndim - axis - b.ndim)))


@operator("Add")
def _add(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    if call.opset < BROADCASTING:
        b = _aligned(call, a, b)
    return a + b if a.dtype not in UNSIGNED else wide(torch.add, a, b)


@operator("Sub")
def _sub(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    if call.opset < BROADCASTING:
        b = _aligned(call, a, b)
    return a - b if a.dtype not in UNSIGNED else wide(torch.sub, a, b)


@operator("Mul")
def _mul(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    if call.opset < BROADCASTING:
        b = _aligned(call, a, b)
    return a * b if a.dtype not in UNSIGNED else wide(torch.mul, a, b)


@operator("Div")
def _div(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    if call.opset < BROADCASTING:
        b = _aligned(call, a, b)
    return a / b if a.is_floating_point() else wide(_whole_quotient, a, b)


def _whole_quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def _mod(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.fmod if call.get("fmod", 0) else torch.remainder, a, b)


@operator("Pow")
def _pow(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    b = _aligned(call, a, b)
    if a.is_floating_point() and b.numel() == 1 and b.ndim <= a.ndim and not b.requires_grad:
        return torch.pow(a, b.item())  # torch has shorter ways for whole exponents
    if a.is_floating_point() or not b.is_floating_point():
        return wide(torch.pow, a, b).to(a.dtype)
    return torch.pow(a.double(), b).to(a.dtype)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda call, *inputs: inputs[0] if len(inputs) == 1 else wide(lambda *each: reduce(function, each), *inputs)


operator("Max")(_fold(torch.maximum))
operator("Min")(_fold(torch.minimum))
operator("Sum")(_fold(torch.add))


@operator("Mean")
def _mean(call: NodeCall, *inputs: Tensor) -> Tensor:
    return reduce(torch.add, inputs) / len(inputs)


# --- comparison and logic ---------------------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}
COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[NodeCall, Tensor, Tensor], Tensor]:
    return lambda call, a, b: wide(function, a, _aligned(call, a, b))


def _compared(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[NodeCall, Tensor, Tensor], Tensor]:
    return lambda call, a, b: function(in_order(a), in_order(_aligned(call, a, b)))


for _name, _pair in PAIRS.items():
    operator(_name)(_of_two(_pair))
for _name, _pair in COMPARISONS.items():
    operator(_name)(_compared(_pair))


@operator("IsInf")
def _is_inf(call: NodeCall, x: Tensor) -> Tensor:
    above, below = call.get("detect_positive", 1), call.get("detect_negative", 1)
    if above and below:
        return torch.isinf(x)
    if above:
        return torch.isposinf(x)
    return torch.isneginf(x) if below else torch.zeros_like(x, dtype=torch.bool)


@operator("BitShift")
def _bit_shift(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    to_left = call.get("direction") in {"LEFT", b"LEFT"}
    if a.dtype == torch.uint64 and not to_left:
        # The first step by hand, so that the sign bit of int64 is shifted out as any other.
        a, b = a.view(torch.int64), b.to(torch.int64)
        halved = (a >> 1) & torch.iinfo(torch.int64).max
        return torch.where(b > 0, halved >> (b - 1).clamp(min=0), a).view(torch.uint64)
    return wide(torch.bitwise_left_shift if to_left else torch.bitwise_right_shift, a, b)


# --- types ------------------------------------------------------------------------------------------------------------


def _cast(call: NodeCall, x: Tensor, dtype: torch.dtype, kind: int) -> Tensor:
    if is_quantized(call, x) and not dtype.is_floating_point and dtype != torch.bool:
        return x  # stays what it is: floats that hold whole numbers
    if kind in NARROW:
        low, high = INTEGER_RANGES[kind]
        return ((x.to(torch.int64) - low) & (high - low)).add(low).to(dtype)
    if x.is_floating_point() and dtype in UNSIGNED:
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


@operator("Cast")
def _cast_to(call: NodeCall, x: Tensor) -> Tensor:
    return _cast(call, x, type_of(call, "to"), call.attrs["to"])


@operator("CastLike")
def _cast_like(call: NodeCall, x: Tensor, like: Tensor) -> Tensor:
    return _cast(call, x, like.dtype, call.input_types[1] if len(call.input_types) > 1 else 0)


NARROW = {getattr(TensorProto, name, -1) for name in ("INT4", "UINT4", "INT2", "UINT2")} - {-1}
"""Held in 8 bits here, of which a Cast leaves only the lowest."""


@operator("Dropout")
def _dropout(call: NodeCall, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    """The input itself, unless the node itself says that it is in training."""
    if training is None or not bool(training):
        return (x, torch.ones_like(x, dtype=torch.bool)) if len(call.wanted) > 1 else x
    share = 0.5 if ratio is None else float(ratio)
    kept = torch.rand_like(x) >= share
    return x * kept / (1 - share) if share < 1 else torch.zeros_like(x), kept
