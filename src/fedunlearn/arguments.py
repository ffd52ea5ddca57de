"""Checks of what a user gives: numbers (Python's or NumPy's, never a string or a truth value), names, kinds."""

from __future__ import annotations

import math
from numbers import Integral, Real

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
