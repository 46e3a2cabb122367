"""Labels for the entries of tensor axes: which must go together, which must stay.

Each output channel of a weight gets a label, and operators carry labels from axis to axis. What an operator ties
together is unified; what cannot go is pinned. In the end labels that are tied form one class.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Labels", "components", "varying_axes"]

Array = np.ndarray[Any, Any]


def components(parent: Array, left: Array, right: Array) -> Array:
    """Connected components, by hooking larger roots to smaller ones and halving paths (Shiloach & Vishkin 1982).

    Args:
        parent: The components so far: each node's smallest member, int64 of shape (nodes,).
        left: Nodes at one end of each edge.
        right: Nodes at the other end.

    Returns:
        The smallest member of each node's component.

    Example:
        >>> components(np.arange(5), np.array([0, 3]), np.array([3, 4])).tolist()
        [0, 1, 2, 0, 0]
    """
    parent = parent.copy()
    while True:
        one, other = parent[left], parent[right]
        apart = one != other
        if not apart.any():
            return parent
        left, right, one, other = left[apart], right[apart], one[apart], other[apart]
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(shorter := parent[parent], parent):
            parent = shorter


def varying_axes(array: Array) -> list[int]:
    """The axes along which an array is not constant.

    Example:
        >>> varying_axes(np.array([[1, 1], [2, 2]]))
        [0]
    """
    return [axis for axis in range(array.ndim) if (array != array.take([0], axis)).any()]


class Labels:
    """Labels, what is known to belong together, and what must stay."""

    def __init__(self) -> None:
        self._count = 0
        self._edges: list[tuple[Array, Array]] = []
        self._parent = np.zeros(0, np.int64)
        self._pins: list[tuple[Array, str]] = []
        self._grids: dict[int, Array] = {}

    def fresh(self, count: int) -> Array:
        """New labels, int64 of shape (count,)."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def unify(self, one: Array, other: Array) -> None:
        """Tie entries of two arrays, of shapes that broadcast."""
        left, right = np.broadcast_arrays(one, other)
        self._edges.append((left.ravel(), right.ravel()))

    def unify_along(self, labels: Array, axis: int) -> Array:
        """Tie all entries along an axis; returns the labels without that axis."""
        self.unify(labels.take([0], axis), labels)
        return np.asarray(labels.take(0, axis))

    def pin(self, labels: Array, reason: str) -> None:
        """These entries must stay."""
        if labels.size:
            self._pins.append((labels.ravel(), reason))

    def grid(self, labels: Array) -> None:
        """Whatever goes must leave a grid: in the end the classes of this array vary along one axis at most."""
        self._grids[id(labels)] = labels

    def settle(self) -> None:
        """Tie what grids demand: each varies along the axis that leaves most classes which can go."""
        settled = False
        while not settled:
            settled = True
            for grid in self._grids.values():
                classes = self.classes()[grid]
                varying = varying_axes(classes)
                if len(varying) < 2:
                    continue
                settled = False
                best = max(varying, key=lambda axis: self._units_along(classes, axis))
                rows = np.moveaxis(grid, best, 0).reshape(grid.shape[best], -1)
                self.unify(rows[:, :1], rows)

    def _units_along(self, classes: Array, axis: int) -> int:
        """How many classes would be left that can go, were all entries tied that share a place on this axis."""
        rows = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
        names, places = np.unique(rows, return_inverse=True)
        count = rows.shape[0]
        owner = np.repeat(np.arange(count), rows.shape[1])
        roots = components(np.arange(count + names.size), owner, count + places.ravel())
        pinned = roots[count + np.flatnonzero(np.isin(names, self.pinned_classes()))]
        return int(np.setdiff1d(roots[:count], pinned).size)

    def classes(self) -> Array:
        """The class of each label so far, by its smallest member: int64 of shape (labels,)."""
        parent = self._parent
        if parent.size < self._count:
            parent = np.concatenate([parent, np.arange(parent.size, self._count)])
        if self._edges:
            left, right = (np.concatenate(side) for side in zip(*self._edges, strict=True))
            parent, self._edges = components(parent, left, right), []
        self._parent = parent
        return parent

    def pinned_classes(self) -> Array:
        """The classes that must stay."""
        if not self._pins:
            return np.zeros(0, np.int64)
        return np.unique(self.classes()[np.concatenate([labels for labels, _ in self._pins])])

    def reasons(self) -> dict[int, str]:
        """Class that must stay -> the first reason given for it."""
        classes = self.classes()
        found: dict[int, str] = {}
        for labels, reason in reversed(self._pins):
            found.update(dict.fromkeys(classes[np.unique(labels)].tolist(), reason))
        return found
