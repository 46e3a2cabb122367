"""Example inputs of a torch module: as given or made from shapes, their dynamic axes, and others like them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxcomp.data.specs import describe, suggestion
from onnxcomp.errors import OptionError

__all__ = ["DTYPES", "Axes", "Examples", "Shape", "axes_of", "examples_of", "parse_dynamic", "parse_examples"]

Array = np.ndarray[Any, Any]
Axes = Mapping[str, Mapping[int, str]]
"""The dynamic axes of inputs: input name -> {axis: name of the axis}."""

DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
BATCH = "batch"


@dataclass(frozen=True)
class Shape:
    """An input to make up: normal floats, whole numbers of 0 and 1, or truth values.

    Attributes:
        sizes: One an axis.
        dtype: One of DTYPES.
    """

    sizes: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Examples:
    """Inputs of a module, by name.

    Attributes:
        tensors: Of torch, in the order of the module's arguments.
        named: Whether they are given to the module by name.
        made: The names of those that were made up.
        rest: How many of the last ones are taken by `*args`.
    """

    tensors: dict[str, Any]
    named: bool = False
    rest: int = 0
    made: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return ", ".join(f"{name} {describe(value.dtype, value.shape)}" for name, value in self.arrays().items())

    @property
    def args(self) -> tuple[Any, ...]:
        """Those that are given by position."""
        return () if self.named else tuple(self.tensors.values())

    @property
    def kwargs(self) -> dict[str, Any]:
        """Those that are given by name."""
        return self.tensors if self.named else {}

    def arranged(self, values: Mapping[str, Any]) -> Any:
        """Something about each input, in the structure that torch.export wants."""
        if self.named:
            return dict(values)
        found = list(values.values())
        first = len(found) - self.rest
        return (*found[:first], tuple(found[first:])) if self.rest else tuple(found)

    def arrays(self) -> dict[str, Array]:
        """They as arrays."""
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.tensors.items()}

    def sizes(self, axes: Axes) -> dict[str, int]:
        """The sizes of the dynamic axes, by their names."""
        return {
            dim: int(self.tensors[name].shape[axis]) for name, chosen in axes.items() for axis, dim in chosen.items()
        }

    def copied(self) -> Examples:
        """Tensors of their own."""
        return replace(self, tensors={name: tensor.clone() for name, tensor in self.tensors.items()})

    @staticmethod
    def other_sizes(dim: str, size: int) -> Iterator[int]:
        """Sizes to try a dynamic axis with instead, the most telling first."""
        sizes = (1, size + 1, 2 * size, 3 * size) if dim == BATCH else (size // 2, 2 * size, size - 1, size + 1)
        return (other for other in sizes if other > 0 and other != size)

    def drawn(self, seed: int) -> Examples:
        """Others like these: normal floats where they were made up, else their own values at random places."""
        rng = np.random.default_rng((seed, 1))
        tensors = {
            name: _drawn(tensor, tuple(tensor.shape), rng, made=name in self.made)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def resized(self, axes: Axes, dim: str, size: int, seed: int) -> Examples:
        """Others like these, a dynamic axis of another size."""
        rng = np.random.default_rng((seed, 2, size))
        tensors = {}
        for name, tensor in self.tensors.items():
            shape = tuple(
                size if axes.get(name, {}).get(axis) == dim else length for axis, length in enumerate(tensor.shape)
            )
            tensors[name] = _drawn(tensor, shape, rng, made=name in self.made)
        return replace(self, tensors=tensors)


def examples_of(module: Any, given: Any, seed: int) -> Examples:
    """Bring example inputs into their form.

    Args:
        module: What they are for.
        given: A tensor, a tuple or list of them, or a mapping of shapes or tensors by the names of its arguments.
        seed: Of those that are made up.

    Raises:
        OptionError: There are none, or they do not suit the module's arguments.
    """
    import torch

    names, variadic = _arguments(module)
    if given is None or (isinstance(given, Mapping | tuple | list) and not given):
        message = f"there are no example inputs; give a shape for {', '.join(names) or 'each input'}"
        raise OptionError(message)
    if isinstance(given, Mapping):
        return _from_shapes(given, names, seed)
    tensors = list(given) if isinstance(given, tuple | list) else [given]
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            message = f"example input {number} is a {type(tensor).__name__}, expected a tensor"
            raise OptionError(message)
        if (kind := str(tensor.dtype).removeprefix("torch.")) not in DTYPES:
            message = f"example input {number} is of {kind}, expected one of {', '.join(DTYPES)}"
            raise OptionError(message)
    if len(tensors) > len(names) and not variadic:
        message = f"there are {len(tensors)} example inputs, and the module takes {len(names)}: {', '.join(names)}"
        raise OptionError(message)
    rest = max(len(tensors) - len(names), 0)
    names += [f"input_{number}" for number in range(len(names), len(tensors))]
    return Examples({name: tensor.detach().cpu() for name, tensor in zip(names, tensors, strict=False)}, rest=rest)


def axes_of(examples: Examples, dynamic: Axes, *, batch: bool) -> tuple[dict[str, dict[int, str]], Examples]:
    """The dynamic axes of inputs, and the examples with at least two rows, for torch takes a size of one as fixed.

    Raises:
        OptionError: There is no such input or axis, or axes of one name differ in size.
    """
    axes: dict[str, dict[int, str]] = {}
    first = next(iter(examples.tensors.values()))
    if batch:
        rows = first.shape[0] if first.ndim else None
        axes = {name: {0: BATCH} for name, tensor in examples.tensors.items() if tensor.ndim and len(tensor) == rows}
    for name, chosen in dynamic.items():
        tensor = examples.tensors.get(name)
        if tensor is None:
            hint = suggestion(name, examples.tensors) or f"; they are {', '.join(examples.tensors)}"
            message = f"there is no input {name!r} to make an axis of dynamic{hint}"
            raise OptionError(message)
        for axis, dim in chosen.items():
            if not 0 <= axis < tensor.ndim:
                message = f"the input {name!r} has axes 0 to {tensor.ndim - 1}, got {axis}"
                raise OptionError(message)
            axes.setdefault(name, {})[axis] = dim
    axes = {name: axes[name] for name in examples.tensors if name in axes}
    tensors = dict(examples.tensors)
    for name, chosen in axes.items():
        for axis in chosen:
            if tensors[name].shape[axis] == 1:
                tensors[name] = tensors[name].repeat_interleave(2, dim=axis)
    examples = replace(examples, tensors=tensors)
    sizes = examples.sizes(axes)
    for name, chosen in axes.items():
        for axis, dim in chosen.items():
            if (size := tensors[name].shape[axis]) != sizes[dim]:
                message = f"the dynamic axis {dim!r} has the sizes {size} and {sizes[dim]}; give each a name of its own"
                raise OptionError(message)
    return axes, examples


# --- from text --------------------------------------------------------------------------------------------------------


def parse_examples(texts: Iterable[str]) -> dict[str, Shape]:
    """Parse shapes as the command line takes them, of a type where it is not float32.

    >>> parse_examples(["image=1,3,8,8", "ids=int64:1,16"])
    {'image': Shape(sizes=(1, 3, 8, 8), dtype='float32'), 'ids': Shape(sizes=(1, 16), dtype='int64')}

    Raises:
        OptionError: A text is not a shape, or an input is named twice.
    """
    shapes: dict[str, Shape] = {}
    for text in texts:
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(?:(\w+)\s*:)?\s*((?:\d{1,9}\s*,\s*)*\d{1,9})?\s*", text)
        if not match:
            message = f"{text!r} is not a shape; expected NAME=N,N,... or NAME=TYPE:N,N,..., such as ids=int64:1,128"
            raise OptionError(message)
        name, dtype = match[1], match[2] or "float32"
        sizes = tuple(int(size) for size in (match[3] or "").split(",") if size)
        if dtype not in DTYPES:
            message = f"{text!r}: the type must be one of {', '.join(DTYPES)}, got {dtype!r}"
            raise OptionError(message)
        if 0 in sizes:
            message = f"{text!r} has a size of 0; every size must be at least 1"
            raise OptionError(message)
        if name in shapes:
            message = f"the shape of input {name!r} is given twice; give it once"
            raise OptionError(message)
        shapes[name] = Shape(sizes, dtype)
    return shapes


def parse_dynamic(texts: Iterable[str]) -> dict[str, dict[int, str]]:
    """Parse dynamic axes as the command line takes them; axis 0 is called "batch" and axis n "axis_n" unless named.

    >>> parse_dynamic(["ids=1:tokens", "mask=0,1:tokens"])
    {'ids': {1: 'tokens'}, 'mask': {0: 'batch', 1: 'tokens'}}

    Raises:
        OptionError: A text does not tell axes, or an axis is given twice.
    """
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        parts = [re.fullmatch(r"\s*(\d{1,2})\s*(?::\s*([A-Za-z]\w*))?\s*", part) for part in rest.split(",")]
        if not equals or not name.strip():
            parts = [None]
        for part in parts:
            if part is None:
                message = (
                    f"{text!r} tells no axes; expected NAME=AXIS,... or NAME=AXIS:CALLED,..., such as ids=1:tokens"
                )
                raise OptionError(message)
            axis = int(part[1])
            chosen = axes.setdefault(name.strip(), {})
            if axis in chosen:
                message = f"{text!r}: axis {axis} is given twice; give it once"
                raise OptionError(message)
            chosen[axis] = part[2] or (f"axis_{axis}" if axis else BATCH)
    return axes


# --- parts ------------------------------------------------------------------------------------------------------------


def _arguments(module: Any) -> tuple[list[str], bool]:
    """The names of `forward`'s arguments, and whether it takes any number of them."""
    kinds = inspect.Parameter
    parameters = inspect.signature(module.forward).parameters.values()
    names = [each.name for each in parameters if each.kind not in {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}]
    return names, any(each.kind is kinds.VAR_POSITIONAL for each in parameters)


