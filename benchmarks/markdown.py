"""Tables of the results pages, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean


def row_of(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def head_of(cells: Sequence[str]) -> list[str]:
    """Return the first two lines of a table."""
    return [row_of(cells), "|---" * len(cells) + "|"]


def spread(values: Sequence[float], factor: float = 1, *, unit: str = "", sign: str = "") -> str:
    """Return mean, lowest and highest with one decimal, one number where they are the same; nothing for a NaN or none.

    Example:
        >>> spread([0.1, 0.2], 100), spread([3, 3], unit="x"), spread([])
        ('15.0 (10.0 to 20.0)', '3.0x', '')
    """
    if not values or any(math.isnan(value) for value in values):
        return ""
    mean, low, high = (f"{factor * number:{sign}.1f}" for number in (fmean(values), min(values), max(values)))
    return f"{mean}{unit}" if mean == low == high else f"{mean}{unit} ({low} to {high})"
