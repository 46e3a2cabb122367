"""Steps that torch has one function for, put together: faster, and the same but for rounding.

Only the plan changes; the graph keeps its nodes, and so do its weights their names. What is inside of a fused group is
not there to be watched, which is why `GraphModule` keeps the plan as it was too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.normalization import layer_norm
from onnxcomp.torch_bridge.operators.quantization import quantize_and_back
from onnxcomp.torch_bridge.plan import Plan, Step, with_frees
from onnxcomp.torch_bridge.registry import NodeCall, Operator

__all__ = ["fuse"]

CONSTANT_ROUNDING = 1e-6
"""How far, relative to it, a constant may be from what a formula has: some float32 roundings (6e-8)."""

ROOT_2 = 2.0**0.5


@dataclass(frozen=True)
class _Found:
    """A group of steps.

    Attributes:
        steps: Their places; the last is where the fused one goes.
        function: What does the same.
        inputs: What it reads.
        call: The node that tells it what to do.
    """

    steps: tuple[int, ...]
    function: Operator
    inputs: tuple[str, ...]
    call: NodeCall


class _View:
    """A plan by who makes and who reads a value."""

    def __init__(self, plan: Plan, fixed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.steps = plan.steps
        self.fixed = fixed
        self.shapes = shapes
        self.maker = {name: index for index, step in enumerate(plan.steps) for name in step.outputs if name}
        self.readers: dict[str, list[int]] = {}
        for index, step in enumerate(plan.steps):
            for name in step.reads:
                self.readers.setdefault(name, []).append(index)
        self.outputs = set(plan.outputs)

    def made_by(self, name: str, *ops: str) -> int | None:
        """The place of the step that makes a value, if it is of one of these operators."""
        index = self.maker.get(name)
        if index is None or self.steps[index].call.op not in ops or self.steps[index].call.domain:
            return None
        return index

    def inner(self, index: int) -> str:
        """The value of a step with one output."""
        return self.steps[index].outputs[0]

    def only_reader(self, name: str, *ops: str) -> int | None:
        """The place of the one step that reads a value, if it is of one of these operators."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.outputs:
            return None
        step = self.steps[readers[0]]
        return readers[0] if step.call.op in ops and not step.call.domain and not step.bodies else None

    def is_number(self, name: str, *values: float) -> bool:
        """Whether a value is a constant that is never trained, and one of these numbers."""
        found = self.number(name)
        return found is not None and any(abs(found - value) <= CONSTANT_ROUNDING * abs(value) for value in values)

    def number(self, name: str) -> float | None:
        """The constant of one element of that name, in full precision."""
        tensor = self.fixed.get(name)
        full = tensor is not None and tensor.dtype in {torch.float32, torch.float64} and tensor.numel() == 1
        return float(tensor) if tensor is not None and full else None

    def other(self, index: int, name: str) -> str:
        """The input of a step of two inputs that is not this one; empty where there is none."""
        inputs = self.steps[index].inputs
        if len(inputs) != 2 or name not in inputs:
            return ""
        return inputs[1] if inputs[0] == name else inputs[0]


