"""What a graph does with its inputs, as far as that decides which values make sense."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp.data.specs import Array
from onnxcomp.errors import ModelError

if TYPE_CHECKING:
    import onnx

# Operators whose (first) output holds the values of their first input.
_SAME_SHAPE = frozenset(("Cast", "CastLike", "Clip", "DequantizeLinear", "Identity", "QuantizeLinear"))
_SHAPING = frozenset(("Expand", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"))
_PICKING = frozenset(("Concat", "Gather", "GatherElements", "GatherND"))
_THROUGH = _SAME_SHAPE | _SHAPING | _PICKING
_COMPARE = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"))
_POSITIVE = frozenset(("Log", "Sqrt"))
# Operators that take sizes, positions or counts: input number by operator.
_SIZES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Loop": (0,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (3,),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
    "TopK": (1,),
}
_RECURRENT = frozenset(("GRU", "LSTM", "RNN"))
# Fused transformers' embedding: the table that goes with each index input.
_EMBED_TABLES = {0: 2, 1: 4}
_SMALL = 16  # elements of a constant worth reading
_FEWEST_CLASSES = 3  # of a one-hot; 0 and 1 alone are what masks are compared with


@dataclass
class Role:
    """What the graph does with one input.

    Attributes:
        rows: The size of the smallest table that it indexes, or None.
        compared: It is compared, or subtracted from 1, as masks are.
        added: A float that is added to something as it is, as additive masks are.
        positive: A logarithm or square root is taken of it.
        state: It is the initial state of a recurrent layer.
        lengths: It is the sequence lengths of a recurrent layer.
        sizes: It is a size, a position or a count.
        dims: Sizes that a weight implies for its axes; negative axes count from the end.
    """

    rows: int | None = None
    compared: bool = False
    added: bool = False
    positive: bool = False
    state: bool = False
    lengths: bool = False
    sizes: bool = False
    dims: dict[int, int] = field(default_factory=dict)

    def index(self, rows: int | None, offset: int) -> None:
        """Note a table of `rows` that is indexed with the input plus `offset`."""
        limit = max(1, rows - offset) if rows else 1
        self.rows = limit if self.rows is None else min(self.rows, limit)


@dataclass(frozen=True)
class _Place:
    """A value on its way through the graph.

    Attributes:
        value: Its name.
        same_shape: Whether it still has the input's shape.
        offset: What was added to it.
    """

    value: str
    same_shape: bool = True
    offset: int = 0


class Roles:
    """Follows inputs through a graph. Weights may be stubs: only shapes, types and small constants are looked at."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        if proto.functions:
            proto = _inlined(proto)
        self._users: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        self._makers: dict[str, onnx.NodeProto] = {}
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._shapes: dict[str, tuple[int | None, ...]] = {}
        for graph in _graphs(proto.graph):
            self._read(graph)

    def _read(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._tensors[tensor.name] = tensor
        for value in itertools.chain(graph.value_info, graph.input):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                self._shapes[value.name] = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in dims)
        for node in graph.node:
            for number, name in enumerate(node.input):
                if name:
                    self._users[name].append((node, number))
            for name in node.output:
                self._makers[name] = node
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self._tensors[node.output[0]] = attribute.t

    def of(self, name: str) -> Role:
        """Return what the graph does with the input `name`."""
        role = Role()
        queue, seen = deque([_Place(name)]), {name}
        while queue:
            place = queue.popleft()
            for node, number in self._users[place.value]:
                self._note(role, place, node, number)
                for following in self._next(place, node, number):
                    if following.value not in seen:
                        seen.add(following.value)
                        queue.append(following)
        return role

    def _note(self, role: Role, place: _Place, node: onnx.NodeProto, number: int) -> None:
        """Note what `node` says about the input."""
        kind = node.op_type
        if number in _SIZES.get(kind, ()):
            role.sizes = True
        if number == 1 and kind in ("Gather", "GatherElements"):
            role.index(self._size(node.input[0], _int(node, "axis", 0)), place.offset)
        elif number == 1 and kind == "GatherBlockQuantized":
            role.index(self._size(node.input[0], _int(node, "gather_axis", 0)), place.offset)
        elif number == 1 and kind == "GatherND":
            role.index(min((size or 1 for size in self._shape(node.input[0]) or ()), default=None), place.offset)
        elif kind == "OneHot" and number == 0:
            depth = self.constant(node.input[1])
            role.index(None if depth is None else int(depth.reshape(-1)[0]), place.offset)
        elif kind == "Equal" and (classes := self._classes(node.input[1 - number])):
            role.index(classes, place.offset)  # one-hot, as some exporters write it
        elif kind == "EmbedLayerNormalization" and number in _EMBED_TABLES:
            role.index(self._size(node.input[_EMBED_TABLES[number]], 0), place.offset)
        elif kind == "Embedding" and number == 0:
            role.index(self._size(node.input[1], 0), place.offset)
        elif kind in _RECURRENT and number in (4, 5, 6):
            role.lengths |= number == 4
            role.state |= number > 4
        elif kind in _POSITIVE:
            role.positive = True
        elif kind in _COMPARE or (kind, number) in (("Where", 0), ("EmbedLayerNormalization", 7)):
            role.compared = True
        elif kind == "Sub" and number == 1:
            one = self.constant(node.input[0])
            role.compared |= one is not None and bool((one == 1).all())
        elif kind == "Add":
            role.added |= self.constant(node.input[1 - number]) is None
        if place.same_shape:
            self._note_dims(role, node, number)

    def _note_dims(self, role: Role, node: onnx.NodeProto, number: int) -> None:
        """Note sizes that the weight of a layer implies for a dynamic axis of its input."""
        if node.op_type in _RECURRENT and number in (0, 5, 6) and not _int(node, "layout", 0):
            role.dims.setdefault(1, 1)  # (sequence or directions, batch, features)
        if number != 0 or len(node.input) < 2:
            return
        axis, size = None, None
        if node.op_type == "Conv":
            size = self._size(node.input[1], 1)
            axis, size = 1, size and size * _int(node, "group", 1)
        elif node.op_type == "MatMul":
            axis, size = -1, self._size(node.input[1], -2)
        elif node.op_type == "Gemm" and not _int(node, "transA", 0):
            axis, size = -1, self._size(node.input[1], 1 if _int(node, "transB", 0) else 0)
        elif node.op_type in _RECURRENT:
            axis, size = -1, self._size(node.input[1], 2)
        if axis is not None and size is not None:
            role.dims.setdefault(axis, size)

    def _next(self, place: _Place, node: onnx.NodeProto, number: int) -> Iterator[_Place]:
        """Yield where the input's values go on."""
        kind = node.op_type
        if kind in _THROUGH and (number == 0 or kind == "Concat"):
            outputs = node.output if kind == "Split" else node.output[:1]
            for output in outputs:
                yield _Place(output, place.same_shape and kind in _SAME_SHAPE, place.offset)
        elif kind in ("Add", "Sub") and (number == 0 or kind == "Add"):
            other = self.constant(node.input[1 - number])
            if other is not None and other.size == 1 and other.dtype.kind in "iuf":
                step = float(other.reshape(-1)[0])
                step = int(step) if np.isfinite(step) and abs(step) < 2**31 else 0
                yield _Place(node.output[0], place.same_shape, place.offset + (step if kind == "Add" else -step))
        elif kind in ("Loop", "Scan"):
            for attribute in node.attribute:
                if attribute.name == "body" and number < len(attribute.g.input):
                    yield _Place(attribute.g.input[number].name, False, place.offset)

    def constant(self, name: str) -> Array | None:
        """Return a constant of a few elements, or None if it is larger, not a constant, or a stub."""
        import onnx

        tensor = self._tensors.get(name)
        if tensor is not None and tensor.data_location != onnx.TensorProto.EXTERNAL and np.prod(tensor.dims) <= _SMALL:
            try:
                array: Array = np.asarray(onnx.numpy_helper.to_array(tensor))
            except (ValueError, TypeError):
                return None  # a stub has no values
            return array if array.size and array.dtype.kind in "biuf" else None
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "Constant":
            for attribute in maker.attribute:
                if attribute.name in ("value_int", "value_float", "value_ints", "value_floats"):
                    return np.atleast_1d(np.asarray(onnx.helper.get_attribute_value(attribute)))
        return None

    def _classes(self, name: str) -> int | None:
        """Return n where a tensor holds 0, 1, ... n - 1 along one axis, as far as a stub tells; or None."""
        import onnx

        tensor = self._tensors.get(name)
        count = max(tensor.dims, default=0) if tensor is not None else 0
        if tensor is None or count < _FEWEST_CLASSES or int(np.prod(tensor.dims, dtype=object)) != count:
            return None
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return count
        try:
            values = onnx.numpy_helper.to_array(tensor).reshape(-1)
        except (ValueError, TypeError):
            return count  # a stub has no values; a long row that is compared is hardly anything else
        return count if values.dtype.kind in "iuf" and np.array_equal(values, np.arange(count)) else None

    def _size(self, name: str, axis: int) -> int | None:
        """Return the size of an axis of a tensor, or None if the graph does not say."""
        shape = self._shape(name)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def _shape(self, name: str) -> Sequence[int | None] | None:
        for _ in range(8):  # tables lie behind a few such nodes at most
            if name in self._tensors:
                return list(self._tensors[name].dims)
            maker = self._makers.get(name)
            if name in self._shapes or maker is None:
                return self._shapes.get(name)
            shape = self._shape(maker.input[0]) if maker.op_type == "Transpose" else None
            if shape is not None:
                order = next((list(a.ints) for a in maker.attribute if a.name == "perm"), list(range(len(shape)))[::-1])
                return [shape[axis] for axis in order]
            if maker.op_type not in _SAME_SHAPE:
                return None
            name = maker.input[0]
        return None


def _int(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model's structure with its functions put in place, large weights left out."""
    import onnx
    from onnx import inliner

    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    for name in ("name", "node", "input", "output", "value_info"):
        _copy(proto.graph, light.graph, name)
    light.graph.initializer.extend(_stubs(proto.graph.initializer))
    try:
        return inliner.inline_local_functions(light)
    except Exception as error:  # onnx's C++ code raises what it likes
        message = f"the functions of the model cannot be expanded: {str(error).splitlines()[0]}"
        raise ModelError(message) from error


def _copy(source: onnx.GraphProto, target: onnx.GraphProto, name: str) -> None:
    value = getattr(source, name)
    if isinstance(value, str):
        setattr(target, name, value)
    else:
        getattr(target, name).extend(value)


def _stubs(tensors: Iterable[onnx.TensorProto]) -> Iterator[onnx.TensorProto]:
    import onnx

    for tensor in tensors:
        small = np.prod(tensor.dims) <= _SMALL
        yield tensor if small else onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
