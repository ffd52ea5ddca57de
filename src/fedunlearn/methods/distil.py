"""DELETE: Y. Zhou et al., *Decoupled Distillation to Erase*, CVPR 2025."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained_once
from fedunlearn.training.objectives.distil import Distil


@dataclass(frozen=True)
class Delete(LocalSettings):
    """Settings: those of the one round, as the released code has them for CIFAR-10."""

    lr: float | None = 1e-3
    epochs: float | None = 20.0

    def objective(self) -> Distil:
        """Return what clients minimise."""
        return Distil()


def distil(model: Classifier, fed: Federation, request: Request, settings: Delete) -> Outcome:
    """Distil the original without the forgotten classes into the model, on their images alone, in one round."""
    erased = trained_once(model, fed, request, settings, objective=settings.objective(), phase="distil")
    return Outcome(delivered(erased, request), fed.cost("distil"))


DELETE = Method(
    "delete",
    "DELETE",
    "gradients on forgotten images",
    distil,
    settings=Delete(),
    space={"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "epochs": (5.0, 20.0)},
    source="Zhou et al., CVPR 2025",
)
