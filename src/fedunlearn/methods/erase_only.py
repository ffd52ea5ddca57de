"""The erase step and the repair alone, nothing is pruned: a method, and the control that shows what pruning adds."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Local, Method, Outcome, Request, delivered, prunes, trained
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.table import Objective

ERASE_SPACE: dict[str, tuple[float, ...]] = {
    "complement": (0.5, 1.0, 2.0),
    "separation": (0.0, 0.03, 0.1),
    "until": (0.3, 0.6, 1.0),
}


@dataclass(frozen=True)
class Erase(Local):
    """Settings: those of the recipe's erase step where None, else a complement of 1, a separation of .1, until .3."""

    complement: float | None = None
    separation: float | None = None
    until: float | None = None

    def objective(self, request: Request) -> Objective:
        """Return what clients minimise."""
        known = request.repair.training.objective
        base = known if isinstance(known, Erasing) else Erasing(1.0, 0.1, until=0.3)
        return Erasing(
            base.complement if self.complement is None else self.complement,
            base.separation if self.separation is None else self.separation,
            base.share,
            base.until if self.until is None else self.until,
        )


def erase_only(model: Classifier, fed: Federation, request: Request, settings: Erase) -> Outcome:
    """Train ``model`` as the repair does, from its own weights."""
    erased = trained(model, fed, request, settings, objective=settings.objective(request), phase="erase_only")
    return Outcome(delivered(erased, request), fed.cost("erase_only"))


ERASE_ONLY = Method(
    "erase_only",
    "erase step, nothing pruned",
    "gradients on images of all classes",
    erase_only,
    applies=lambda request: request.repair.training.objective is not None and prunes(request),
    settings=Erase(),
    space={"lr": (0.01, 0.02, 0.05), **ERASE_SPACE},
)
