"""The bridge on every model of ONNX's own backend test suite."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks.backend_cases import Case, difference, load_cases
from onnxcomp.errors import ModelError, RequirementError
from onnxcomp.torch_bridge import load
from onnxcomp.torch_bridge.dtypes import as_tensor

HALF_ROUNDINGS = 8
"""Roundings between sums in another order: those of 16-bit floats that a model's own tolerance is not made for."""

RANDOM = "draws random numbers"
ALIGNED = "ONNX's reference divides by a size that is not rounded; ONNX Runtime and torch by the rounded one"
STRINGS = "torch holds no strings"
UNTYPED = "ONNX's inliner asks for the type of an optional input that is not there"

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
EXCEPTIONS |= {
    f"node/test_{name}": UNTYPED
    for name in (
        *(
            f"linear_attention_{name}"
            for name in (
                *(
                    "delta",
                    "explicit_scale",
                    "fp16",
                    "gated",
                    "gated_delta",
                    "gated_delta_beta_scalar",
                    "gated_delta_gqa",
                ),
                *("gated_delta_mqa", "gated_per_head_decay"),
            )
        ),
        *("causal_conv_with_state_silu_with_past_state", "causal_conv_with_state_with_past_state"),
    )
}

MISSING = {
    *("Adagrad", "Adam", "ArrayFeatureExtractor", "Binarizer", "BitCast", "DFT", "DeformConv", "Gradient"),
    *("ImageDecoder", "LabelEncoder", "MelWeightMatrix", "Momentum", "NonMaxSuppression", "RegexFullMatch", "RoiAlign"),
    *("STFT", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "TreeEnsemble"),
}
"""Operators that are not there: on strings, trees and boxes, signal transforms, and training itself."""

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


def operators_of(case: Case) -> set[str]:
    """The operators of a model and of its subgraphs."""
    nodes = list(case.model.graph.node)
    for node in nodes:
        nodes.extend(inner for attribute in node.attribute for inner in attribute.g.node)
    return {node.op_type for node in nodes}


CASES = {name: case for name, case in sorted(load_cases().items()) if case.data[0][1] is not None}
LACKING = [name for name, case in CASES.items() if operators_of(case) & MISSING]
NARROW = [name for name, case in CASES.items() if has_narrow_floats(case)]
RUNNABLE = sorted(CASES.keys() - EXCEPTIONS.keys() - set(LACKING) - set(NARROW))


@pytest.mark.parametrize("name", RUNNABLE)
def test_gives_what_onnx_expects(name):
    assert why_wrong(CASES[name]) == ""


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_no_exception_is_there_without_need(name):
    try:
        reason = why_wrong(CASES[name])
    except (KeyError, RequirementError) as error:
        reason = repr(error)

    assert reason


@pytest.mark.parametrize("name", LACKING)
def test_an_operator_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(RequirementError, match="there is no torch operator for"):
        load(CASES[name].model)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_floats_are_refused(name):
    with pytest.raises((ModelError, RequirementError, KeyError)):
        why_wrong(CASES[name])


def test_nearly_all_models_run():
    assert len(RUNNABLE) >= 1750


def test_a_wrong_operator_is_found(monkeypatch):
    monkeypatch.setattr(torch, "relu", torch.neg)

    assert "largest difference" in why_wrong(CASES["node/test_relu"])
