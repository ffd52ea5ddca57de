"""The speed-up of a run: how many times less computing than retraining until that is as good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Speedup:
    """How many times less computing than retraining to the same R, over the retrained models of a run.

    Attributes:
        mean: over the models.
        lowest: of them.
        highest: of them.
        models: their number.
        late: how many never got there, so that all their rounds are counted: with any, ``mean`` is a lower bound.
    """

    mean: float
    lowest: float
    highest: float
    models: int
    late: int

    @property
    def bound(self) -> str:
        """The sign before ``mean``."""
        return "> " if self.late else ""

    @property
    def range(self) -> str:
        """From the lowest to the highest; empty of one model."""
        return f"{self.lowest:.1f} to {self.highest:.1f}" if self.models > 1 else ""

    @property
    def beside(self) -> str:
        """Which models it is the mean of, with the range."""
        if self.models == 1:
            return "beside one retrained model"
        return f"{self.range} beside each of {self.models} retrained models"


def to_equal_r(result: Mapping[str, Any]) -> Speedup | None:
    """Return the speed-up to equal R; None where the run has none."""
    if "speedup" not in result:
        return None
    found = retraining(result)
    ratios = [own["speedup"] for own in found]
    late = sum(not own["reached"] for own in found)
    return Speedup(fmean(ratios), min(ratios), max(ratios), len(ratios), late)


def retraining(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return of each retrained model its curve, what it took to equal R, whether it got there, and the speed-up."""
    found = result["retraining"]
    if isinstance(found, Mapping):
        return list(found.values())
    first = {key: result["cost"]["retrain"][key] for key in ("client_flops", "reached")}  # an older result has no more
    return [{"curve": found, "speedup": result["speedup"]["client_flops"], **first}]
