"""all-MiniLM-L6-v2 as an ONNX graph, made of the weights that its package ships, and the tokens it reads.

The package holds safetensors for torch; the graph is BERT (Devlin et al., 2018, section 3) as torch's exporter writes
it, with mean pooling and normalization behind it, as the model's card says.
"""

from __future__ import annotations

import json
import re
import zipfile
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

LAYERS, HEADS, WIDTH = 6, 12, 384
LENGTH = 64
"""Tokens in a sample, with padding."""


class _Graph:
    """A graph under construction: each method adds a node and returns its output's name."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.weights, self.nodes = weights, list[onnx.NodeProto]()
        self.constants = dict[str, Array]()

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Array) -> str:
        self.constants[name] = value
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def linear(self, x: str, name: str) -> str:
        kernel = self.constant(f"{name}.weight", np.ascontiguousarray(self.weights[f"{name}.weight"].T))
        return self.node("Add", self.weight(f"{name}.bias"), self.node("MatMul", x, kernel))

    def norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-12)

    def heads(self, x: str, name: str, order: list[int]) -> str:
        shape = self.constant("split_heads", np.array([0, 0, HEADS, WIDTH // HEADS]))
        return self.node("Transpose", self.node("Reshape", self.linear(x, name), shape), perm=order)

    def layer(self, x: str, mask: str, name: str) -> str:
        """Attention and the two dense layers behind it."""
        query, value = (self.heads(x, f"{name}.attention.self.{part}", [0, 2, 1, 3]) for part in ("query", "value"))
        key = self.heads(x, f"{name}.attention.self.key", [0, 2, 3, 1])
        root = self.constant("head_root", np.array((WIDTH // HEADS) ** 0.5, np.float32))
        scores = self.node("Add", self.node("Div", self.node("MatMul", query, key), root), mask)
        context = self.node("MatMul", self.node("Softmax", scores, axis=-1), value)
        joined = self.constant("join_heads", np.array([0, 0, WIDTH]))
        context = self.node("Reshape", self.node("Transpose", context, perm=[0, 2, 1, 3]), joined)
        attended = self.node("Add", self.linear(context, f"{name}.attention.output.dense"), x)
        x = self.norm(attended, f"{name}.attention.output.LayerNorm")
        inner = self.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(self.node("Add", self.linear(inner, f"{name}.output.dense"), x), f"{name}.output.LayerNorm")

    def gelu(self, x: str) -> str:
        root, one, half = (
            self.constant(name, np.array(value, np.float32))
            for name, value in (("root_two", 2**0.5), ("one", 1.0), ("half", 0.5))
        )
        gate = self.node("Add", self.node("Erf", self.node("Div", x, root)), one)
        return self.node("Mul", self.node("Mul", x, gate), half)


def read_safetensors(content: bytes) -> dict[str, Array]:
    """The float32 tensors of a safetensors file; others are left out."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, item in header.items():
        if item["dtype"] == "F32":
            begin, end = (start + offset for offset in item["data_offsets"])
            found[name] = np.frombuffer(content[begin:end], "<f4").reshape(item["shape"])
    return found


def build(package: zipfile.ZipFile, member: str) -> bytes:
    """The model as ONNX: input_ids and attention_mask, int64, (batch, sequence), to (batch, 384), float32."""
    graph = _Graph(read_safetensors(package.read(member)))
    words = graph.node("Gather", graph.weight("embeddings.word_embeddings.weight"), "input_ids")
    length = graph.node("Shape", "input_ids", start=1, end=2)
    zero, one = graph.constant("first", np.array([0])), graph.constant("step", np.array([1]))
    places = graph.node("Slice", graph.weight("embeddings.position_embeddings.weight"), zero, length, zero, one)
    kind = graph.constant("kind", graph.weights["embeddings.token_type_embeddings.weight"][0])
    x = graph.norm(graph.node("Add", graph.node("Add", words, kind), places), "embeddings.LayerNorm")
    shown = graph.node("Cast", "attention_mask", to=TensorProto.FLOAT)
    hidden = graph.node("Sub", graph.constant("unit", np.array(1, np.float32)), shown)
    low = graph.node("Mul", hidden, graph.constant("low", np.array(-10000, np.float32)))
    mask = graph.node("Unsqueeze", low, graph.constant("head_axes", np.array([1, 2])))
    for index in range(LAYERS):
        x = graph.layer(x, mask, f"encoder.layer.{index}")
    last = graph.constant("last_axis", np.array([2]))
    total = graph.node("ReduceSum", graph.node("Mul", x, graph.node("Unsqueeze", shown, last)), one, keepdims=0)
    mean = graph.node("Div", total, graph.node("ReduceSum", shown, one, keepdims=1))
    graph.nodes.append(helper.make_node("LpNormalization", [mean], ["sentence_embedding"], axis=1, p=2))
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", WIDTH])
    tensors = [numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    made = helper.make_graph(graph.nodes, "all-MiniLM-L6-v2", ids, [output], tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def sentences() -> list[str]:
    """English prose: the sentences of Python's own documentation, in a fixed order."""
    text = " ".join(topics[name] for name in sorted(topics))
    parts = re.split(r"(?<=[a-z][.!?])\s+(?=[A-Z])", text)
    cleaned = (re.sub(r"[^\w\s.,;:'()-]", "", re.sub(r"\s+", " ", part)) for part in parts)
    return [part for part in cleaned if 40 <= len(part) <= 300]


def word_pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """A word's pieces, the longest first (WordPiece; Wu et al., 2016, section 4.1); one unknown if it has none."""
    found, start = list[int](), 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = vocabulary.get(("##" if start else "") + word[start:end])
            if piece is not None:
                found.append(piece)
                start = end
                break
        else:
            return [vocabulary["[UNK]"]]
    return found


def tokens(texts: list[str], vocabulary: dict[str, int]) -> dict[str, Array]:
    """Input ids and attention mask, int64, (texts, LENGTH), padded with zeros."""
    ids, mask = np.zeros((2, len(texts), LENGTH), np.int64)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        pieces = [piece for word in words for piece in word_pieces(word, vocabulary)][: LENGTH - 2]
        line = [vocabulary["[CLS]"], *pieces, vocabulary["[SEP]"]]
        ids[row, : len(line)], mask[row, : len(line)] = line, 1
    return {"input_ids": ids, "attention_mask": mask}
