"""Two ways of doing a thing, timed in turns: A B A B, so that what else the machine does falls on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

REPEATS = 5


def compared(theirs: Callable[[], None], ours: Callable[[], None], *, images: int, repeats: int = REPEATS) -> Any:
    """Return how many times faster ours is."""
    return _comparison(theirs, ours, images, repeats, lambda other, own: other / own)


def overhead(theirs: Callable[[], None], ours: Callable[[], None], *, images: int, repeats: int = REPEATS) -> Any:
    """Return how many times the other's time ours takes."""
    return _comparison(theirs, ours, images, repeats, lambda other, own: own / other)


def _comparison(
    theirs: Callable[[], None],
    ours: Callable[[], None],
    images: int,
    repeats: int,
    ratio: Callable[[float, float], float],
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for repeat in range(-1, repeats):
        for name, work in (("theirs", theirs), ("ours", ours)):
            (own,) = timed(work, 1)
            if repeat >= 0:
                seconds[name].append(own)
    ratios = [ratio(other, own) for other, own in zip(seconds["theirs"], seconds["ours"])]
    value = {
        "ratio": round(median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "seconds": {name: [round(own, 4) for own in values] for name, values in seconds.items()},
        "images_per_second": {name: round(images / median(values)) for name, values in seconds.items()},
    }
    print({key: value[key] for key in ("ratio", "low", "high", "images_per_second")}, flush=True)
    return value


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds
