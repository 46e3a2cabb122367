"""What a model wants to be fed: names, types and shapes of its inputs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError, OptionError

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Dim = int | str | None


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Its name in the graph.
        dtype: Its numpy type; `object` for strings.
        shape: One entry an axis: a size, the name of a dynamic axis, or None for a nameless dynamic axis.
        kind: "tensor"; "unranked" for a tensor whose number of axes the model does not say; "sequence", "map",
            "optional" or "sparse_tensor" for what cannot be fed.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]
    kind: str = "tensor"

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)


def describe(dtype: np.dtype[Any], shape: Sequence[Dim]) -> str:
    """Return a type and shape for a message, such as ``float32 (N, 3, 224, 224)``."""
    words = [("N" if axis == 0 else "?") if size is None else str(size) for axis, size in enumerate(shape)]
    name = "string" if dtype.kind in "OUS" else dtype.name
    return f"{name} ({', '.join(words)}{',' if len(words) == 1 else ''})"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` if a known name is close, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def input_specs(proto: onnx.ModelProto) -> list[InputSpec]:
    """Return what a model wants to be fed: its graph inputs that are not initializers.

    Inputs that are not tensors are listed too, with their `kind`: only feeding them is an error.
    """
    initializers = {tensor.name for tensor in proto.graph.initializer}
    initializers.update(tensor.values.name for tensor in proto.graph.sparse_initializer)
    return [_spec(value) for value in proto.graph.input if value.name not in initializers]


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    import onnx

    kind = (value.type.WhichOneof("value") or "unknown_type").removesuffix("_type")
    if kind != "tensor":
        return InputSpec(value.name, np.dtype(object), (), kind)
    tensor = value.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        message = f"input {value.name!r} of the model has an unknown element type ({tensor.elem_type})"
        raise ModelError(message) from None
    if not tensor.HasField("shape"):
        return InputSpec(value.name, dtype, (), "unranked")
    return InputSpec(value.name, dtype, tuple(_dim(dim) for dim in tensor.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    # Exporters write a dynamic axis as a name, as nothing or "?", and (older ones) as 0 or -1.
    if dim.WhichOneof("value") == "dim_value":
        return dim.dim_value if dim.dim_value > 0 else None
    return dim.dim_param if dim.dim_param.strip("?") else None


def feedable(specs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """Return the specs, or raise ModelError for an input that arrays cannot feed."""
    for spec in specs:
        if spec.kind == "unranked":
            message = (
                f"input {spec.name!r} of the model does not say how many axes it has; "
                f"give its shape: --shape {spec.name}=SIZE,SIZE,..."
            )
            raise ModelError(message)
        if spec.kind != "tensor":
            message = (
                f"input {spec.name!r} of the model is a {spec.kind}, not a tensor: it cannot be fed; "
                "export the model with tensors as inputs"
            )
            raise ModelError(message)
        if spec.dtype.kind == "V":  # bfloat16, float8, int4, ...
            message = (
                f"input {spec.name!r} of the model is {spec.dtype.name}, which ONNX Runtime does not take from numpy; "
                "let the model take float32 and begin with a Cast"
            )
            raise ModelError(message)
    return tuple(specs)


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Parse shapes as the command line takes them.

    >>> parse_shapes(["image=1,3,224,224", "sr="])
    {'image': (1, 3, 224, 224), 'sr': ()}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        match = re.fullmatch(r"(.+)=\s*((?:\d{1,9}\s*,\s*)*\d{1,9})?\s*", text)
        if not match:
            message = f"{text!r} is not a shape; expected NAME=SIZE,SIZE,..., such as input=1,3,224,224"
            raise OptionError(message)
        name = match[1].strip()
        sizes = tuple(int(size) for size in (match[2] or "").split(",") if size)
        if name in shapes:
            message = f"the shape of input {name!r} is given twice; give it once"
            raise OptionError(message)
        if 0 in sizes:
            message = f"{text!r} has a size of 0; every size must be at least 1"
            raise OptionError(message)
        shapes[name] = sizes
    return shapes


def apply_shapes(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]] | None) -> list[InputSpec]:
    """Return the specs with dynamic axes fixed, in every input that shares the name of the axis.

    Args:
        specs: The inputs of a model.
        shapes: Sizes of all axes, by input name. They may repeat what is static, never contradict it.
    """
    if not shapes:
        return list(specs)
    known = {spec.name: spec for spec in specs}
    sizes: dict[str, tuple[int, str]] = {}
    fixed: dict[str, InputSpec] = {}
    for name, shape in shapes.items():
        if name not in known:
            message = (
                f"the model has no input {name!r} to give a shape to{suggestion(name, known)}; it has {names(specs)}"
            )
            raise OptionError(message)
        fixed[name] = _fixed(known[name], tuple(shape))
        for dim, size in zip(known[name].shape, shape, strict=False):
            if not isinstance(dim, str):
                continue
            before, owner = sizes.setdefault(dim, (size, name))
            if before != size:
                message = (
                    f"axis {dim!r} is {before} in the shape of {owner!r} and {size} in that of {name!r}; "
                    "they must be equal"
                )
                raise OptionError(message)
    return [fixed.get(spec.name) or _bound(spec, sizes) for spec in specs]


def _bound(spec: InputSpec, sizes: Mapping[str, tuple[int, str]]) -> InputSpec:
    shape = tuple(sizes[dim][0] if isinstance(dim, str) and dim in sizes else dim for dim in spec.shape)
    return replace(spec, shape=shape)


def _fixed(spec: InputSpec, shape: tuple[int, ...]) -> InputSpec:
    given = ",".join(map(str, shape))
    if not all(isinstance(size, int | np.integer) and size >= 1 for size in shape):
        message = f"shape {given} of input {spec.name!r} is not valid; every size must be a whole number of at least 1"
        raise OptionError(message)
    shape = tuple(int(size) for size in shape)
    if spec.kind == "unranked":
        return replace(spec, shape=shape, kind="tensor")
    if len(shape) != spec.rank:
        message = f"input {spec.name!r} is {spec}: it has {spec.rank} axes, but the shape {given} has {len(shape)}"
        raise OptionError(message)
    for axis, (dim, size) in enumerate(zip(spec.shape, shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            message = (
                f"axis {axis} of input {spec.name!r} is fixed to {dim} in the model, but the shape {given} says {size}"
            )
            raise OptionError(message)
    return replace(spec, shape=shape)


def names(specs: Iterable[InputSpec]) -> str:
    """Return the inputs for a message, such as ``'ids' int64 (N, 16), 'mask' int64 (N, 16)``."""
    return ", ".join(f"{spec.name!r} {spec}" for spec in specs)
