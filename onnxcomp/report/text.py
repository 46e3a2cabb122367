"""Numbers and names in words: what every form of the report shares."""

from __future__ import annotations

import math

__all__ = [
    "bytes_text",
    "count_text",
    "duration_text",
    "error_range",
    "error_text",
    "milliseconds",
    "percent",
    "printable",
    "shortened",
    "signed",
    "times",
]


def printable(text: object) -> str:
    r"""A text that cannot move the cursor, change colours or start a new line: what cannot be printed is escaped.

    Example:
        >>> printable("a\x1b[31mred\n")
        'a\\x1b[31mred\\n'
    """
    words = str(text)
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def shortened(name: str, length: int = 44) -> str:
    """A name cut at the front, where the names of a model are alike.

    Example:
        >>> shortened("/encoder/layer.0/attention/query/MatMul", 20)
        '...tion/query/MatMul'
    """
    return name if len(name) <= length else f"...{name[3 - length :]}"


def bytes_text(size: float) -> str:
    """A size in powers of 1000.

    Example:
        >>> bytes_text(714101), bytes_text(980)
        ('714 kB', '980 B')
    """
    return _scaled(size, (" B", " kB", " MB", " GB", " TB"))


def count_text(count: float) -> str:
    """A count, rounded to three digits.

    Example:
        >>> count_text(153466), count_text(10024288)
        ('153 k', '10.0 M')
    """
    return _scaled(count, ("", " k", " M", " G", " T"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    unit = 0
    while abs(value) >= 999.5 and unit < len(units) - 1:
        value /= 1000
        unit += 1
    digits = 0 if unit == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{units[unit]}"


def milliseconds(value: float) -> str:
    """A time in ms, to three digits."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}"


def duration_text(seconds: float) -> str:
    """A duration as people say it.

    Example:
        >>> duration_text(3.21), duration_text(75)
        ('3.2 s', '1 min 15 s')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def percent(share: float) -> str:
    """A share in percent; what is not nothing, or not all, does not read as such.

    Example:
        >>> percent(0.985), percent(1.0), percent(1e-6), percent(0.99999)
        ('98.5%', '100%', '<0.1%', '>99.9%')
    """
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}%"
    return "<0.1%" if 0 < value < 0.1 else ">99.9%" if 99.9 < value < 100 else f"{value:.1f}%"


def decibels_text(value: float) -> str:
    """Return a signal-to-noise ratio, such as ``24.0 dB``; "exact" for equal outputs, "no match" for lost ones.

    NaN may be either: JSON has no infinity, and what is read back from it does not tell.
    """
    if math.isnan(value):
        return "exact or no match"
    if math.isinf(value):
        return "exact" if value > 0 else "no match"
    return f"{value:.1f} dB"


def error_text(error: float) -> str:
    """A relative error in percent; what is not zero does not read as zero."""
    if error == 0:
        return "0"
    return "infinite" if not math.isfinite(error) else "below 0.01%" if error < 1e-4 else f"{error:.2%}"


def error_range(interval: tuple[float | None, float | None] | None) -> str:
    """The interval of a relative error; empty where it is not known (an infinite end is null in the JSON) or a point.

    Example:
        >>> error_range((0.01, 0.035)), error_range(None)
        ('1.00% to 3.50%', '')
    """
    low, high = interval or (None, None)
    return "" if low is None or high is None or low == high else f"{error_text(low)} to {error_text(high)}"


def times(ratio: float) -> str:
    """A ratio, original over new.

    Example:
        >>> times(3.554)
        '3.55x'
    """
    return f"{ratio:.2f}x" if math.isfinite(ratio) else "-"


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign; zero has none.

    Example:
        >>> signed(-0.00312), signed(0.0)
        ('-0.0031', '0')
    """
    text = f"{value:+.{digits}f}"
    return "0" if value == 0 else text
