"""Samples that fit a model, read in batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onnxcomp.data.fit import Feed
from onnxcomp.data.specs import Array, InputSpec
from onnxcomp.errors import DataError, OptionError

_BATCH = 32
_BATCH_BYTES = 64 << 20
_HASH_BYTES = 8 << 20
_SMALLEST_SPLIT = 8
_SHARE_ERROR = 1e-6  # shares such as 1/3 + 1/3 + 1/3 do not add up to exactly 1


@dataclass(frozen=True)
class Batch:
    """What one run of a model is fed.

    Attributes:
        inputs: Arrays of the model's types and shapes by input name.
        labels: The labels of the real samples, first axis = sample, or None.
        count: The number of real samples. A model with a fixed batch may get more: the last one repeated.
    """

    inputs: dict[str, Array]
    labels: Array | None
    count: int


@dataclass(frozen=True)
class Segment:
    """Consecutive samples of equal shape: what can go into one batch.

    Attributes:
        feeds: How each input is cut.
        arrays: Values by input name, first axis = sample (but for `Feed.SHARED`); strings of fixed width.
        labels: First axis = sample, or None.
        size: The number of samples.
    """

    feeds: Mapping[str, Feed]
    arrays: Mapping[str, Array]
    labels: Array | None
    size: int

    @property
    def sample_bytes(self) -> int:
        """Bytes of the inputs of one sample."""
        return sum(array[:1].nbytes if array.ndim else array.nbytes for array in self.arrays.values())


class _Store:
    """The segments, shared by a dataset and its subsets."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments: Sequence[Segment] | None = segments
        self.starts = np.cumsum([0, *(segment.size for segment in segments)])
        self._digest: str | None = None

    @property
    def segments(self) -> Sequence[Segment]:
        if self._segments is None:
            message = "the data have been closed; open them again"
            raise DataError(message)
        return self._segments

    def close(self) -> None:
        # Spooled files have no name any more (see spool.py): they go with the last reference to them.
        self._segments = None

    def digest(self, specs: Sequence[InputSpec]) -> str:
        if self._digest is None:
            total = hashlib.sha256()
            for segment in self.segments:
                columns = [(spec.name, segment.feeds[spec.name].value, segment.arrays[spec.name]) for spec in specs]
                if segment.labels is not None:
                    columns.append(("label", "label", segment.labels))
                for name, feed, array in columns:
                    # Widths of strings depend on how the samples were grouped: not part of the content.
                    kind = array.dtype.kind if array.dtype.kind in "US" else array.dtype.name
                    total.update(repr((name, feed, kind, array.shape)).encode())
                    _update(total, array)
            self._digest = total.hexdigest()
        return self._digest


