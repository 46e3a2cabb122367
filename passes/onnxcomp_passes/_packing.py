"""The ways to hold a weight that ONNX Runtime decodes at load, and which of them is the smallest.

A weight is a background (its most frequent value, mostly 0) and the values that differ from it. Where those are is told
by gaps of 8 or 4 bits or by a mask of a bit an element, or every element has a place of its own; what they are, by the
values themselves or by codes of 1, 2, 4 or 8 bits into a codebook.

Gaps and codebooks: Han et al. 2016, "Deep Compression", arXiv 1510.00149, sections 2 and 3. A gap that is too wide is
bridged by an entry that writes the background.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CODE_BITS", "Contents", "Layout", "contents", "gaps", "layouts", "pack_bits"]

Array = np.ndarray[Any, Any]

CODE_BITS = (1, 2, 4, 8)
"""Widths that divide a byte, so that two nodes unpack them."""

MAX_VALUES = 256
"""Values of a codebook."""

COUNTED = 1 << 22
"""Bytes that are counted at a time: counting makes 8 bytes of each."""

SAMPLE = 1 << 14
"""Elements by which a weight of all different values is told without sorting it."""


@dataclass(frozen=True)
class Layout:
    """A way to hold a weight.

    Attributes:
        places: "every", "gaps8", "gaps4" or "mask".
        bits: Of a code into the codebook; 0: the values as they are.
        nbytes: What codes, places and codebook take.
    """

    places: str
    bits: int
    nbytes: int

    @property
    def told(self) -> str:
        """The layout in words."""
        what = f"{self.bits}-bit codes" if self.bits else "values"
        where = {"every": "", "mask": " and a mask", "gaps8": " and 8-bit gaps", "gaps4": " and 4-bit gaps"}
        return what + where[self.places]


@dataclass(frozen=True)
class Contents:
    """What a weight holds, its elements seen as unsigned integers of their bits: -0.0 and NaN are values like others.

    Attributes:
        raw: The elements, shape (elements,), uint8, uint16 or uint32.
        background: The most frequent value, or 0 where there are too many to tell.
        others: Places of all that differs from the background, int64.
        book: The different values, the background first; None where there are more than 256.
    """

    raw: Array
    background: int
    others: Array
    book: Array | None


def contents(value: Array) -> Contents | None:
    """Look into a weight.

    Args:
        value: Any shape; items of 1, 2 or 4 bytes.

    Returns:
        What it holds; None where it has neither few values nor enough equal ones to pay for a mask.

    Example:
        >>> found = contents(np.array([[0.0, 2.0], [0.0, 1.0]], np.float32))
        >>> found.others.tolist(), len(found.book)
        ([1, 3], 3)
    """
    raw = np.ascontiguousarray(value).reshape(-1).view(f"u{value.dtype.itemsize}")
    distinct, counts = _distinct(raw)
    background = 0 if distinct is None else int(distinct[np.argmax(counts)])
    book = None
    if distinct is not None and distinct.size <= MAX_VALUES:
        book = np.concatenate([[background], distinct[distinct != background]]).astype(raw.dtype)
    has_codes = book is not None and code_bits(book.size) < 8 * raw.itemsize
    if not has_codes and 8 * raw.itemsize * (raw.size - np.count_nonzero(raw != background)) <= raw.size:
        return None  # before the places are listed, which takes twice the memory of the weight
    return Contents(raw, background, np.flatnonzero(raw != background), book)


def _distinct(raw: Array) -> tuple[Array | None, Array]:
    """The different values and how many there are of each; None where a sample shows that they are too many."""
    if raw.itemsize == 1:
        parts = (raw[start : start + COUNTED] for start in range(0, raw.size, COUNTED))
        counts = np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)
        found = np.flatnonzero(counts)
        return found.astype(raw.dtype), counts[found]
    sample = np.unique(raw[:: max(1, raw.size // SAMPLE)])
    if sample.size > 4 * MAX_VALUES:
        return None, np.zeros(0)
    return np.unique(raw, return_counts=True)


def code_bits(values: int) -> int:
    """The bits of a code into a codebook of so many values."""
    return next(bits for bits in CODE_BITS if values <= 1 << bits)


def layouts(found: Contents) -> Iterator[Layout]:
    """Every way to hold a weight, with its bytes."""
    item, count, others = found.raw.itemsize, found.raw.size, found.others.size
    options: list[tuple[int, int]] = [(0, 8 * item)]  # bits of a code, bits of a value in the file
    book = 0
    if found.book is not None and code_bits(found.book.size) < 8 * item:
        bits, book = code_bits(found.book.size), found.book.size * item
        options.append((bits, bits))
    entries = {f"gaps{bits}": max(1, others + _bridges(found.others, bits)) for bits in (8, 4)}
    for bits, width in options:
        extra = book if bits else 0
        if bits:
            yield Layout("every", bits, -(-count * width // 8) + extra)
        yield Layout("mask", bits, -(-count // 8) + -(-(others + 1) * width // 8) + extra)
        for gap in (8, 4):
            held = entries[f"gaps{gap}"]
            yield Layout(f"gaps{gap}", bits, -(-held * (gap + width) // 8) + extra)


def _bridges(places: Array, bits: int) -> int:
    """How many entries bridge gaps that are too wide."""
    if not places.size:
        return 0
    widest = (1 << bits) - 1
    steps = np.diff(places, prepend=0)
    return int(np.sum(np.maximum(0, (steps - 1) // widest)))


def gaps(places: Array, bits: int) -> tuple[Array, Array]:
    """Steps from one entry to the next, the first from 0, each within the bits.

    Args:
        places: Rising, int64.
        bits: Of a gap.

    Returns:
        The gaps, uint8, and for each of them the index into `places`, or -1 for an entry that is only a bridge.

    Example:
        >>> gaps(np.array([3, 20]), 4)
        (array([ 3, 15,  2], dtype=uint8), array([ 0, -1,  1]))
    """
    if not places.size:
        return np.zeros(1, np.uint8), np.full(1, -1)  # nodes take no empty lists
    widest = (1 << bits) - 1
    steps = np.diff(places, prepend=0)
    bridges = np.maximum(0, (steps - 1) // widest)
    ends = np.cumsum(bridges + 1) - 1
    found = np.full(places.size + int(bridges.sum()), widest, np.int64)
    found[ends] = steps - bridges * widest
    index = np.full(found.size, -1, np.int64)
    index[ends] = np.arange(places.size)
    return found.astype(np.uint8), index


def pack_bits(codes: Array, bits: int) -> Array:
    """Put codes into bytes, the first in the lowest bits; padded with zeros.

    Args:
        codes: uint8, shape (n,), each below 2**bits.
        bits: 1, 2, 4 or 8.

    Example:
        >>> pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist()
        [33, 3]
    """
    if bits == 8:
        return codes
    each = 8 // bits
    padded = np.zeros(math.ceil(codes.size / each) * each, np.uint8)
    padded[: codes.size] = codes
    shifted = padded.reshape(-1, each) << (bits * np.arange(each, dtype=np.uint8))
    return np.asarray(np.bitwise_or.reduce(shifted, axis=1))
