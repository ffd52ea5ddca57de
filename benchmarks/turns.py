"""Two ways of doing a thing, timed in turns: A B A B, so that what else the machine does falls on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

REPEATS = 5


def compared(
    name: str, theirs: Callable[[], None], ours: Callable[[], None], *, images: int, repeats: int = REPEATS
) -> dict[str, Any]:
    """Return how many times faster ours is, and print it under ``name``."""
    return _comparison(name, theirs, ours, images, repeats, lambda other, ours_took: other / ours_took)


def overhead(
    name: str, theirs: Callable[[], None], ours: Callable[[], None], *, images: int, repeats: int = REPEATS
) -> dict[str, Any]:
    """Return how many times the other's time ours takes, and print it under ``name``."""
    return _comparison(name, theirs, ours, images, repeats, lambda other, ours_took: ours_took / other)


def _comparison(
    name: str,
    theirs: Callable[[], None],
    ours: Callable[[], None],
    images: int,
    repeats: int,
    ratio: Callable[[float, float], float],
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for repeat in range(-1, repeats):
        for who, work in (("theirs", theirs), ("ours", ours)):
            (took,) = timed(work, 1)
            if repeat >= 0:
                seconds[who].append(took)
    ratios = [ratio(other, took) for other, took in zip(seconds["theirs"], seconds["ours"])]
    value: dict[str, Any] = {
        "ratio": round(median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "seconds": {who: [round(second, 4) for second in values] for who, values in seconds.items()},
        "images_per_second": {who: round(images / median(values)) for who, values in seconds.items()},
    }
    rates = ", ".join(f"{who} {rate} images/s" for who, rate in value["images_per_second"].items())
    print(f"{name}: {value['ratio']} ({value['low']} to {value['high']}); {rates}", flush=True)
    return value


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds
