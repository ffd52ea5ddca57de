"""The audits, a row each.

The order is that of the figures in result.json and in the report. The verifier keeps a table of its own, so that it
need not trust this one.
"""

from __future__ import annotations

from fedunlearn.audits import (
    accuracy,
    artefacts,
    linear_probe,
    membership,
    neighbours,
    prototypes,
    reestimation,
    relearn,
    representation,
    rounding,
)
from fedunlearn.audits.base import Audit, FigureKind

AUDITS: tuple[Audit, ...] = (
    accuracy.AUDIT,
    reestimation.AUDIT,
    linear_probe.AUDIT,
    prototypes.AUDIT,
    relearn.AUDIT,
    rounding.AUDIT,
    membership.AUDIT,
    neighbours.AUDIT,
    representation.AUDIT,
    artefacts.AUDIT,
)

FIGURES: dict[str, FigureKind] = {name: kind for audit in AUDITS for name, kind in audit.figures.items()}
