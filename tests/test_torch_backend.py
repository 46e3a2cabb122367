"""The bridge on every model of ONNX's own backend test suite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks.backend_models import Case, difference, load_cases
from onnxcomp.errors import ModelError
from onnxcomp.torch_bridge import load
from onnxcomp.torch_bridge.dtypes import as_tensor
from onnxcomp.torch_bridge.registry import find_operator

HALF_ROUNDINGS = 8
"""Roundings between sums in another order: those of 16-bit floats that a model's own tolerance is not made for."""

RANDOM = "draws random numbers"
ALIGNED = "ONNX's reference divides by a size that is not rounded; ONNX Runtime and torch by the rounded one"
STRINGS = "torch holds no strings"

EXCEPTIONS = {
    "node/test_bernoulli": RANDOM,
    "node/test_bernoulli_double": RANDOM,
    "node/test_bernoulli_double_expanded": RANDOM,
    "node/test_bernoulli_expanded": RANDOM,
    "node/test_bernoulli_seed": RANDOM,
    "node/test_bernoulli_seed_expanded": RANDOM,
    "node/test_equal_string": STRINGS,
    "node/test_equal_string_broadcast": STRINGS,
    "node/test_resize_downsample_scales_cubic_align_corners": ALIGNED,
    "node/test_resize_downsample_scales_linear_align_corners": ALIGNED,
    "node/test_training_dropout": RANDOM,
    "node/test_training_dropout_default": RANDOM,
    "node/test_training_dropout_default_mask": RANDOM,
    "node/test_training_dropout_mask": RANDOM,
}
"""What cannot come out as expected, and why; models with floats of 8 and 4 bits besides."""

NARROW_FLOATS = {
    value for name, value in onnx.TensorProto.DataType.items() if name.startswith(("FLOAT8", "FLOAT4", "FLOAT6"))
}


def has_narrow_floats(case: Case) -> bool:
    """Whether a model takes, gives, holds or casts to 8-bit or 4-bit floats."""
    graph = case.model.graph
    kinds = {info.type.tensor_type.elem_type for info in (*graph.input, *graph.output, *graph.value_info)}
    kinds |= {attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "to"}
    return bool(kinds & NARROW_FLOATS)


def as_given(value: Any) -> Any:
    if isinstance(value, list):
        return [as_given(each) for each in value]
    return None if value is None else as_tensor(np.asarray(value))


def as_numpy(value: Any, like: Any) -> Any:
    """What came out, in the type that is expected where torch holds it in the next larger one."""
    if isinstance(value, list):
        return [as_numpy(each, wanted) for each, wanted in zip(value, like, strict=False)]
    if value is None:
        return None
    if value.dtype == torch.bfloat16:
        value = value.float()
    array, wanted = value.detach().numpy(), np.asarray(like).dtype
    packed = wanted.itemsize == 1 and wanted.name in {"int2", "uint2", "int4", "uint4"}
    return array.astype(wanted) if packed or wanted.name == "bfloat16" else array


def why_wrong(case: Case) -> str:
    """What is wrong about the bridge's results, or an empty string."""
    module = load(case.model)
    names = [name for name in module.input_names if name not in module.defaults]
    for inputs, expected in case.data:
        assert expected is not None
        feed = {name: as_given(value) for name, value in zip(names, inputs, strict=False)}
        with torch.no_grad():
            got = list(module.run(feed).values())
        reason = difference(
            expected, [as_numpy(*pair) for pair in zip(got, expected, strict=True)], eased(case, expected)
        )
        if reason:
            return reason
    return ""


def eased(case: Case, expected: list[Any]) -> Case:
    """The case with a tolerance that is not below some roundings of its 16-bit outputs."""
    names = {np.asarray(each).dtype.name for each in expected if not isinstance(each, list)}
    steps = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
    step = max((HALF_ROUNDINGS * size for name, size in steps.items() if name in names), default=0.0)
    return Case(case.name, case.model, case.data, max(case.rtol, step), max(case.atol, step / HALF_ROUNDINGS))


def has_all_operators(case: Case) -> bool:
    """Whether all operators of a model are there; one that it defines itself is none."""
    own = {(function.domain, function.name) for function in case.model.functions}
    nodes = [*all_nodes(case.model.graph.node), *(n for each in case.model.functions for n in all_nodes(each.node))]
    return all((n.domain, n.op_type) in own or find_operator(n.domain, n.op_type) is not None for n in nodes)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)


CASES = {
    name: case for name, case in sorted(load_cases().items()) if case.data[0][1] is not None and has_all_operators(case)
}
RUNNABLE = [name for name, case in CASES.items() if name not in EXCEPTIONS and not has_narrow_floats(case)]


@pytest.mark.parametrize("name", RUNNABLE)
def test_gives_what_onnx_expects(name):
    assert why_wrong(CASES[name]) == ""


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_no_exception_is_there_without_need(name):
    try:
        reason = why_wrong(CASES[name])
    except KeyError:
        reason = STRINGS

    assert reason


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if has_narrow_floats(case)])
def test_narrow_floats_are_refused_by_name(name):
    case = CASES[name]
    with pytest.raises((ModelError, KeyError)):
        why_wrong(case)


def test_nearly_all_models_run():
    assert len(RUNNABLE) > 0.9 * len(CASES)


def test_a_wrong_operator_is_found(monkeypatch):
    monkeypatch.setattr(torch, "relu", torch.neg)

    assert "largest difference" in why_wrong(CASES["node/test_relu"])
