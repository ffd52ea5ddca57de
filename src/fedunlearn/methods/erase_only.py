"""The erase step and the repair alone, nothing is pruned: a method, and the control that shows what pruning adds."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, prunes, trained
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.table import Objective

ERASE_SPACE: dict[str, tuple[float, ...]] = {
    "complement": (0.5, 1.0, 2.0),
    "separation": (0.0, 0.03, 0.1),
    "until": (0.3, 0.6, 1.0),
}


@dataclass(frozen=True)
class Erase(LocalSettings):
    """Settings of the erase step, see ``Erasing``."""

    complement: float = 1.0
    separation: float = 0.1
    share: float = 0.25
    until: float = 0.3
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # refuses what is out of range

    def objective(self) -> Objective:
        """Return what clients minimise."""
        return Erasing(self.complement, self.separation, self.share, self.until, self.every)


def erasing(settings: Erase | None, request: Request) -> Objective:
    """Return what clients minimise: by ``settings``, by the erase step of the recipe where None."""
    if settings is not None:
        return settings.objective()
    known = request.repair.training.objective
    assert known is not None  # the control applies where there is one
    return known


def erase_only(model: Classifier, fed: Federation, request: Request, settings: Erase | None) -> Outcome:
    """Train ``model`` as the repair does, from its own weights."""
    local, objective = settings or LocalSettings(), erasing(settings, request)
    erased = trained(model, fed, request, local, objective=objective, phase="erase_only")
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