def fuse(plan: Plan, fixed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Put together what torch has one function for.

    Args:
        plan: The plan of a main graph; it is not changed.
        fixed: The constants that are never trained.
        shapes: Those of all constants and weights.
    """
    view = _View(plan, fixed, shapes)
    steps: list[Step | None] = list(plan.steps)
    gone: set[int] = set()
    for match in MATCHES:
        for found in match(view):
            if gone.isdisjoint(found.steps):
                gone.update(found.steps)
                for index in found.steps:
                    steps[index] = None
                last = plan.steps[found.steps[-1]]
                call = replace(found.call, name=last.call.name, op=found.function.__name__)
                steps[found.steps[-1]] = Step(found.function, call, found.inputs, last.outputs)
    return replace(plan, steps=with_frees([step for step in steps if step is not None], plan.outputs))


# --- a product and what is added to it --------------------------------------------------------------------------------


def linear(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product x weight, plus a bias."""
    return F.linear(x, weight.T, bias) if weight.ndim == 2 else torch.matmul(x, weight) + bias


def _linears(view: _View) -> Iterator[_Found]:
    for index, step in enumerate(view.steps):
        if step.call.op != "MatMul" or step.call.domain:
            continue
        after = view.only_reader(view.inner(index), "Add")
        if after is None:
            continue
        x, weight = step.inputs
        bias = view.other(after, view.inner(index))
        columns = view.shapes.get(weight, ())[1:]
        if len(columns) == 1 and view.shapes.get(bias) == columns:
            yield _Found((index, after), linear, (x, weight, bias), step.call)


# --- x (1 + erf(x / sqrt 2)) / 2 --------------------------------------------------------------------------------------


def gelu(call: NodeCall, x: Tensor) -> Tensor:
    """The exact Gelu."""
    return F.gelu(x)


def _gelus(view: _View) -> Iterator[_Found]:
    for index, step in enumerate(view.steps):
        if step.call.op != "Erf":
            continue
        scaled = view.made_by(step.inputs[0], "Div", "Mul")
        one = view.only_reader(view.inner(index), "Add")
        if scaled is None or one is None or not view.is_number(view.other(one, view.inner(index)), 1):
            continue
        if view.only_reader(view.inner(scaled), "Erf") is None:
            continue
        x = _scaled_by_root(view, scaled)
        rest = _half_of_product(view, one, x) if x else None
        if rest is not None:
            yield _Found((scaled, index, one, *rest), gelu, (x,), step.call)


def _scaled_by_root(view: _View, index: int) -> str:
    """What a step divides by the root of 2; empty where it does something else."""
    first, second = view.steps[index].inputs
    if view.steps[index].call.op == "Div":
        return first if view.is_number(second, ROOT_2) else ""
    if view.is_number(second, 1 / ROOT_2):
        return first
    return second if view.is_number(first, 1 / ROOT_2) else ""


def _half_of_product(view: _View, index: int, x: str) -> tuple[int, ...] | None:
    """The steps that multiply a value by x and by a half, in any order; the last one last."""
    value = view.inner(index)
    first = view.only_reader(value, "Mul")
    if first is None:
        return None
    factor = view.other(first, value)
    half = view.made_by(factor, "Mul")
    if half is not None and view.is_number(view.other(half, x), 0.5) and view.only_reader(factor, "Mul") == first:
        return (half, first)
    second = view.only_reader(view.inner(first), "Mul")
    if second is None:
        return None
    factors = (factor, view.other(second, view.inner(first)))
    if any(each == x and view.is_number(other, 0.5) for each, other in (factors, factors[::-1])):
        return (first, second)
    return None


# --- (x - mean) / sqrt(variance + epsilon) * scale + bias -------------------------------------------------------------


def normalize(call: NodeCall, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Layer normalization along the last axis."""
    return layer_norm(x, x.ndim - 1, scale, bias, call.attrs["epsilon"])


def _layer_norms(view: _View) -> Iterator[_Found]:
    for index, step in enumerate(view.steps):
        if step.call.op != "Div" or step.call.domain:
            continue
        found = _normalization(view, index)
        if found is not None:
            yield found


def _normalization(view: _View, quotient: int) -> _Found | None:
    centred_name, root_name = view.steps[quotient].inputs
    centred, root = view.made_by(centred_name, "Sub"), view.made_by(root_name, "Sqrt")
    if centred is None or root is None:
        return None
    x, mean_name = view.steps[centred].inputs
    mean, more = view.made_by(mean_name, "ReduceMean"), view.made_by(view.steps[root].inputs[0], "Add")
    if mean is None or more is None or view.steps[mean].inputs[0] != x:
        return None
    variance = next(
        (v for name in view.steps[more].inputs if (v := view.made_by(name, "ReduceMean")) is not None), None
    )
    if variance is None:
        return None
    epsilon = view.number(view.other(more, view.inner(variance)))
    square = view.made_by(view.steps[variance].inputs[0], "Pow", "Mul")
    if epsilon is None or square is None or not _is_square(view, square, centred_name):
        return None
    if not all(_along_last(view, each) for each in (mean, variance)):
        return None
    scaled = view.only_reader(view.inner(quotient), "Mul")
    shifted = None if scaled is None else view.only_reader(view.inner(scaled), "Add")
    inside = (mean, centred, square, variance, more, root, quotient)
    if scaled is None or shifted is None or not _closed(view, (*inside, scaled, shifted)):
        return None
    scale, bias = view.other(scaled, view.inner(quotient)), view.other(shifted, view.inner(scaled))
    shape = view.shapes.get(scale, ())
    if len(shape) != 1 or view.shapes.get(bias) != shape:
        return None
    call = replace(view.steps[quotient].call, attrs={"epsilon": epsilon})
    return _Found((*inside, scaled, shifted), normalize, (x, scale, bias), call)


def _is_square(view: _View, index: int, name: str) -> bool:
    step = view.steps[index]
    if step.call.op == "Mul":
        return step.inputs == (name, name)
    return step.inputs[0] == name and view.is_number(step.inputs[1], 2)


def _along_last(view: _View, index: int) -> bool:
    step = view.steps[index]
    given = view.fixed.get(step.inputs[1]) if len(step.inputs) > 1 else step.call.get("axes")
    axes = given.reshape(-1).tolist() if isinstance(given, Tensor) else given
    return axes is not None and list(axes) == [-1] and bool(step.call.get("keepdims", 1))


def _closed(view: _View, group: tuple[int, ...]) -> bool:
    """Whether nothing outside of a group reads what it makes, but for its last value."""
    names = [view.inner(index) for index in group[:-1]]
    return all(name not in view.outputs and set(view.readers.get(name, [])) <= set(group) for name in names)


# --- softmax(q k * scale + mask) v ------------------------------------------------------------------------------------


def attend(call: NodeCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q to k, whose last two axes are turned already, and v."""
    scale = call.attrs["scale"]
    fits = q.ndim == k.ndim == v.ndim == HEADS_RANK and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if fits and (mask is None or (mask.ndim in MASK_RANKS and mask.dtype == q.dtype and not mask.requires_grad)):
        return F.scaled_dot_product_attention(q, k.mT, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q, k) * scale
    weights = torch.softmax(scores if mask is None else scores + mask, call.attrs["axis"])
    return torch.matmul(torch.where(weights.isnan(), 0, weights) if call.attrs["safe"] else weights, v)


HEADS_RANK = 4
"""Examples, heads, places, numbers."""

MASK_RANKS = {2, HEADS_RANK}
"""Of masks that torch takes."""

LAST_AXES = {-1, HEADS_RANK - 1}
ONE_AXIS = 13
"""Since this opset Softmax works along one axis, by default the last."""


def _attentions(view: _View) -> Iterator[_Found]:
    for index, step in enumerate(view.steps):
        if step.call.op != "Softmax" or step.call.domain or step.call.opset < ONE_AXIS:
            continue
        axis = step.call.get("axis", -1)
        found = _attention(view, index, axis) if axis in LAST_AXES else None
        if found is not None:
            yield found


def _attention(view: _View, softmax: int, axis: int) -> _Found | None:
    scores, mask = view.steps[softmax].inputs[0], ""
    before: list[int] = []
    added = view.made_by(scores, "Add")
    if added is not None:
        first, second = view.steps[added].inputs
        # The scores are what a product of matrices made; the mask is the other one.
        turned = _scaled_product(view, first) is None
        scores, mask = (second, first) if turned else (first, second)
        before.append(added)
    product = _scaled_product(view, scores)
    if product is None:
        return None
    scaled, scale, matmul = product
    before += scaled
    checks = _checks(view, softmax)
    weights = view.inner(checks[-1] if checks else softmax)
    last = view.only_reader(weights, "MatMul")
    if last is None or view.steps[last].inputs[0] != weights:
        return None
    group = (matmul, *reversed(before), softmax, *checks, last)
    if not _closed(view, group):
        return None
    call = replace(view.steps[softmax].call, attrs={"scale": scale, "axis": axis, "safe": bool(checks)})
    inputs = (*view.steps[matmul].inputs, view.steps[last].inputs[1], *([mask] if mask else []))
    return _Found(group, attend, inputs, call)


def _scaled_product(view: _View, name: str) -> tuple[list[int], float, int] | None:
    """The steps that scale a product of matrices by a constant, that constant, and the product; None for others."""
    matmul = view.made_by(name, "MatMul")
    if matmul is not None:
        return [], 1.0, matmul
    scaled = view.made_by(name, "Mul", "Div")
    if scaled is None:
        return None
    first, second = view.steps[scaled].inputs
    divides = view.steps[scaled].call.op == "Div"
    if view.made_by(first, "MatMul") is None and not divides:
        first, second = second, first
    matmul, factor = view.made_by(first, "MatMul"), view.number(second)
    if matmul is None or not factor:
        return None
    return [scaled], 1 / factor if divides else factor, matmul


def _checks(view: _View, softmax: int) -> tuple[int, ...]:
    """The steps that put 0 where a softmax of nothing is no number, as torch exports it."""
    name = view.inner(softmax)
    readers = view.readers.get(name, [])
    if [view.steps[each].call.op for each in readers] != ["IsNaN", "Where"]:
        return ()
    test, choice = readers
    condition, zero, otherwise = view.steps[choice].inputs
    same = condition == view.inner(test) and otherwise == name and view.number(zero) == 0
    return (test, choice) if same else ()


# --- a QuantizeLinear and its DequantizeLinear ------------------------------------------------------------------------


def _quantized(view: _View) -> Iterator[_Found]:
    for index, step in enumerate(view.steps):
        if step.call.op != "QuantizeLinear" or step.call.domain:
            continue
        after = view.only_reader(view.inner(index), "DequantizeLinear")
        if after is None or view.steps[after].inputs[1:] != step.inputs[1:]:
            continue
        call = view.steps[after].call
        same = all(step.call.get(key, default) == call.get(key, default) for key, default in QUANTIZED_ALONG.items())
        if same and not call.get("output_dtype"):
            yield _Found((index, after), quantize_and_back, step.inputs, step.call)


QUANTIZED_ALONG = {"axis": 1, "block_size": 0}


MATCHES: tuple[Callable[[_View], Iterator[_Found]], ...] = (_attentions, _layer_norms, _gelus, _linears, _quantized)
"""In this order: what is larger comes first."""
