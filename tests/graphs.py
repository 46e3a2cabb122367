"""Graphs as a report lists them, for tests of what shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Node = tuple[str, str, Sequence[str], Sequence[str]]
"""Name, operator, names of inputs and of outputs; "" is one that is left out."""


def graph_of(
    nodes: Iterable[Node],
    constants: Mapping[str, str],
    *,
    types: Mapping[str, str] | None = None,
    inputs: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("y",),
    bodies: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A graph in the report's form, out of names. `constants` and `types`: tensor -> type in words."""
    nodes = list(nodes)
    names = [*inputs, *constants, *(name for node in nodes for part in node[2:] for name in part if name)]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    known = {**(types or {}), **constants}
    kinds = {text: number for number, text in enumerate(dict.fromkeys(known.get(name, "") for name in places))}
    return {
        "operators": dict(Counter(op for _, op, _, _ in nodes)),
        "body_operators": dict(bodies or {}),
        "function_operators": {},
        "nodes": [
            {
                "name": name,
                "op": op,
                "inputs": [places[each] if each else None for each in read],
                "outputs": [places[each] if each else None for each in written],
            }
            for name, op, read, written in nodes
        ],
        "tensors": list(places),
        "types": list(kinds),
        "tensor_types": [kinds[known.get(name, "")] for name in places],
        "constants": [places[name] for name in constants],
        "inputs": [places[name] for name in inputs],
        "outputs": [places[name] for name in outputs],
    }


def sample_graphs() -> dict[str, Any]:
    """A convolution with its normalization and activation, and what becomes of them in int8."""
    before = graph_of(
        [
            ("conv1", "Conv", ["x", "conv1.weight", ""], ["conv1_out"]),
            ("bn1", "BatchNormalization", ["conv1_out", "bn1.scale"], ["bn1_out"]),
            ("relu1", "Relu", ["bn1_out"], ["y"]),
        ],
        {"conv1.weight": "float32 (8, 3, 3, 3)", "bn1.scale": "float32 (8,)"},
        types={"x": "float32 (N, 3, 32, 32)", "conv1_out": "float32 (N, 8, 30, 30)"},
    )
    after = graph_of(
        [
            ("q0", "QuantizeLinear", ["x", "scale"], ["x_q"]),
            ("d0", "DequantizeLinear", ["x_q", "scale"], ["x_d"]),
            ("d1", "DequantizeLinear", ["conv1.weight_q", "scales"], ["w_d"]),
            ("conv1", "Conv", ["x_d", "w_d"], ["bn1_out"]),
            ("relu1", "Relu", ["bn1_out"], ["y"]),
        ],
        {"scale": "float32 ()", "conv1.weight_q": "int8 (8, 3, 3, 3)", "scales": "float32 (8,)"},
        types={"x": "float32 (N, 3, 32, 32)", "bn1_out": "float32 (N, 8, 30, 30)"},
    )
    return {"before": before, "after": after}


def large_graphs(layers: int) -> dict[str, Any]:
    """Products of matrices in a row, and the same in int8: twice and five times as many nodes, with long names."""
    names = [f"/encoder/layers.{index // 8}/block.{index % 8}/attention/query/MatMul" for index in range(layers)]

    def chain(*, quantized: bool) -> dict[str, Any]:
        nodes: list[Node] = []
        constants: dict[str, str] = {}
        last = "x"
        for index, name in enumerate(names):
            weight, read = f"onnx::MatMul_{4000 + index}", last
            constants[f"{weight}_quantized" if quantized else weight] = (
                f"{'int8' if quantized else 'float32'} (768, 768)"
            )
            if quantized:
                constants |= {f"{last}_scale": "float32 ()", f"{weight}_scale": "float32 (768,)"}
                nodes += [
                    (f"{last}_QuantizeLinear", "QuantizeLinear", [last, f"{last}_scale"], [f"{last}_q"]),
                    (f"{last}_DequantizeLinear", "DequantizeLinear", [f"{last}_q", f"{last}_scale"], [f"{last}_d"]),
                    (f"{weight}_d", "DequantizeLinear", [f"{weight}_quantized", f"{weight}_scale"], [f"{weight}_d"]),
                ]
                read, weight = f"{last}_d", f"{weight}_d"
            relu = name.replace("MatMul", "Relu")
            nodes += [
                (name, "MatMul", [read, weight], [f"{name}_output_0"]),
                (relu, "Relu", [f"{name}_output_0"], [f"{relu}_output_0"]),
            ]
            last = f"{relu}_output_0"
        types = {name: "float32 (batch, 128, 768)" for node in nodes for name in node[3]}
        return graph_of(nodes, constants, types=types, outputs=[last])

    return {"before": chain(quantized=False), "after": chain(quantized=True)}
