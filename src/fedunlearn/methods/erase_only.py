"""The erase step and the repair alone, nothing is pruned: a method, and the control that shows what pruning adds."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import (
    EraseStep,
    LocalSettings,
    Method,
    Outcome,
    Request,
    delivered,
    prunes,
    trained,
)

ERASE_SPACE: dict[str, tuple[float, ...]] = {
    "complement": (0.5, 1.0, 2.0),
    "separation": (0.0, 0.03, 0.1),
    "until": (0.3, 0.6, 1.0),
}


@dataclass(frozen=True)
class Erase(EraseStep, LocalSettings):
    """Settings: those of the erase step, and of the training."""


def erase_only(model: Classifier, fed: Federation, request: Request, settings: Erase) -> Outcome:
    """Train ``model`` as the repair does, from its own weights."""
    erased = trained(model, fed, request, settings, phase="erase_only")
    return Outcome(delivered(erased, request), fed.cost("erase_only"))


ERASE_ONLY = Method(
    "erase_only",
    "erase step, nothing pruned",
    "gradients on images of all classes",
    erase_only,
    applies=lambda request: request.repair.training.objective is not None and prunes(request),
    settings=Erase(),
    space={"lr": (0.01, 0.02, 0.05), **ERASE_SPACE},
    erases=True,
)