def _update(total: hashlib._Hash, array: Array) -> None:
    rows = array if array.ndim else array[None]
    step = max(1, _HASH_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.dtype.kind in "US":
            total.update(repr(part.tolist()).encode())
        else:
            total.update(part.tobytes())


class Dataset:
    """Samples that fit a model's inputs, in batches; several passes give the same samples in the same order.

    Made by `open_data` and `generate`. Large data lie in temporary files without a name: they vanish when the
    dataset is closed or forgotten, or the process ends in whatever way.

    Attributes:
        specs: The inputs that the samples fit.
        size: The number of samples.
        has_labels: Whether batches carry labels.
        generated: Whether the samples were made up, and so say nothing about accuracy.
        description: What the samples are, such as "calib.npz: 250 samples".
    """

    def __init__(
        self, specs: Sequence[InputSpec], segments: Sequence[Segment], *, origin: str, generated: bool = False
    ) -> None:
        self.specs = tuple(specs)
        self.generated = generated
        self._origin = origin
        self._store = _Store(segments)
        self._indices: npt.NDArray[np.int64] | None = None
        self.size = sum(segment.size for segment in segments)
        if not self.size:
            message = f"{origin}: there are no samples; give at least one"
            raise DataError(message)
        self.has_labels = segments[0].labels is not None
        self._rows, self._fixed = _batch_rows(self.specs, segments, origin)

    @property
    def description(self) -> str:
        """What the samples are, such as "calib.npz: 250 samples"."""
        return f"{self._origin}: {self.size:,} sample{'s' if self.size != 1 else ''}"

    @property
    def digest(self) -> str:
        """A sha256 over names, types, shapes and contents, in hexadecimal; read from disk once, then remembered."""
        whole = self._store.digest(self.specs)
        if self._indices is None:
            return whole
        return hashlib.sha256(whole.encode() + self._indices.tobytes()).hexdigest()

    @property
    def batch_size(self) -> int:
        """How many samples a batch has by default."""
        return self._rows

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"<Dataset {self.description}>"

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Return the samples, in order, in batches.

        A model with a fixed batch gets that, whatever `batch_size` says; the last batch is then filled up by
        repeating its last sample. Samples given one run each come one by one. A batch ends early where the shape
        of the samples changes.

        Args:
            batch_size: Samples in a batch; by default 32, or fewer that stay below 64 MB.
        """
        if batch_size is not None and batch_size < 1:
            message = f"batch_size must be at least 1, got {batch_size}"
            raise OptionError(message)
        rows = self._rows if self._fixed or batch_size is None else batch_size
        return self._batches(rows, self._store.segments)

    def _batches(self, rows: int, segments: Sequence[Segment]) -> Iterator[Batch]:
        for segment, indices in self._parts(segments):
            for start in range(0, len(indices), rows):
                yield self._batch(segment, indices[start : start + rows], rows if self._fixed else 0)

    def _parts(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, npt.NDArray[np.int64]]]:
        order = np.arange(self.size) if self._indices is None else self._indices
        owners = np.searchsorted(self._store.starts, order, side="right") - 1
        bounds = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(order)]
        for start, end in itertools.pairwise(bounds):
            if start < end:
                owner = int(owners[start])
                yield segments[owner], order[start:end] - self._store.starts[owner]

    def _batch(self, segment: Segment, rows: npt.NDArray[np.int64], fixed: int) -> Batch:
        inputs: dict[str, Array] = {}
        for spec in self.specs:
            array, feed = segment.arrays[spec.name], segment.feeds[spec.name]
            if feed is Feed.ROW:
                array = _take(array, rows)
                if len(array) < fixed:
                    array = np.concatenate([array, np.repeat(array[-1:], fixed - len(array), axis=0)])
            elif feed is Feed.RUN:
                array = array[rows[0]]
            inputs[spec.name] = np.asarray(array, dtype=object if spec.dtype == object else None, order="C")
        labels = None if segment.labels is None else _take(segment.labels, rows)
        return Batch(inputs, labels, len(rows))

    def feeds(self, batch_size: int | None = None) -> Iterator[dict[str, Array]]:
        """Return the inputs of each batch; see `batches`."""
        return (batch.inputs for batch in self.batches(batch_size))

    def labels(self) -> Array | None:
        """Return all labels, first axis = sample, without reading the inputs; None if there are none."""
        if not self.has_labels:
            return None
        parts = [
            _take(segment.labels, rows)
            for segment, rows in self._parts(self._store.segments)
            if segment.labels is not None
        ]
        shapes = {part.shape[1:] for part in parts}
        if len(shapes) > 1:
            listed = ", ".join(map(str, sorted(shapes)))
            message = f"{self._origin}: the labels are of different shapes ({listed}); make them equal"
            raise DataError(message)
        return np.concatenate(parts)

    def groups(self) -> list[npt.NDArray[np.int64]]:
        """Return the places of the samples that have the inputs' shapes in common, and so can share a batch."""
        places: dict[Any, list[npt.NDArray[np.int64]]] = {}
        first = 0
        for segment, rows in self._parts(self._store.segments):
            shape = tuple(segment.arrays[spec.name].shape[1:] for spec in self.specs)
            places.setdefault(shape, []).append(np.arange(first, first + len(rows)))
            first += len(rows)
        return [np.concatenate(each) for each in places.values()]

    def subset(self, indices: npt.NDArray[Any] | Sequence[int]) -> Dataset:
        """Return the samples at `indices`, in that order; nothing is copied."""
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or not chosen.size or chosen.dtype.kind not in "iu":
            got = f"{chosen.dtype.name} {chosen.shape}"
            message = f"indices of samples must be a list of whole numbers and not empty, got {got}"
            raise OptionError(message)
        if chosen.min() < 0 or chosen.max() >= self.size:
            message = f"indices of samples must be in 0 to {self.size - 1}, got {chosen.min()} to {chosen.max()}"
            raise OptionError(message)
        part = object.__new__(Dataset)
        part.__dict__.update(self.__dict__)
        part._indices = chosen.astype(np.int64) if self._indices is None else self._indices[chosen]
        part.size = len(chosen)
        return part

    def one_by_one(self) -> Dataset:
        """Return the same samples in batches of 1, for a model that takes no others whatever its shapes say."""
        part = object.__new__(Dataset)
        part.__dict__.update(self.__dict__)
        part._rows, part._fixed = 1, True
        return part

    def split(self, shares: Mapping[str, float], seed: int) -> dict[str, Dataset]:
        """Divide the samples at random.

        With 8 samples or more, and at least as many as shares, the parts are disjoint, none is empty, and together
        they are all samples if the shares add up to 1. With fewer, every part is the whole set: too little to divide.

        Args:
            shares: A name and a fraction of the samples for each part; the sum is at most 1.
            seed: The same seed gives the same parts.
        """
        fractions = np.array(list(shares.values()), dtype=np.float64)
        if not len(fractions) or not (fractions > 0).all() or fractions.sum() > 1 + _SHARE_ERROR:
            message = f"shares must be above 0 and add up to at most 1, got {dict(shares)}"
            raise OptionError(message)
        if self.size < max(_SMALLEST_SPLIT, len(fractions)):
            return dict.fromkeys(shares, self)
        order = np.random.default_rng(seed).permutation(self.size)
        ends = np.cumsum(_counts(fractions, self.size))
        # Sorted, so that reading stays sequential and samples of equal shape stay together.
        return {name: self.subset(np.sort(part)) for name, part in zip(shares, np.split(order, ends), strict=False)}

    def close(self) -> None:
        """Give up memory and temporary files, of this dataset and of all its subsets."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _counts(fractions: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.int64]:
    """Divide `size` by largest remainder; every part gets at least one."""
    total = min(size, round(size * float(fractions.sum())))
    total = max(total, len(fractions))
    exact = fractions / fractions.sum() * total
    counts: npt.NDArray[np.int64] = np.maximum(1, np.floor(exact)).astype(np.int64)
    while counts.sum() < total:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > total:
        counts[np.argmax(counts)] -= 1
    return counts


def _take(array: Array, rows: npt.NDArray[np.int64]) -> Array:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and (len(rows) < 3 or bool((np.diff(rows) == 1).all())):
        return np.asarray(array[first : last + 1])
    return np.asarray(array[rows])


def _batch_rows(specs: Sequence[InputSpec], segments: Sequence[Segment], origin: str) -> tuple[int, bool]:
    """Return how many samples go into a batch, and whether that is fixed."""
    by_run = any(Feed.RUN in segment.feeds.values() for segment in segments)
    by_row = {spec.name for segment in segments for spec in specs if segment.feeds[spec.name] is Feed.ROW}
    fixed = {spec.name: spec.shape[0] for spec in specs if spec.name in by_row and isinstance(spec.shape[0], int)}
    for name, rows in fixed.items():
        if by_run and rows != 1:
            message = (
                f"{origin}: input {name!r} has a fixed first axis of {rows}, while other inputs are given one run a "
                "sample; give it one more axis in front too"
            )
            raise DataError(message)
    if by_run:
        return 1, True
    if fixed:
        return next(iter(fixed.values())), True
    largest = max(1, *(segment.sample_bytes for segment in segments))
    return max(1, min(_BATCH, _BATCH_BYTES // largest)), False
