"""Whether arrays fit a model's inputs, how they are cut into samples, and safe conversions of type.

An array may be fed in one of three ways, told apart by its number of axes against the input's:

- equal: the model's first axis is the sample axis, and samples are concatenated along it (`Feed.ROW`);
- one more: the array's first axis counts runs of the model, and is stripped (`Feed.RUN`);
- both have none: a scalar that every sample shares (`Feed.SHARED`).

Where the model's own shapes rule out one common sample axis, such as a recurrent state (2, N, 128) beside an
input (N, 512), arrays of equal rank are one whole feed, which counts as one sample.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.data.specs import Array, Dim, InputSpec, describe, names, suggestion
from onnxcomp.errors import DataError

LABELS = ("label", "labels")
_CHECK_BYTES = 8 << 20


class Feed(enum.Enum):
    """How an array is cut into what one run of the model is fed."""

    ROW = "row"
    RUN = "run"
    SHARED = "shared"


@dataclass(frozen=True)
class Head:
    """The type and shape of an array that may not have been read yet."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return int(np.prod(self.shape[1:], dtype=object)) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """How a group of arrays is fed.

    Attributes:
        feeds: How each input is cut.
        expand: Inputs that lack a sample axis and are given one.
        count: The number of samples.
        expand_label: Whether the label lacks a sample axis too.
    """

    feeds: Mapping[str, Feed]
    expand: frozenset[str]
    count: int
    expand_label: bool = False


@dataclass(frozen=True)
class Item:
    """Some samples that fit the model.

    Attributes:
        feeds: How each input is cut.
        arrays: The values by input name, of the model's types, first axis = sample (but for `Feed.SHARED`).
        labels: First axis = sample, or None.
        count: The number of samples.
    """

    feeds: Mapping[str, Feed]
    arrays: Mapping[str, Array]
    labels: Array | None
    count: int

    def head(self, count: int) -> Item:
        """Return the first `count` samples."""
        if count >= self.count:
            return self
        arrays = {
            name: array if self.feeds[name] is Feed.SHARED else array[:count] for name, array in self.arrays.items()
        }
        return Item(self.feeds, arrays, None if self.labels is None else self.labels[:count], count)


def label_name(found: Sequence[str], specs: Sequence[InputSpec]) -> str | None:
    """Return which of the names found is the label: "label" or "labels", unless the model has such an input."""
    wanted = {spec.name for spec in specs}
    return next((name for name in LABELS if name in found and name not in wanted), None)


def check_names(specs: Sequence[InputSpec], found: Sequence[str], where: str) -> None:
    """Raise DataError unless the names found are those of the model's inputs."""
    wanted = [spec.name for spec in specs]
    extra = [name for name in found if name not in wanted]
    for name in wanted:
        if name not in found:
            close = suggestion(name, extra).replace("did you mean", "is it")
            close = close or f"; found {', '.join(map(repr, found)) or 'nothing'}"
            message = f"{where}: there is nothing for input {name!r}{close}; the model wants {names(specs)}"
            raise DataError(message)
    if extra:
        message = (
            f"{where}: the model has no input {extra[0]!r}{suggestion(extra[0], wanted)}; it wants {names(specs)} "
            "and, if there are labels, 'label'"
        )
        raise DataError(message)


def plan(
    specs: Sequence[InputSpec], heads: Mapping[str, Head], label: Head | None, where: str, *, single: bool = False
) -> Plan:
    """Decide how arrays are fed, and raise DataError if they do not fit the model.

    Args:
        specs: What the model wants.
        heads: The type and shape of each input's array; the names are known to be right.
        label: The type and shape of the labels, if any.
        where: Where the arrays come from, for messages.
        single: Whether an array with one axis less than the input is one sample; an error otherwise.
    """
    extra = {spec.name: len(heads[spec.name].shape) - spec.rank for spec in specs}
    for spec in specs:
        check_dtype(heads[spec.name].dtype, spec, where)
        if extra[spec.name] not in ((-1, 0, 1) if single else (0, 1)):
            _refuse_shape(spec, heads[spec.name], where)
    expand = {name for name, more in extra.items() if more < 0}
    feeds = {spec.name: _feed(spec, extra[spec.name]) for spec in specs}
    whole = not any(extra.values()) and _is_whole(specs, heads)
    if whole:
        feeds = dict.fromkeys(feeds, Feed.RUN)
        expand = set(feeds)
    for spec in specs:
        _check_dims(spec, heads[spec.name], where, skip=extra[spec.name] if not whole else 0, whole=whole)
    _check_symbols(specs, heads, feeds, where)
    count = 1 if expand else _count(feeds, heads, where)
    if expand:
        _check_single(feeds, heads, expand, where)
    expand_label = label is not None and (bool(expand) or (count == 1 and not label.shape))
    if label is not None and not expand_label and label.shape[:1] != (count,):
        got = label.shape[0] if label.shape else "a single one"
        message = f"{where}: there are {count} samples but the labels are {got}; give one label a sample"
        raise DataError(message)
    return Plan(feeds, frozenset(expand), count, expand_label)