def _from_shapes(given: Mapping[str, Any], names: list[str], seed: int) -> Examples:
    import torch

    rng = np.random.default_rng((seed, 0))
    tensors: dict[str, Any] = {}
    made = set()
    for name in given:
        if name not in names:
            hint = suggestion(name, names) or f"; it takes {', '.join(names) or 'none by name'}"
            message = f"the module takes no input {name!r}{hint}"
            raise OptionError(message)
    for name in names:
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().cpu()
            continue
        shape = value if isinstance(value, Shape) else Shape(tuple(value))
        if shape.dtype not in DTYPES:
            message = f"input {name!r}: the type must be one of {', '.join(DTYPES)}, got {shape.dtype!r}"
            raise OptionError(message)
        tensors[name] = _made(shape.sizes, np.dtype(shape.dtype), rng)
        made.add(name)
    return Examples(tensors, named=True, made=frozenset(made))


def _made(sizes: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> Any:
    import torch

    floats = dtype.kind == "f"
    values = rng.standard_normal(sizes) if floats else rng.integers(0, 2, sizes)
    return torch.from_numpy(np.asarray(values, dtype))


def _drawn(tensor: Any, shape: tuple[int, ...], rng: np.random.Generator, *, made: bool) -> Any:
    """A tensor like another, of a shape."""
    import torch

    values = tensor.numpy()
    floats = values.dtype.kind == "f"
    if made or (floats and (not values.size or values.min() == values.max())):
        return _made(shape, values.dtype, rng)
    return torch.from_numpy(np.asarray(rng.choice(values.reshape(-1), shape), values.dtype))
