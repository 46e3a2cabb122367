"""What is trained on: samples in a new order in each epoch, with inputs changed at random where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.data import Batch, Dataset
from onnxcomp.data.user_code import is_reference, load_function
from onnxcomp.errors import DataError, OptionError

__all__ = ["Augment", "Part", "Samples", "find_augment"]

Array = np.ndarray[Any, Any]
Inputs = dict[str, Array]
Augment = Callable[[Inputs, np.random.Generator], Inputs]

IMAGE_AXES = 4


@dataclass(frozen=True)
class Part:
    """What is run at once.

    Attributes:
        indices: Of its samples.
        batch: Inputs and labels.
        share: Of the samples of its step, times the count of processes, whose gradients are averaged.
    """

    indices: Array
    batch: Batch
    share: float


class Samples:
    """Steps of samples; the seed and the number of the epoch alone decide their order.

    Args:
        data: The samples.
        batch_size: In a step.
        accumulate: A step is run in this many parts.
        seed: Of the order.
        augment: What happens to inputs.
        rank: Which of several processes this is; each runs its share of every step.
        world: How many processes there are.

    Raises:
        DataError: There are fewer samples than processes.
        OptionError: A step has fewer samples than there are processes.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        augment: Augment | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < world:
            message = f"a step of {batch_size} samples cannot be divided among {world} processes; give larger batches"
            raise OptionError(message)
        self._data, self._seed, self._augment = data, seed, augment
        self._accumulate, self._rank, self._world = accumulate, rank, world
        self._groups = data.groups()
        self._size = batch_size
        self.steps = sum(self._count(group) for group in self._groups)
        """In an epoch."""
        if not self.steps:
            message = f"{data.description}: training needs at least as many samples as processes ({world})"
            raise DataError(message)

    def _count(self, group: Array) -> int:
        """Whole steps alone, where there are any: statistics of a rest are noisier."""
        whole = len(group) // self._size
        return whole or int(len(group) >= self._world)

    def epoch(self, number: int) -> Iterator[list[Part]]:
        """The steps of an epoch, each in parts."""
        generator = np.random.default_rng([self._seed, number])
        steps: list[Array] = []
        for group in self._groups:
            mixed = generator.permutation(group)
            steps += [mixed[index * self._size : (index + 1) * self._size] for index in range(self._count(group))]
        for place in generator.permutation(len(steps)):
            yield self._parts(steps[place], np.random.default_rng([self._seed, number, int(place), 1]))

    def _parts(self, indices: Array, generator: np.random.Generator) -> list[Part]:
        parts = []
        mine = np.array_split(indices, self._world)[self._rank]
        for chunk in np.array_split(mine, min(self._accumulate, len(mine))):
            first = 0
            for batch in self._data.subset(chunk).batches(len(chunk)):
                if self._augment is not None:
                    batch = Batch(self._augment(dict(batch.inputs), generator), batch.labels, batch.count)
                parts.append(Part(chunk[first : first + batch.count], batch, batch.count * self._world / len(indices)))
                first += batch.count
        return parts


def find_augment(text: str, *, allow_code: bool) -> Augment | None:
    """What `TrainOptions.augment` asks for.

    Raises:
        OptionError: It is not understood.

    Example:
        >>> find_augment("", allow_code=False) is None
        True
        >>> changed = find_augment("flip", allow_code=False)
        >>> image = np.arange(8.0).reshape(1, 1, 2, 4)
        >>> changed({"x": image}, np.random.default_rng(0))["x"].shape
        (1, 1, 2, 4)
    """
    if not text:
        return None
    if is_reference(text) and not text.startswith("shift:"):
        made: Augment = load_function(text, allow_code)
        return made
    shift, flip = 0, False
    for word in text.split(","):
        name, _, amount = word.strip().partition(":")
        if name == "flip" and not amount:
            flip = True
        elif name == "shift" and amount.isdecimal() and int(amount) > 0:
            shift = int(amount)
        else:
            message = f"augment must be shift:N, flip, both divided by a comma, or module:function, got {text!r}"
            raise OptionError(message)
    return lambda inputs, generator: {
        name: _moved(value, generator, shift, flip=flip) if value.ndim == IMAGE_AXES else value
        for name, value in inputs.items()
    }


def _moved(images: Array, generator: np.random.Generator, shift: int, *, flip: bool) -> Array:
    """Images (N, C, H, W) moved by up to `shift` pixels with zeros around them, half of them mirrored."""
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    top, left = generator.integers(0, 2 * shift + 1, (2, count, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    if flip:
        mirrored = generator.random((count, 1)) < 0.5
        columns = np.where(mirrored, columns[:, ::-1], columns)
    sample = np.arange(count)[:, None, None]
    taken = padded[sample, :, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(taken.transpose(0, 3, 1, 2))
