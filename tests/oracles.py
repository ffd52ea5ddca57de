"""Slow versions written from the paper, one loop per symbol."""

import math

from torch import Tensor


def tf_idf(a: Tensor, t: int, *, reference: str = "class", smoothing: float = 1.0) -> list[float]:
    """``a``: mean activations, shape ``(classes, channels)``."""
    classes, channels = a.shape
    total = sum(float(a[t, j]) for j in range(channels))
    scores = []
    for c in range(channels):
        count = 0
        for u in range(classes):
            if reference == "class":
                level = sum(float(a[u, j]) for j in range(channels)) / channels
            else:
                level = sum(float(a[v, c]) for v in range(classes)) / classes
            if float(a[u, c]) >= level:
                count += 1
        tf = float(a[t, c]) / total if total else 0.0
        scores.append(tf * math.log((smoothing + classes) / (1 + count)))
    return scores


def contrast(a: Tensor, t: int) -> list[float]:
    others = [u for u in range(len(a)) if u != t]
    return [_against(a, t, c, sum(float(a[u, c]) for u in others) / len(others)) for c in range(a.shape[1])]


def margin(a: Tensor, t: int) -> list[float]:
    others = [u for u in range(len(a)) if u != t]
    return [_against(a, t, c, max(float(a[u, c]) for u in others)) for c in range(a.shape[1])]


def _against(a: Tensor, t: int, c: int, m: float) -> float:
    own = float(a[t, c])
    return (own - m) / (own + m) if own + m else 0.0


def to_remove(scores: dict[str, list[float]], fraction: float) -> dict[str, list[int]]:
    """Per layer: the best-scored floor(fraction * channels), never one at 0 or below, never the last channel."""
    removed = {}
    for layer, values in scores.items():
        order = sorted(range(len(values)), key=lambda c: (-values[c], c))
        quota = min(math.floor(fraction * len(values)), len(values) - 1)
        removed[layer] = sorted(c for c in order[:quota] if values[c] > 0)
    return removed
