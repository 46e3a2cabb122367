"""Make inputs for a model where no data are given.

They serve to check structure and numerics: values are of a kind that the model can take, and say nothing about
its accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp.data.dataset import Dataset, Segment
from onnxcomp.data.fit import Feed, batchable
from onnxcomp.data.roles import Role, Roles
from onnxcomp.data.specs import Array, InputSpec, apply_shapes, feedable, input_specs
from onnxcomp.errors import ModelError, OptionError

if TYPE_CHECKING:
    import onnx

_TOTAL_BYTES = 256 << 20
_LARGEST_SAMPLE_BYTES = 4 << 30
_IMAGE_SIZE = 224
_IDS_LENGTH = 16
_AUDIO_SAMPLES = 16_000
_AXIS = 100
_IMAGE_CHANNELS = (1, 3, 4)
_BOUNDS = {"min": 1e-3, "max": 1e4}
"""Far apart, so that little is cut off, and positive, since a logarithm may be taken."""
_WORDS = ("the", "model", "is", "small", "and", "fast", "on", "a", "phone")


def generate(
    proto: onnx.ModelProto,
    *,
    count: int = 8,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    size: int | None = None,
) -> Dataset:
    """Return made-up samples that a model can take.

    What each input is follows from what the graph does with it, its type and shape, and its name: indices stay in
    the tables they index, masks are ones with some zeros at the end, images are smooth and in 0 to 1 (or 0 to 255),
    recurrent states are near 0, a sample rate is 16000, a speed or scale 1, a least and a largest value are far apart;
    other floats are normally distributed.

    Args:
        proto: The model; large weights may be stubs without data.
        count: The number of samples; fewer are made when they would take more than 256 MB.
        seed: The same seed gives the same samples.
        shapes: Sizes for dynamic axes, by input name. Axes without one get: 1 run a sample along the batch axis,
            what a weight implies, 224 for images, 16 for sequences of ids, 100 for others; equal for equal names.
        size: The size of dynamic axes that nothing implies, instead of 224, 16 or 100.

    Raises:
        OptionError: A shape does not fit the model, or `count` is below 1.
        ModelError: The model has no inputs, or some that arrays cannot feed.
    """
    if count < 1:
        message = f"count must be at least 1, got {count}"
        raise OptionError(message)
    specs = feedable(apply_shapes(input_specs(proto), shapes))
    if not specs:
        message = "the model has no inputs: there is nothing to generate"
        raise ModelError(message)
    roles = Roles(proto)
    known = {spec.name: roles.of(spec.name) for spec in specs}
    concrete, feeds = _sizes(specs, known, size)
    item_bytes = sum(spec.dtype.itemsize * int(np.prod(_sample_shape(spec, feeds), dtype=object)) for spec in concrete)
    if item_bytes > _LARGEST_SAMPLE_BYTES:
        message = f"one sample would take {item_bytes:,} bytes; give smaller shapes"
        raise OptionError(message)
    count = max(1, min(count, _TOTAL_BYTES // max(1, item_bytes)))
    arrays = {}
    for number, spec in enumerate(concrete):
        # One generator an input: values do not depend on what other inputs there are.
        rng = np.random.default_rng((seed, number))
        maker = _Maker(spec, specs[number], known[spec.name], _longest(spec.name, specs, concrete), rng)
        arrays[spec.name] = maker.values((count, *_sample_shape(spec, feeds)))
    return Dataset(specs, [Segment(feeds, arrays, None, count)], origin="generated", generated=True)


def _sample_shape(spec: InputSpec, feeds: Mapping[str, Feed]) -> tuple[int, ...]:
    sizes = tuple(dim for dim in spec.shape if isinstance(dim, int))
    return sizes[1:] if feeds[spec.name] is Feed.ROW else sizes


# Shapes


def _sizes(
    specs: Sequence[InputSpec], roles: Mapping[str, Role], wanted: int | None
) -> tuple[list[InputSpec], dict[str, Feed]]:
    """Settle every dynamic axis, and how each input is cut into samples."""
    batch_names = {spec.shape[0] for spec in specs if spec.rank >= 2 and isinstance(spec.shape[0], str)}
    feeds = {spec.name: Feed.ROW if _has_batch_axis(spec, batch_names, len(specs)) else Feed.RUN for spec in specs}
    if not batchable(specs):
        # No common sample axis: every sample is a whole feed. Only inputs of a dynamic batch may stay rows.
        feeds = {
            name: feed if spec.rank and spec.shape[0] in (None, 1, *batch_names) else Feed.RUN
            for (name, feed), spec in zip(feeds.items(), specs, strict=True)
        }
    elif Feed.RUN in feeds.values() and any(
        isinstance(spec.shape[0], int) and spec.shape[0] > 1 for spec in specs if spec.rank
    ):
        feeds = dict.fromkeys(feeds, Feed.RUN)
    known = dict.fromkeys(batch_names, 1)
    # Ids first: their sequence length is that of the masks and features beside them.
    for spec in sorted(specs, key=lambda spec: spec.dtype.kind not in "iu"):
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim not in known and not _terms(dim):
                known[dim] = _guess(spec, axis, roles[spec.name], wanted)
    return [
        replace(spec, shape=tuple(_size(spec, axis, roles, known, wanted) for axis in range(spec.rank)))
        for spec in specs
    ], feeds


def _has_batch_axis(spec: InputSpec, batch_names: Set[str], inputs: int) -> bool:
    if spec.rank >= 2:
        return True
    # Of one axis: a value a sample, such as lengths, unless nothing ties that axis to a batch.
    return spec.rank == 1 and (spec.shape[0] in batch_names or (not isinstance(spec.shape[0], str) and inputs > 1))


def _size(spec: InputSpec, axis: int, roles: Mapping[str, Role], known: Mapping[str, int], wanted: int | None) -> int:
    dim = spec.shape[axis]
    if isinstance(dim, int):
        return dim
    if dim is None:
        return 1 if axis == 0 and spec.rank >= 2 else _guess(spec, axis, roles[spec.name], wanted)
    if dim in known:
        return known[dim]
    return sum(int(term) if term.isdigit() else known.get(term, wanted or _IDS_LENGTH) for term in _terms(dim))


def _terms(dim: str) -> list[str]:
    """Return the terms of a sum such as "past_sequence_length + 1", which exporters write; else nothing."""
    if dim == "total_sequence_length":
        return ["past_sequence_length", "sequence_length"]
    terms = [term.strip() for term in dim.split("+")]
    return terms if len(terms) > 1 and all(re.fullmatch(r"\w+", term) for term in terms) else []


def _guess(spec: InputSpec, axis: int, role: Role, wanted: int | None) -> int:
    """Return a sensible size for a dynamic axis that is not the batch, or the one wanted where nothing implies one."""
    implied = role.dims.get(axis, role.dims.get(axis - spec.rank))
    if implied:
        return implied
    if spec.rank == 3 and axis == 1 and spec.dtype.kind == "f" and _is_state(spec, role):
        return 1  # (layers, batch, features)
    if _is_image(spec, role) and axis == (3 if spec.shape[3] in _IMAGE_CHANNELS else 1):
        return 3
    return wanted or _usual(spec, role)


def _usual(spec: InputSpec, role: Role) -> int:
    """Return the size of most axes of inputs of this kind."""
    if _is_image(spec, role):
        return _IMAGE_SIZE
    if spec.dtype.kind in "iub":
        return _IDS_LENGTH
    if spec.rank <= 2 and _named(spec, "audio", "wav", "waveform", "speech", "signal", "pcm"):
        return _AUDIO_SAMPLES
    return _AXIS if spec.rank <= 3 else _IDS_LENGTH


def _longest(name: str, specs: Sequence[InputSpec], concrete: Sequence[InputSpec]) -> int:
    """Return the largest size that sequence lengths can have: a dynamic axis of another input, or its second one."""
    others = [(spec, sized) for spec, sized in zip(specs, concrete, strict=True) if spec.name != name and spec.rank > 1]
    dynamic = [
        size
        for spec, sized in others
        for dim, size in zip(spec.shape[1:], sized.shape[1:], strict=True)
        if not isinstance(dim, int) and isinstance(size, int)
    ]
    second = [size for _, sized in others if isinstance(size := sized.shape[1], int)]
    return max(dynamic, default=second[0] if second else 1)


def _is_image(spec: InputSpec, role: Role) -> bool:
    """Whether an input has four axes, one of them color, and the others are large or unknown."""
    if (
        spec.dtype.kind not in "fu"
        or spec.rank != 4
        or role.rows is not None
        or role.state
        or _named(spec, "mask", "past", "cache")
    ):
        return False
    _, first, height, last = spec.shape
    channels_first = role.dims.get(1, first)
    sides = (height, last) if channels_first in _IMAGE_CHANNELS else (first, height)
    if channels_first not in _IMAGE_CHANNELS and last not in _IMAGE_CHANNELS:
        return not any(isinstance(dim, int) for dim in spec.shape[1:]) and role.dims.get(1, 3) == 3
    return all(not isinstance(side, int) or side >= 8 for side in sides)


def _is_state(spec: InputSpec, role: Role) -> bool:
    """Whether an input is the state of a recurrent model, handed from run to run."""
    if role.state:
        return True
    if _named(spec, "hidden_states", "past_key"):
        return False  # activations of a transformer: near 0 they would test little
    letter = re.search(r"(^|[^a-z])[hc]_?[0n]($|[^a-z0-9])", spec.name.lower())
    return letter is not None or _named(spec, "state", "hidden", "cache")


def _named(spec: InputSpec, *words: str) -> bool:
    return any(word in spec.name.lower() for word in words)


# Values


class _Maker:
    """Makes the values of one input."""

    def __init__(
        self, spec: InputSpec, original: InputSpec, role: Role, longest: int, rng: np.random.Generator
    ) -> None:
        self._spec = spec
        self._original = original
        self._role = role
        self._longest = longest
        self._rng = rng

    def values(self, shape: tuple[int, ...]) -> Array:
        """Return values for all samples, of the input's type."""
        if self._spec.dtype.kind == "O":
            return self._rng.choice(np.asarray(_WORDS), shape)
        return np.asarray(self._maker()(shape)).astype(self._spec.dtype)

    def _maker(self) -> Callable[[tuple[int, ...]], Array]:
        if self._is_mask():
            return self._mask
        if self._spec.dtype.kind == "b":
            return self._coin
        if self._spec.dtype.kind in "iu":
            return self._integer_maker()
        return self._float_maker()

    def _is_mask(self) -> bool:
        if self._role.rows is not None and not _named(self._spec, "mask"):
            return False
        if _named(self._spec, "mask"):
            return True
        return self._role.compared and self._spec.rank >= 2 and self._spec.dtype.kind in "iub"

    def _integer_maker(self) -> Callable[[tuple[int, ...]], Array]:
        spec, role = self._spec, self._role
        if self._is_rate():
            return lambda shape: np.full(shape, _AUDIO_SAMPLES)
        if _named(spec, "token_type", "segment"):
            return np.zeros
        if _named(spec, "position"):
            return self._positions
        if role.rows is not None:
            return self._indices
        if role.lengths or re.search(r"(^|[^a-z])(len|lens|lengths?)([^a-z]|$)", spec.name.lower()):
            return lambda shape: np.full(shape, self._longest)
        if role.sizes:
            return np.ones
        if _named(spec, "timestep"):
            return lambda shape: self._rng.integers(0, 1000, shape)
        if spec.dtype.kind == "u" and spec.dtype.itemsize == 1:
            if _is_image(self._original, role):
                return lambda shape: np.rint(255 * self._image(shape))
            return lambda shape: self._rng.integers(0, 256, shape)
        return lambda shape: self._rng.integers(0, 10, shape)

    def _float_maker(self) -> Callable[[tuple[int, ...]], Array]:
        spec, role = self._spec, self._role
        if self._is_rate():
            return lambda shape: np.full(shape, float(_AUDIO_SAMPLES))
        if role.rows is not None:
            return self._indices
        if _is_state(spec, role):
            return self._state
        if _named(spec, "timestep"):
            return lambda shape: self._rng.integers(0, 1000, shape)
        if _is_image(self._original, role):
            return self._image
        if spec.rank <= 1 and re.search(r"(^|[^a-z])(scales?|speed|temperature)([^a-z]|$)", spec.name.lower()):
            return np.ones  # a factor that a user sets: 1 changes nothing
        bound = re.search(r"(^|[^a-z])f?(min|max)(imum)?([^a-z]|$)", spec.name.lower()) if spec.rank <= 1 else None
        if bound:  # as of a frequency: at random, both may cut everything off, and no output moves
            return lambda shape: np.full(shape, _BOUNDS[bound[2]])
        if role.positive:
            return lambda shape: 0.1 + np.abs(self._rng.standard_normal(shape))
        return self._rng.standard_normal

    def _is_rate(self) -> bool:
        single = all(size == 1 for size in self._spec.shape)
        return single and (self._spec.name.lower() == "sr" or _named(self._spec, "sample_rate", "sampling_rate"))

    def _indices(self, shape: tuple[int, ...]) -> Array:
        return self._rng.integers(0, self._role.rows or 1, shape)

    def _coin(self, shape: tuple[int, ...]) -> Array:
        return self._rng.integers(0, 2, shape)

    def _mask(self, shape: tuple[int, ...]) -> Array:
        """Ones with zeros in the last quarter of every second sample; all zeros where it is added as it is."""
        if self._spec.dtype.kind == "f" and self._role.added and not self._role.compared:
            return np.zeros(shape)
        mask = np.ones(shape)
        if len(shape) == 1:
            return mask
        length = shape[-1]
        for sample in range(1, len(mask), 2):
            tail = int(self._rng.integers(0, length // 4 + 1))
            mask[sample, ..., length - tail :] = 0
        if self._role.rows is not None:
            mask = np.minimum(mask, self._role.rows - 1)
        return mask

    def _positions(self, shape: tuple[int, ...]) -> Array:
        steps = np.arange(shape[-1] if len(shape) > 1 else 1)
        if self._role.rows is not None:
            steps = np.minimum(steps, self._role.rows - 1)
        return np.broadcast_to(steps if len(shape) > 1 else steps[0], shape)

    def _state(self, shape: tuple[int, ...]) -> Array:
        state = 0.1 * self._rng.standard_normal(shape)
        state[0] = 0
        return state

    def _image(self, shape: tuple[int, ...]) -> Array:
        """Return smooth noise, in 0 to 1 with a mean of one half: a coarse and a fine grid, interpolated."""
        first = self._spec.shape[3] not in _IMAGE_CHANNELS or self._spec.shape[1] in _IMAGE_CHANNELS
        batch = shape[:-3]
        channels, height, width = shape[-3:] if first else (shape[-1], *shape[-3:-1])
        total = np.zeros((*batch, channels, height, width))
        for cells, weight in ((4, 0.2), (16, 0.08)):
            rows, columns = (min(cells, size) for size in (height, width))
            coarse = self._rng.standard_normal((*batch, channels, rows, columns))
            total += weight * (_stretch(rows, height) @ coarse @ _stretch(columns, width).T)
        total = np.clip(0.5 + total, 0, 1)
        return total if first else np.moveaxis(total, -3, -1)


def _stretch(cells: int, size: int) -> Array:
    """Return a matrix (size, cells) that interpolates linearly."""
    at = np.linspace(0, cells - 1, size)
    weights: Array = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells)))
    return weights
