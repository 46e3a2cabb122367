"""Labels, what ties them, and how axes are matched through a reshape."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp_passes._channels_labels import Labels, components
from onnxcomp_passes._channels_shapes import runs

EDGES = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30)
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(edges=EDGES)
def test_components_are_what_a_walk_from_node_to_node_finds(edges: list[tuple[int, int]]):
    left, right = (np.array([edge[side] for edge in edges], np.int64) for side in (0, 1))

    found = components(np.arange(20), left, right)

    expected = list(range(20))
    for _ in range(20):
        for one, other in edges:
            expected[one] = expected[other] = min(expected[one], expected[other])
    assert found.tolist() == expected


@given(first=EDGES, second=EDGES)
def test_it_does_not_matter_when_classes_are_asked_for(first: list[tuple[int, int]], second: list[tuple[int, int]]):
    asked, silent = Labels(), Labels()
    for labels in (asked, silent):
        entries = labels.fresh(20)
        for part in (first, second):
            for one, other in part:
                labels.unify(entries[one], entries[other])
            if labels is asked:
                labels.classes()

    assert asked.classes().tolist() == silent.classes().tolist()


def test_a_grid_is_cut_along_the_axis_with_most_units():
    labels = Labels()
    grid = labels.fresh(6).reshape(2, 3)
    labels.grid(grid)

    labels.settle()

    assert labels.classes()[grid].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_grid_is_cut_along_the_axis_on_which_units_can_go():
    labels = Labels()
    grid = labels.fresh(6).reshape(2, 3)
    labels.grid(grid)
    labels.pin(grid[0], "stays")  # which is in each column

    labels.settle()

    assert labels.classes()[grid].tolist() == [[0, 0, 0], [3, 3, 3]]
    assert labels.reasons() == {0: "stays"}


def test_the_first_reason_counts_for_all_that_is_tied():
    labels = Labels()
    entries = labels.fresh(3)
    labels.pin(entries[2:], "first")
    labels.pin(entries[:1], "second")
    labels.unify(entries[0], entries[2])

    assert labels.reasons() == {0: "first"}


@given(shape=SHAPES, data=st.data())
def test_runs_of_axes_hold_the_same_elements(shape: list[int], data: st.DataObject):
    """The places of an element on the axes of a run tell its places on the axes that the run becomes."""
    size = math.prod(shape)
    other: list[int] = []
    while size > 1:
        other.append(data.draw(st.sampled_from([part for part in range(2, size + 1) if size % part == 0])))
        size //= other[-1]
    other = other or [1]

    found = runs(shape, other)

    numbers = np.arange(math.prod(shape))
    before, after = np.unravel_index(numbers, shape), np.unravel_index(numbers, other)
    left = {axis for olds, _ in found for axis in olds}
    assert all(shape[axis] == 1 for axis in set(range(len(shape))) - left)
    for olds, news in found:
        one = np.ravel_multi_index([before[axis] for axis in olds], [shape[axis] for axis in olds])
        two = np.ravel_multi_index([after[axis] for axis in news], [other[axis] for axis in news])
        assert np.array_equal(one, two)


def test_unknown_dimensions_match_by_name_only():
    assert runs(["N", 4, "H", "W"], ["N", 4, "K"]) == [([0], [0]), ([1], [1])]
    assert runs(["N", "T", 12], ["M", 12]) == [([2], [1])]
