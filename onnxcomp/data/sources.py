"""Open the data that a user gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np

from onnxcomp.data.dataset import Dataset, Segment
from onnxcomp.data.fit import Feed, Head, Item, check_label, check_names, cut, fit, label_name, plan
from onnxcomp.data.images import ImageOptions, image_files, image_items
from onnxcomp.data.npy import npy_items, npz_items, read_npy
from onnxcomp.data.specs import Array, InputSpec, apply_shapes, feedable, names, suggestion
from onnxcomp.data.spool import MEMORY_BYTES, Spool
from onnxcomp.data.user_code import is_reference, load_function
from onnxcomp.errors import DataError, OptionError

_CHUNK_BYTES = 8 << 20


def open_data(
    source: object,
    specs: Sequence[InputSpec],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    image: ImageOptions | None = None,
    allow_code: bool = True,
    limit: int | None = None,
) -> Dataset:
    """Open data and check that they fit a model's inputs.

    Names must be the model's input names; "label" (or "labels") is the label. How arrays are cut into samples is
    told in `onnxcomp.data.fit`: with as many axes as the input, the first axis counts the samples. Types must be
    the model's, or convert without changing what values mean (float64 to float32, int32 to int64, int64 to int32
    if the values fit; never integers to floats).

    Args:
        source: One of

            - an .npz file: one array an input, first axis = sample; an .npy file, for a model with one input;
            - a folder of .npz files, each such a file, joined in the order of their names;
            - a folder of .npy files, for a model with one input: each file is one sample, or has a sample axis in
              front; for more inputs a folder with one folder an input, holding files of the same names;
            - a folder of images (.png, .jpg, .jpeg, .bmp, .webp), also in folders of it, unlabelled unless it
              holds a labels.csv with lines of file name, label;
            - a mapping of arrays (used as they are: do not change them afterwards), or one array for one input;
            - an iterable, or a function that returns one, of mappings, of arrays for a model with one input, of
              tuples of the inputs in the model's order, or of any of these with a label: ``(inputs, label)``. A
              torch DataLoader is one. Arrays are batches, or single samples with one axis less. It is read once;
            - a CalibrationDataReader of ONNX Runtime: anything with ``get_next()``;
            - ``"module:function"``, a function as above;
            - a Dataset of the same inputs.
        specs: The model's inputs, from `input_specs`.
        shapes: Sizes for dynamic axes, by input name; see `apply_shapes`.
        image: How images become inputs.
        allow_code: Whether ``"module:function"`` may be imported and called.
        limit: Read no more samples than this.

    Raises:
        DataError: The data cannot be read or do not fit the model.
        OptionError: An argument is not valid.
        ModelError: The model has inputs that arrays cannot feed.
    """
    wanted = feedable(apply_shapes(specs, shapes))
    if limit is not None and limit < 1:
        message = f"limit must be at least 1, got {limit}"
        raise OptionError(message)
    if not wanted:
        message = "the model has no inputs: there is nothing to feed"
        raise DataError(message)
    if isinstance(source, str | Path):
        if not str(source):
            message = "the path of the data is empty; give a file or a folder"
            raise DataError(message)
        path = Path(source)
        if _exists(path) or not (isinstance(source, str) and is_reference(source)):
            return _open_path(path, wanted, image, limit)
        function, origin = load_function(source, allow_code), source
        source = _called(function, origin)
    else:
        origin = _origin(source)
    if image is not None:
        message = f"image options are for a folder of images, but the data are {origin}"
        raise OptionError(message)
    return _open_object(source, wanted, origin, limit)


def _collect(items: Iterable[Item], specs: Sequence[InputSpec], where: str, limit: int | None) -> Dataset:
    with closing(Spool(where)) as spool:
        for item in items:
            spool.add(item if limit is None else item.head(limit - spool.size))
            if spool.size == limit:
                break
        return Dataset(specs, spool.finish(), origin=where)


# Files and folders


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False  # a name that is too long, or a folder that may not be entered


def _open_path(path: Path, specs: Sequence[InputSpec], image: ImageOptions | None, limit: int | None) -> Dataset:
    where = path.name or str(path)
    if not _exists(path):
        near = [other.name for other in path.parent.iterdir()] if _exists(path.parent) and path.parent.is_dir() else []
        message = f"{path}: there is no such file or folder{suggestion(path.name, near)}"
        raise DataError(message)
    try:
        if path.is_dir():
            files = image_files(path)
            if files and not any(path.glob("*.np[yz]")):
                items = image_items(path, files, specs, where, image or ImageOptions())
                return _collect(items, specs, where, limit)
            items = _folder_items(path, specs, where, limit)
        elif path.suffix == ".npz":
            items = npz_items(path, specs, where, limit)
        elif path.suffix == ".npy":
            items = npy_items(path, specs, where, limit)
        else:
            message = f"{where}: it is not data that can be read; expected an .npz or .npy file, or a folder"
            raise DataError(message)
        if image is not None:
            message = f"image options are for a folder of images, but {where} is not one"
            raise OptionError(message)
        return _collect(items, specs, where, limit)
    except OSError as error:
        message = f"{where}: cannot be read: {error.strerror or error}"
        raise DataError(message) from error


def _folder_items(folder: Path, specs: Sequence[InputSpec], where: str, limit: int | None) -> Iterator[Item]:
    archives, arrays = sorted(folder.glob("*.npz")), sorted(folder.glob("*.npy"))
    if archives and arrays:
        message = f"{where}: it holds .npz and .npy files; give a folder with one kind"
        raise DataError(message)
    if archives:
        for path in archives:
            yield from npz_items(path, specs, f"{where}/{path.name}", limit)
    elif arrays and len(specs) > 1:
        message = f"{where}: the model has {len(specs)} inputs; put .npy files in one folder an input: {names(specs)}"
        raise DataError(message)
    elif arrays:
        yield from _npy_folder_items({specs[0].name: arrays}, specs, where)
    else:
        inside = {path.name: sorted(path.glob("*.npy")) for path in sorted(folder.iterdir()) if path.is_dir()}
        columns = {name: files for name, files in inside.items() if files}
        if not columns:
            message = f"{where}: there are no .npz, .npy or image files in this folder"
            raise DataError(message)
        check_names(specs, list(columns), where)
        yield from _npy_folder_items(columns, specs, where)


def _npy_folder_items(columns: Mapping[str, Sequence[Path]], specs: Sequence[InputSpec], where: str) -> Iterator[Item]:
    first, *others = columns
    for name in others:
        odd = {path.name for path in columns[first]} ^ {path.name for path in columns[name]}
        if odd:
            message = (
                f"{where}: {min(odd)!r} is in only one of the folders {first!r} and {name!r}; names must be the same"
            )
            raise DataError(message)
    number = 0
    for paths in zip(*columns.values(), strict=True):
        arrays = {name: read_npy(path, f"{where}/{path.name}") for name, path in zip(columns, paths, strict=True)}
        item = fit(specs, arrays, None, f"{where}/{paths[0].name}", single=True, first=number)
        number += item.count
        yield item


# Objects


def _origin(source: object) -> str:
    if isinstance(source, Mapping | np.ndarray):
        return "arrays"
    name = getattr(source, "__name__", type(source).__name__)
    return str(name)


def _called(function: Callable[[], object], origin: str) -> object:
    try:
        return function()
    except Exception as error:  # a user's function may raise anything
        message = f"{origin}: the function that gives the data failed: {type(error).__name__}: {error}"
        raise DataError(message) from error


def _open_object(source: object, specs: Sequence[InputSpec], origin: str, limit: int | None) -> Dataset:
    if isinstance(source, Dataset):
        if source.specs != tuple(specs):
            message = (
                f"{source.description}: it was opened for {names(source.specs)}, but the model wants {names(specs)}"
            )
            raise DataError(message)
        return source if limit is None or limit >= source.size else source.subset(range(limit))
    if isinstance(source, str | bytes | Path):
        message = f"{origin}: it gave {type(source).__name__}; expected arrays or an iterable of them"
        raise DataError(message)
    if _is_array(source) and not isinstance(source, Mapping):
        _check_single_input(specs, origin)
        source = {specs[0].name: source}
    if isinstance(source, Mapping):
        return _open_mapping(source, specs, origin, limit)
    if hasattr(source, "get_next"):
        return _collect(_object_items(_drain(source), specs, origin), specs, origin, limit)
    if callable(source) and not hasattr(source, "__iter__"):
        return _open_object(_called(source, origin), specs, origin, limit)
    try:
        iterator = iter(cast("Iterable[object]", source))
    except TypeError:
        message = (
            f"{origin}: a {type(source).__name__} is not data that can be read; expected a path, arrays, an iterable, "
            "a function or a CalibrationDataReader"
        )
        raise DataError(message) from None
    return _collect(_object_items(iterator, specs, origin), specs, origin, limit)


def _open_mapping(source: Mapping[Any, Any], specs: Sequence[InputSpec], where: str, limit: int | None) -> Dataset:
    arrays, label = _named(source, specs, where)
    check_names(specs, list(arrays), where)
    wanted = {spec.name: spec.dtype for spec in specs}
    total = sum(array.nbytes for array in arrays.values())
    if total <= MEMORY_BYTES or all(array.dtype == wanted[name] for name, array in arrays.items()):
        item = fit(specs, arrays, label, where)
        item = item if limit is None else item.head(limit)
        return Dataset(specs, [Segment(item.feeds, item.arrays, item.labels, item.count)], origin=where)
    return _collect(_converted(specs, arrays, label, where), specs, where, limit)


def _converted(
    specs: Sequence[InputSpec], arrays: Mapping[str, Array], label: Array | None, where: str
) -> Iterator[Item]:
    """Convert arrays of another type a few rows at a time: a second copy may not fit in memory."""
    if label is not None:
        check_label(label.dtype, where)
    heads = {name: Head(array.dtype, array.shape) for name, array in arrays.items()}
    how = plan(specs, heads, None if label is None else Head(label.dtype, label.shape), where)
    if how.expand or how.expand_label:
        yield cut(specs, arrays, label, how, where)
        return
    step = max(1, _CHUNK_BYTES // max(1, sum(head.row_bytes for head in heads.values())))
    for start in range(0, how.count, step):
        part = slice(start, start + step)
        chunk = {name: array if how.feeds[name] is Feed.SHARED else array[part] for name, array in arrays.items()}
        yield cut(specs, chunk, None if label is None else label[part], how, where, first=start)


def _drain(reader: Any) -> Iterator[object]:
    while (feed := reader.get_next()) is not None:
        yield feed


def _object_items(iterator: Iterator[object], specs: Sequence[InputSpec], where: str) -> Iterator[Item]:
    first = 0
    for number in itertools.count():
        try:
            value = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a user's iterator may raise anything
            message = f"{where}: reading item {number} failed: {type(error).__name__}: {error}"
            raise DataError(message) from error
        here = f"{where}: item {number}"
        arrays, label = _parts(value, specs, here)
        item = fit(specs, arrays, label, here, single=True, first=first)
        first += item.count
        yield item


def _parts(value: object, specs: Sequence[InputSpec], where: str) -> tuple[dict[str, Array], Array | None]:
    """Return the inputs and the label of what an iterable yielded."""
    if isinstance(value, Mapping):
        return _named(value, specs, where)
    if not isinstance(value, tuple) and not (isinstance(value, list) and any(_is_array(part) for part in value)):
        _check_single_input(specs, where)
        return {specs[0].name: _array(value, where)}, None
    parts = list(value)
    if len(parts) == 2 and isinstance(parts[0], Mapping):
        arrays, label = _named(parts[0], specs, where)
        if label is not None:
            message = f"{where}: it has two labels, one among the inputs and one beside them; give one"
            raise DataError(message)
        return arrays, _array(parts[1], where)
    if len(parts) not in (len(specs), len(specs) + 1):
        message = f"{where}: it holds {len(parts)} values; expected the inputs {names(specs)} and possibly a label"
        raise DataError(message)
    arrays = {spec.name: _array(part, where) for spec, part in zip(specs, parts, strict=False)}
    return arrays, _array(parts[-1], where) if len(parts) > len(specs) else None


def _named(value: Mapping[Any, Any], specs: Sequence[InputSpec], where: str) -> tuple[dict[str, Array], Array | None]:
    arrays = {str(name): _array(part, f"{where}: {name}") for name, part in value.items()}
    label = label_name(list(arrays), specs)
    return arrays, arrays.pop(label) if label else None


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") or isinstance(value, Mapping)


def _check_single_input(specs: Sequence[InputSpec], where: str) -> None:
    if len(specs) != 1:
        message = f"{where}: an array without a name fits a model with one input; this one wants {names(specs)}"
        raise DataError(message)


def _array(value: Any, where: str) -> Array:
    """Return what is an array, a torch tensor, a number, a text or nested lists of these, as an array."""
    try:
        if hasattr(value, "detach"):  # a torch tensor, known by its methods: torch is not imported for it
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        message = f"{where}: it cannot be made an array: {str(error).splitlines()[0]}"
        raise DataError(message) from error
    if array.dtype.kind == "O" and not all(isinstance(entry, str) for entry in array.flat):
        kind = type(value).__name__
        message = f"{where}: expected an array of numbers or strings, got a {kind} of other Python objects"
        raise DataError(message)
    return array
