"""Values as people write them: shares, durations. Light: the command line's help needs nothing heavier."""

from __future__ import annotations

import math
import re

from onnxcomp.errors import OptionError

__all__ = ["parse_duration", "parse_share"]

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_share(text: str) -> float:
    """Read points of a metric, or a share: "0.5%" or "0.005".

    Raises:
        OptionError: It is neither, or negative.

    Example:
        >>> parse_share("0.5%"), parse_share("0.005")
        (0.005, 0.005)
    """
    match = re.fullmatch(r"\s*\+?((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else math.inf
    if not math.isfinite(share):
        message = f"expected a share of at least 0, such as 0.5% or 0.005, got {text!r}"
        raise OptionError(message)
    return share


def parse_duration(text: str) -> float:
    """Read a duration such as "90s", "10m" or "1h30m"; a number alone is seconds.

    Returns:
        Seconds, above 0.

    Raises:
        OptionError: It is no duration.

    Example:
        >>> parse_duration("10m"), parse_duration("1h30m"), parse_duration("45")
        (600.0, 5400.0, 45.0)
    """
    parts = re.findall(r"(\d+\.?\d*|\.\d+)\s*(min|[smh]?)\s*", text.strip())
    whole = "".join(f"{number}{unit}" for number, unit in parts)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    bare = [unit for _, unit in parts].count("") and len(parts) > 1
    if not parts or bare or whole != re.sub(r"\s", "", text) or not 0 < seconds < math.inf:
        message = f"expected a time such as 90s, 10m or 1h, got {text!r}"
        raise OptionError(message)
    return seconds
