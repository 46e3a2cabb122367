"""Convolutions, poolings, pads and slices of the bridge: combinations of their options against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.torch_bridge import load

Array = np.ndarray[Any, Any]

ROUNDING = 1e-4
"""Of sums of up to a hundred products of normal numbers."""


def both(op: str, inputs: list[Array | None], opset: int, outputs: int = 1, **attrs: Any) -> tuple[Any, Any]:
    """What ONNX Runtime and the bridge give; assumes that the former runs it at all."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(inputs)]
    held = {name: value for name, value in zip(names[1:], inputs[1:], strict=True) if value is not None}
    first = inputs[0]
    assert first is not None
    results = [f"y{index}" for index in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **attrs)],
        "g",
        [helper.make_tensor_value_info("x0", helper.np_dtype_to_tensor_dtype(first.dtype), first.shape)],
        [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in zip(results, (TensorProto.FLOAT, TensorProto.INT64), strict=False)
        ],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        expected = session.run(None, {"x0": first})
    except Exception as error:  # noqa: BLE001 - whatever ONNX Runtime raises, it does not run these options
        assume(not str(error))
    with torch.no_grad():
        got = load(model).run({"x0": torch.from_numpy(first)})
    return expected, [value.numpy() for value in got.values()]


def check(op: str, inputs: list[Array | None], opset: int = 17, outputs: int = 1, **attrs: Any) -> None:
    expected, got = both(op, inputs, opset, outputs, **attrs)
    for wanted, value in zip(expected, got, strict=True):
        np.testing.assert_allclose(value, wanted, atol=ROUNDING, rtol=ROUNDING)


def normal(shape: tuple[int, ...], number: int) -> Array:
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


@st.composite
def windows(
    draw: st.DrawFn, *, transposed: bool = False, pooling: bool = False
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Attributes, and the spatial sizes of the input."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel, strides = each(1, 3), each(1, 3)
    attrs: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if not (pooling and auto.startswith("SAME")):
        attrs["dilations"] = each(1, 2)
    if auto != "NOTSET":
        attrs["auto_pad"] = auto
    else:
        attrs["pads"] = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    if transposed and auto == "NOTSET":
        attrs["output_padding"] = [draw(st.integers(0, stride - 1)) for stride in strides]
    return attrs, tuple(each(5, 8))


@seed(1)
@given(case=windows(), group=st.sampled_from([1, 2]), bias=st.booleans(), number=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_conv_gives_what_onnxruntime_gives(case, group, bias, number):
    attrs, sizes = case
    weight = normal((4, 4 // group, *attrs["kernel_shape"]), number)
    check("Conv", [normal((2, 4, *sizes), number), weight, normal((4,), 1) if bias else None], group=group, **attrs)


@seed(2)
@given(case=windows(transposed=True), group=st.sampled_from([1, 2]), bias=st.booleans(), number=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_conv_transpose_gives_what_onnxruntime_gives(case, group, bias, number):
    attrs, sizes = case
    weight = normal((4, 3, *attrs["kernel_shape"]), number)
    inputs = [normal((2, 4, *sizes), number), weight, normal((3 * group,), 1) if bias else None]
    check("ConvTranspose", inputs, group=group, **attrs)


@seed(3)
@given(case=windows(pooling=True), ceil=st.integers(0, 1), number=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_max_pool_gives_what_onnxruntime_gives(case, ceil, number):
    attrs, sizes = case
    check("MaxPool", [normal((2, 3, *sizes), number)], 17, 2, ceil_mode=ceil, **attrs)


@seed(4)
@given(case=windows(pooling=True), ceil=st.integers(0, 1), inside=st.integers(0, 1), number=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_average_pool_gives_what_onnxruntime_gives(case, ceil, inside, number):
    attrs, sizes = case
    check("AveragePool", [normal((2, 3, *sizes), number)], 19, ceil_mode=ceil, count_include_pad=inside, **attrs)


@pytest.mark.parametrize("op", ["AveragePool", "Conv", "ConvTranspose"])
@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [6, 7, 8])
def test_windows_shorter_than_their_steps_lie_where_onnxruntime_has_them(op, auto, size):
    inputs: list[Array | None] = [normal((1, 2, size), 0), *([normal((2, 2, 1), 1)] if "Conv" in op else [])]
    check(op, inputs, 19, auto_pad=auto, kernel_shape=[1], strides=[3])


@seed(5)
@given(
    mode=st.sampled_from(["constant", "edge", "reflect", "wrap"]),
    pads=st.lists(st.integers(-1, 3), min_size=4, max_size=4),
    number=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_pad_gives_what_onnxruntime_gives(mode, pads, number):
    assume(mode == "constant" or min(pads) >= 0)
    check("Pad", [normal((4, 5), number), np.array(pads), np.array(1.5, np.float32)], 19, mode=mode)


@seed(6)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_slice_gives_what_onnxruntime_gives(data):
    axes = data.draw(st.sampled_from([[0], [1], [-1], [0, 1], [1, -3]]))
    count = len(axes)
    places = st.integers(-9, 9) | st.sampled_from([2**31 - 1, -(2**31)])
    starts, ends = (data.draw(st.lists(places, min_size=count, max_size=count)) for _ in range(2))
    steps = data.draw(st.lists(st.sampled_from([-3, -2, -1, 1, 2, 3]), min_size=count, max_size=count))
    check("Slice", [normal((4, 5, 6), 0), *map(np.array, (starts, ends, axes, steps))])


@pytest.mark.parametrize("kind", ["L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"])
@pytest.mark.parametrize("axes", [None, [0], [-1, 0], [1, 2]])
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions_give_what_onnxruntime_gives(kind, axes, keep):
    x = np.abs(normal((2, 3, 4), 0))
    check(f"Reduce{kind}", [x, None if axes is None else np.array(axes)], 18, keepdims=keep)
    if kind != "Sum":
        check(f"Reduce{kind}", [x], 12, keepdims=keep, **({} if axes is None else {"axes": axes}))
