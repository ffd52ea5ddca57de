"""NegGrad+: M. Kurmanji et al., *Towards Unbounded Machine Unlearning*, NeurIPS 2023."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained
from fedunlearn.training.objectives.ascend import Ascend


@dataclass(frozen=True)
class NegGrad(LocalSettings):
    """Settings: ``kept`` is the weight ``b`` of the images that stay.

    Those of the released code for small networks on CIFAR-10; for a VGG it has .9999, 1e-4 and 5 epochs.
    """

    lr: float | None = 0.01
    epochs: float | None = 10.0
    kept: float = 0.95

    def objective(self) -> Ascend:
        """Return what clients minimise."""
        return Ascend(self.kept)


def neg_grad(model: Classifier, fed: Federation, request: Request, settings: NegGrad) -> Outcome:
    """Minimise ``b CE(kept) - (1 - b) CE(forgotten)``."""
    moved = trained(model, fed, request, settings, phase="neg_grad")
    return Outcome(delivered(moved, request), fed.cost("neg_grad"))


NEG_GRAD = Method(
    "neg_grad",
    "NegGrad+",
    "gradients on images of all classes",
    neg_grad,
    settings=NegGrad(),
    space={"kept": (0.5, 0.8, 0.95, 0.99), "lr": (None, 0.01), "epochs": (None, 5.0, 10.0)},
    source="Kurmanji et al., NeurIPS 2023",
)
