"""The settings that ``compare --tune`` tries for a method, and how it tells which are best."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from fedunlearn.methods.base import Method
from fedunlearn.seeding import generator


def made(method: Method, values: Mapping[str, Any]) -> Any:
    """Return the settings of ``method`` with ``values`` in the place of those that were published."""
    return replace(method.settings, **values)


def count(method: Method) -> int:
    """Return how many settings there are to try."""
    return 1 + len(_others(method))


def tried(method: Method, number: int) -> list[dict[str, Any]]:
    """Return ``number`` settings: the published ones, then others of the space without return, the same each time."""
    others = _others(method)
    order = torch.randperm(len(others), generator=generator(0, "tune", method.name)).tolist()
    return [asdict(method.settings), *(others[k] for k in order)][:number]


def score(u: float, r: float, wanted: float) -> float:
    """Return ``U + max(0, wanted - R)`` on validation images, ``wanted`` the R of retrained models: 0 is best."""
    return u + max(0.0, wanted - r)


def _others(method: Method) -> list[dict[str, Any]]:
    published = asdict(method.settings)
    combined = [published | dict(zip(method.space, choice)) for choice in itertools.product(*method.space.values())]
    return [values for values in combined if values != published]
