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
    by_step,
    delivered,
    prunes,
    trained,
)
from fedunlearn.training.objectives.erase import Erasing

ERASE_SPACE: dict[str, tuple[float, ...]] = {
    "complement": (0.5, 1.0, 2.0),
    "separation": (0.0, 0.03, 0.1),
    "until": (0.3, 0.6, 1.0),
}


@dataclass(frozen=True)
class Erase(EraseStep, LocalSettings):
    """Settings: those of the erase step, and of the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # refuses what is out of range


def by_recipe(request: Request) -> Erase:
    """Return the erase step of the recipe as settings, for the control, which applies where there is one."""
    known = request.repair.training.objective
    assert isinstance(known, Erasing)  # a recipe has no other
    step: Erase = by_step(Erase(), known)
    return step


def erase_only(model: Classifier, fed: Federation, request: Request, settings: Erase | None) -> Outcome:
    """Train ``model`` as the repair does, from its own weights."""
    erased = trained(model, fed, request, settings or by_recipe(request), phase="erase_only")
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