def _feed(spec: InputSpec, extra: int) -> Feed:
    if extra > 0:
        return Feed.RUN
    return Feed.ROW if spec.rank else Feed.SHARED


def batchable(specs: Sequence[InputSpec]) -> bool:
    """Whether the first axes of all inputs (scalars aside) can be one common sample axis."""
    firsts = [spec.shape[0] for spec in specs if spec.rank]
    fixed = {size for size in firsts if isinstance(size, int)}
    return len(fixed) <= 1 and (fixed <= {1} or all(isinstance(size, int) for size in firsts))


def _is_whole(specs: Sequence[InputSpec], heads: Mapping[str, Head]) -> bool:
    if not any(spec.rank for spec in specs) or not batchable(specs):
        return True
    # Axes of different names need not be equal: where they are not, they are no sample axis.
    firsts = {(spec.shape[0], heads[spec.name].shape[0]) for spec in specs if spec.rank}
    named = all(isinstance(name, str) for name, _ in firsts)
    return named and len(firsts) == len({name for name, _ in firsts}) and len({size for _, size in firsts}) > 1


def _check_dims(spec: InputSpec, head: Head, where: str, *, skip: int, whole: bool) -> None:
    """Compare every axis but the sample axis."""
    if skip > 0:
        wanted: tuple[Dim, ...] = spec.shape
        got = head.shape[1:]
    else:
        first = 0 if whole else 1
        wanted = spec.shape[first:]
        got = head.shape[first + skip :]
    if any(isinstance(size, int) and size != real for size, real in zip(wanted, got, strict=True)):
        _refuse_shape(spec, head, where)


def _refuse_shape(spec: InputSpec, head: Head, where: str) -> None:
    message = (
        f"{where}: input {spec.name!r} expects {spec}, got {describe(head.dtype, head.shape)}; {_advice(spec, head)}"
    )
    raise DataError(message)


def _advice(spec: InputSpec, head: Head) -> str:
    rank = spec.rank
    if len(head.shape) == rank and 3 <= rank <= 5:
        for order in itertools.permutations(range(1, rank)):
            shape = (head.shape[0], *(head.shape[axis] for axis in order))
            if all(
                not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape[1:], shape[1:], strict=True)
            ):
                return f"transpose it: array.transpose({', '.join(map(str, (0, *order)))})"
    if len(head.shape) == rank - 1:
        return "give it a first axis that counts the samples"
    return "the first axis counts the samples, the others must be the model's"


def _check_symbols(
    specs: Sequence[InputSpec], heads: Mapping[str, Head], feeds: Mapping[str, Feed], where: str
) -> None:
    """Refuse one named axis of two sizes; a sample axis is left out."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        shape = heads[spec.name].shape[len(heads[spec.name].shape) - spec.rank :] if spec.rank else ()
        start = 1 if feeds[spec.name] is Feed.ROW else 0
        # Aligned from the end: a single sample lacks the first axis.
        for dim, size in zip(reversed(spec.shape[start:]), reversed(shape), strict=False):
            if isinstance(dim, str):
                before, owner = sizes.setdefault(dim, (size, spec.name))
                if before != size:
                    message = (
                        f"{where}: axis {dim!r} is {before} in input {owner!r} and {size} in input {spec.name!r}; "
                        "they must be equal"
                    )
                    raise DataError(message)


def _count(feeds: Mapping[str, Feed], heads: Mapping[str, Head], where: str) -> int:
    counts = {name: heads[name].shape[0] for name, feed in feeds.items() if feed is not Feed.SHARED}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        message = f"{where}: the inputs do not agree on the number of samples: {listed}; their first axes must be equal"
        raise DataError(message)
    return next(iter(counts.values()), 1)


def _check_single(feeds: Mapping[str, Feed], heads: Mapping[str, Head], expand: set[str], where: str) -> None:
    for name, feed in feeds.items():
        if name not in expand and feed is not Feed.SHARED and heads[name].shape[0] != 1:
            held = heads[name].shape[0]
            message = (
                f"{where}: input {min(expand)!r} is one sample, but input {name!r} holds {held} of them; "
                "give both a first axis that counts the samples"
            )
            raise DataError(message)


def check_dtype(dtype: np.dtype[Any], spec: InputSpec, where: str) -> None:
    """Raise DataError unless values of `dtype` can become the input's without changing what they mean."""
    source, target = _category(dtype), _category(spec.dtype)
    if source == target == "other" and dtype == spec.dtype:
        return
    if (
        (source == target != "other")
        or (source == "bool" and target in ("int", "float"))
        or (source, target) == ("int", "bool")
    ):
        return
    wanted = "strings" if target == "string" else spec.dtype.name
    message = f"{where}: input {spec.name!r} expects {wanted}, got {dtype.name}; "
    if source == "int" and target == "float" and dtype.itemsize == 1:
        message += "scale the values as in training, for images often array.astype('float32') / 255"
    elif dtype.kind == "O":
        message += "a pickled or ragged array is never read"
    else:
        message += f"convert it yourself if that is meant: array.astype('{spec.dtype.name}')"
    raise DataError(message)


