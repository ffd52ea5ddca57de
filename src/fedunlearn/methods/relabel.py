"""Relabelling by the likeliest other class, the first part of FUCRT (ICCV 2025, federated)."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained
from fedunlearn.training.objectives.relabel import Relabel


@dataclass(frozen=True)
class Relabelling(LocalSettings):
    """Settings: those of the rounds."""

    def objective(self) -> Relabel:
        """Return what clients minimise."""
        return Relabel("likeliest")


def relabel(model: Classifier, fed: Federation, request: Request, settings: Relabelling) -> Outcome:
    """Train on all images, those to forget under the label of the class that the model then holds likeliest."""
    moved = trained(model, fed, request, settings, phase="relabel")
    return Outcome(delivered(moved, request), fed.cost("relabel"))


RELABEL = Method(
    "relabel",
    "FUCRT relabelling",
    "gradients on images of all classes",
    relabel,
    settings=Relabelling(),
    space={"lr": (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)},
    source="FUCRT, ICCV 2025",
)
