"""Searching for the boldest choice that the judge allows: what is measured first, and how far to go back."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from onnxcomp.passes import Context

__all__ = ["costliest_first", "expected_fewest", "fewest", "last_that_holds", "most_worth_ranking"]

Item = TypeVar("Item", int, str)
Option = TypeVar("Option")

MARGIN = 0.9
"""The share of the budget that is spent on the samples that choices are made on: others lose a little more."""

MOST_RANKED = 128
RANKING_SECONDS = 90.0
"""Layers whose error is measured one by one, and how long that may take; the others count as the median."""

RANKED_BYTES = 1 << 35
LEAST_RANKED = 8
"""Ranking an item writes and runs the whole model: of large models fewer are ranked, or the cost would grow with the
square of the size."""

LAST_STEP = 0.75
"""The part of all layers that is tried before the time for a choice is over."""

GROWTH = 1.5
"""Between one count of layers returned to float and the next that is tried."""

OUT_OF_TIME = "the time limit was reached before it was chosen"
BUDGET_USED = "the model as it is uses up the part of the budget that this may take"
"""Why weights are left alone that nothing was tried with."""


def most_worth_ranking(gains: Mapping[Item, float], context: Context) -> Iterator[Item]:
    """The items that gain most, best first, until there were many, or time is up.

    Args:
        gains: What each item gains (milliseconds, bytes).
        context: Its deadline counts; so does the time that ranking takes, where decisions may hang on the clock.
    """
    started = time.monotonic()
    clock = context.judge is not None and context.judge.timed
    size = context.judge.original_bytes if context.judge else 1
    most = min(MOST_RANKED, max(LEAST_RANKED, RANKED_BYTES // size))
    for item in sorted(gains, key=lambda item: gains[item], reverse=True)[:most]:
        if context.out_of_time() or (clock and time.monotonic() - started > RANKING_SECONDS):
            return
        yield item


def costliest_first(gains: Mapping[Item, float], errors: Mapping[Item, float]) -> list[Item]:
    """Order by squared error per gain, worst first; what was not measured counts as the median.

    Args:
        gains: What each item gains (milliseconds, bytes); positive.
        errors: The output error of each measured item alone.

    Example:
        >>> costliest_first({"a": 1.0, "b": 1.0, "c": 4.0}, {"a": 0.1, "b": 0.3, "c": 0.4})
        ['b', 'c', 'a']
    """
    costs = {item: error**2 / gains[item] for item, error in errors.items()}
    usual = statistics.median(costs.values()) if costs else 0.0
    return sorted(gains, key=lambda item: costs.get(item, usual), reverse=True)


def expected_fewest(errors: Sequence[float | None], excess: float) -> int:
    """How many items to give up for the error of the rest to fall: independent errors add up as squares.

    Args:
        errors: What each item costs alone, in the order in which they are given up; None where it was not measured,
            which counts as the median.
        excess: How many times too large the error of all of them is.

    Example:
        >>> expected_fewest([0.4, 0.2, None, 0.2], excess=1.5)
        1
        >>> expected_fewest([0.4, 0.2, None, 0.2], excess=2.0)
        3
        >>> expected_fewest([float("nan"), float("inf"), 0.2, 0.2], excess=1.0)
        2
    """
    known = [error for error in errors if error is not None and math.isfinite(error)]
    usual = statistics.median(known) if known else 1.0
    values = np.array([usual if error is None else error for error in errors])
    broken = int(np.count_nonzero(~np.isfinite(values)))  # goes in any case
    squares = np.square(np.where(np.isfinite(values), values, 0.0))
    left = squares.sum() - np.cumsum(squares)
    return min(len(errors), max(broken, 1 + int(np.count_nonzero(left > squares.sum() / excess**2))))


def fewest(most: int, holds: Callable[[int], bool], context: Context, *, expected: int = 1) -> int:
    """A small count from 1 to `most` with which something holds; with `most` it does.

    Counts are tried in growing steps until one holds, then by bisection down to the last that did not. A plain
    bisection would trust its first, large step: on few samples a loss does not fall evenly, and it would end at twice
    the layers that are needed. Where the count can be foreseen, the steps begin a little below it.

    When the time is over, the smallest count that was seen to hold. Steps grow as fast as they must to see a large one
    before that: else everything would be given up for want of time, which no time at all would not have cost.

    Example:
        >>> fewest(100, lambda count: count >= 7 and count != 8, Context())
        7
    """
    low, high = 0, max(1, int(expected / GROWTH))
    started, calls = time.monotonic(), 1
    while high < most and not holds(high):
        if context.out_of_time():
            return most
        growth = max(GROWTH, _growth_in_time(LAST_STEP * most / high, context, started, calls))
        low, high = high, max(high + 1, int(high * growth))
        calls += 1
    high = min(high, most)
    while high - low > 1 and not context.out_of_time():
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _growth_in_time(wanted: float, context: Context, started: float, calls: int) -> float:
    """The factor by which steps must grow to be `wanted` times as large with the calls that there is time for."""
    if context.deadline is None or wanted <= 1:
        return 1.0
    now = time.monotonic()
    left = (context.deadline - now) / max((now - started) / calls, 1e-9)
    return float(wanted ** (1 / max(1.0, left - 1)))


def last_that_holds(options: Sequence[Option], holds: Callable[[Option], bool], context: Context) -> Option | None:
    """The last of options, ordered from the most careful to the boldest, that holds: by bisection.

    On few samples a loss does not grow evenly: an option that fails may have been unlucky. So the search goes on behind
    it, and ends with two in a row.

    Args:
        options: They.
        holds: Whether an option is within the budget.
        context: Its deadline ends the search with the last that was found to hold.

    Returns:
        The option; None where none was found to hold.

    Example:
        >>> last_that_holds(range(10), lambda option: option < 7 and option != 4, Context())
        6
    """
    seen: dict[int, bool] = {}

    def tried(place: int) -> bool:
        if place not in seen:
            context.progress(f"choosing: option {place + 1} of {len(options)}")
            seen[place] = holds(options[place])
        return seen[place]

    low, high = -1, len(options)
    while high - low > 1 and not context.out_of_time():
        middle = (low + high) // 2
        low, high = (middle, high) if tried(middle) else (low, middle)
    place = low + 1
    while place < min(low + 3, len(options)) and not context.out_of_time():
        low = place if tried(place) else low
        place += 1
    return options[low] if low >= 0 else None
