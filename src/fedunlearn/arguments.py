"""Checks of what a user gives: numbers (Python's or NumPy's, never a string or a truth value), names, kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

_LONGEST = 60  # characters of a value in a message
_LONGEST_NAME = 150  # bytes: file systems end names at 255, with what is put before and after


def is_number(value: object) -> bool:
    """Return whether ``value`` is one finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object, least: int) -> bool:
    """Return whether ``value`` is one whole number of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_name(value: object) -> bool:
    """Return whether ``value`` is a name that stays in one line of a log, and in the folder of the file it names."""
    if not isinstance(value, str) or not value.isprintable() or not value.strip(". "):
        return False
    return not any(mark in value for mark in "/\\") and len(value.encode()) <= _LONGEST_NAME


def must_be(kind: type | tuple[type, ...], value: object, where: str, such: str, error: type[Exception]) -> None:
    """Raise ``error`` where ``value`` is no ``kind``, saying what was expected ``where``, ``such`` as it is made."""
    if not isinstance(value, kind):
        shown = repr(value) if isinstance(value, (str, int, float, tuple, type(None))) else ""  # others may fail
        short = 0 < len(shown) <= _LONGEST and "\n" not in shown
        got = shown if short else f"a value of type {type(value).__name__}"
        raise error(f"{where} must be {such}, got {got}")


def is_weight(value: Any) -> bool:
    """Return whether ``value`` is a number of at least 0."""
    return is_number(value) and bool(value >= 0)


def is_positive(value: Any) -> bool:
    """Return whether ``value`` is a number above 0."""
    return is_number(value) and bool(value > 0)


def or_none(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check that lets None pass beside what ``valid`` does."""
    return lambda value: value is None or valid(value)


def is_share(value: Any) -> bool:
    """Return whether ``value`` is a number above 0 and at most 1."""
    return is_number(value) and bool(0 < value <= 1)


def is_fraction(value: Any) -> bool:
    """Return whether ``value`` is a number of at least 0 and below 1."""
    return is_number(value) and bool(0 <= value < 1)


def is_part(value: Any) -> bool:
    """Return whether ``value`` is a number between 0 and 1, neither of them."""
    return is_number(value) and bool(0 < value < 1)


def is_count(value: Any) -> bool:
    """Return whether ``value`` is a whole number of at least 1."""
    return is_whole(value, 1)