def _category(dtype: np.dtype[Any]) -> str:
    known = {"b": "bool", "i": "int", "u": "int", "f": "float", "U": "string", "S": "string", "O": "string"}
    if dtype.kind == "V" and dtype.fields is None and dtype.names is None:
        # ml_dtypes: bfloat16, float8_*, int4, ...
        return "float" if "float" in dtype.name else "int" if "int" in dtype.name else "other"
    return known.get(dtype.kind, "other")


def convert(array: Array, spec: InputSpec, where: str, first: int = 0) -> Array:
    """Return the values as the input's type; strings as numpy's fixed-width type.

    Args:
        array: The values; its type has passed `check_dtype`.
        spec: The input.
        where: Where the array comes from, for messages.
        first: The number of the array's first sample, for messages.

    Raises:
        DataError: A value does not fit, or is not finite.
    """
    target = spec.dtype
    if _category(target) == "string":
        return _strings(array, spec, where)
    if _category(target) in ("int", "bool") and array.dtype != target and array.size:
        low, high = _range(target)
        if int(array.min()) < low or int(array.max()) > high:
            message = (
                f"{where}: input {spec.name!r} expects {target.name}, but values from {array.min()} to {array.max()} "
                f"do not fit in {low} to {high}"
            )
            raise DataError(message)
    if array.dtype == target:
        result = array
    else:
        with np.errstate(over="ignore"):
            result = array.astype(target)
    if _category(target) == "float":
        _check_finite(result, spec, where, first)
    return result


def _range(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return int(info.min), int(info.max)
    import ml_dtypes

    small: Any = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call] # ml_dtypes has no types here
    return int(small.min), int(small.max)


def _strings(array: Array, spec: InputSpec, where: str) -> Array:
    if array.dtype.kind in "SU":
        try:
            # Also of "U": a damaged file may hold what is no text.
            return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else np.array(array.tolist(), array.dtype)
        except (ValueError, SystemError) as error:
            message = f"{where}: input {spec.name!r} holds strings that are no text: {error}"
            raise DataError(message) from error
    if array.dtype.kind == "O" and not all(isinstance(value, str) for value in array.flat):
        message = f"{where}: input {spec.name!r} expects strings, got other Python objects; convert them with str()"
        raise DataError(message)
    return array.astype(np.str_)


def _check_finite(array: Array, spec: InputSpec, where: str, first: int) -> None:
    # Additive masks are made of infinities on purpose.
    test = np.isnan if "mask" in spec.name.lower() or "bias" in spec.name.lower() else _not_finite
    if not array.ndim:
        array = array[None]
    step = max(1, _CHECK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        bad = test(part if part.dtype.kind == "f" else part.astype(np.float32))
        if bad.any():
            row = start + int(np.argmax(bad.reshape(len(part), -1).any(axis=1)))
            message = (
                f"{where}: input {spec.name!r} has values that are not finite, first in sample {first + row}; "
                f"leave such samples out (counted from 0; values too large for {spec.dtype.name} count too)"
            )
            raise DataError(message)


def _not_finite(array: Array) -> Array:
    result: Array = ~np.isfinite(array)
    return result


def fit(
    specs: Sequence[InputSpec],
    arrays: Mapping[str, Array],
    label: Array | None,
    where: str,
    *,
    single: bool = False,
    first: int = 0,
) -> Item:
    """Return arrays as samples that fit the model, or raise DataError; the arguments are those of `plan`."""
    check_names(specs, list(arrays), where)
    if label is not None:
        check_label(label.dtype, where)
    heads = {name: Head(array.dtype, array.shape) for name, array in arrays.items()}
    how = plan(specs, heads, None if label is None else Head(label.dtype, label.shape), where, single=single)
    return cut(specs, arrays, label, how, where, first=first)


def cut(
    specs: Sequence[InputSpec],
    arrays: Mapping[str, Array],
    label: Array | None,
    how: Plan,
    where: str,
    *,
    first: int = 0,
) -> Item:
    """Convert arrays, or the next few rows of them, that a plan was made for."""
    fitted: dict[str, Array] = {}
    count = how.count
    for spec in specs:
        array = arrays[spec.name][None] if spec.name in how.expand else arrays[spec.name]
        fitted[spec.name] = convert(array, spec, where, first)
        if how.feeds[spec.name] is not Feed.SHARED:
            count = len(array)
    if label is not None and how.expand_label:
        label = label[None]
    return Item(how.feeds, fitted, label, count)


def check_label(dtype: np.dtype[Any], where: str) -> None:
    """Raise DataError unless labels of this type can be kept."""
    if dtype.kind not in "biufUS":
        message = f"{where}: the labels are of type {dtype.name}; expected numbers or strings"
        raise DataError(message)
