"""What an audit found: the verdict, the figures beside their bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedunlearn.audits.base import Found
from fedunlearn.audits.table import FIGURES
from fedunlearn.audits.verdict import Band
from fedunlearn.tabular import Tabular

CANDIDATE = "unlearned"  # the name of the model that is judged


@dataclass(frozen=True, eq=False)
class Findings(Tabular):
    """What an audit found.

    Attributes:
        bands: per figure, where one more retrained model is expected.
        models: what was measured of each model, ``unlearned`` the candidate.
        judgements: the verdict on the candidate and on each control, see ``judge``.
        held_out: the verdicts on each retrained model by the bands of the others, see ``leave_one_out``.
    """

    bands: Mapping[str, Band]
    models: Mapping[str, Found]
    judgements: Mapping[str, Mapping[str, Any]]
    held_out: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """The verdict on the candidate."""
        return str(self.judgements[CANDIDATE]["verdict"])

    def table(self) -> list[dict[str, Any]]:
        """Return a row per figure of the candidate: name, label, figure, both ends of its band, and where it lies."""
        rows = []
        for name, judged in self.judgements[CANDIDATE]["audits"].items():
            kind, band = FIGURES[name], {"low": None, "high": None}
            if judged["band"] is not None:
                low, high = judged["band"]
                band = {"low": max(low, 0.0), "high": min(high, kind.largest)}
            lies = judged["verdict"] or "no band"
            rows.append({"audit": name, "label": kind.label, "figure": judged["figure"], **band, "lies": lies})
        return rows

    def headline(self) -> str:
        """Return the verdict and why."""
        return f"{self.verdict}: {self.judgements[CANDIDATE]['reason']}"

    def cells(self) -> list[Sequence[str]]:
        """Return a row per figure in percent: figure, band, and where it lies."""
        rows = [
            (
                row["label"],
                *_shares(row),
                row["lies"],
            )
            for row in self.table()
        ]
        return [("audit", "figure, %", "retrained, %", ""), *rows]


def _shares(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return figure and band in percent; what is counted, as it is."""
    if FIGURES[row["audit"]].fixed is not None:
        return f"{row['figure']:g} found", ""
    band = "" if row["low"] is None else f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
    return f"{100 * row['figure']:.1f}", band
