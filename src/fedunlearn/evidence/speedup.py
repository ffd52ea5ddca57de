"""The speed-up of a run: how many times less computing than retraining until that is as good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Speedup:
    """How many times less computing than retraining, over the retrained models of a run.

    Attributes:
        mean: to the same R on validation images, mean over the models.
        lowest: of them.
        highest: of them.
        models: their number.
        late: how many never had that R, so that all their rounds are counted: with any, ``mean`` is a lower bound.
        whole: with all rounds of each model, mean over the models.
    """

    mean: float
    lowest: float
    highest: float
    models: int
    late: int
    whole: float

    @property
    def bound(self) -> str:
        """The sign before ``mean``."""
        return "> " if self.late else ""

    @property
    def range(self) -> str:
        """From the lowest to the highest, which is a bound too where a model is late; empty where they are the same."""
        lowest, highest = f"{self.lowest:.1f}", f"{self.highest:.1f}"
        return "" if lowest == highest else f"{lowest} to {'more than ' if self.late else ''}{highest}"

    @property
    def beside(self) -> str:
        """Which models it is the mean of, with the range."""
        if self.models == 1:
            return "beside one retrained model"
        return f"{self.range} beside each of {self.models} retrained models".strip()

    @property
    def never(self) -> str:
        """Which models never had that R, as the begin of a sentence; empty where all had."""
        if not self.late:
            return ""
        if self.models == 1:
            return "Retraining was never"
        return f"{self.late} of {self.models} retrained models {'was' if self.late == 1 else 'were'} never"


def to_equal_r(result: Mapping[str, Any]) -> Speedup | None:
    """Return the speed-ups over all retrained models; None where the run has none."""
    if "speedup" not in result:
        return None
    found = list(result["retraining"].values())
    ratios = [oracle["speedup"] for oracle in found]
    late = sum(not oracle["reached"] for oracle in found)
    spent = result["cost"]["unlearn"]["client_flops"]
    whole = [oracle["curve"][-1][0] / spent for oracle in found]  # the last round is looked at
    return Speedup(fmean(ratios), min(ratios), max(ratios), len(ratios), late, fmean(whole))
