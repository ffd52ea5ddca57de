"""l1-sparse fine-tuning: J. Jia et al., *Model Sparsity Can Simplify Machine Unlearning*, NeurIPS 2023."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained
from fedunlearn.training.objectives.sparse import Sparse


@dataclass(frozen=True)
class L1Sparse(LocalSettings):
    """Settings: ``penalty`` times the L1 norm of all weights, in the share ``until`` of the rounds, going to 0.

    Published: penalties of 1e-4 to 1e-1; ten epochs, in all of which the released code has it.
    """

    lr: float | None = 0.01
    epochs: float | None = 10.0
    penalty: float = 5e-4
    until: float = 1.0

    def objective(self) -> Sparse:
        """Return what clients minimise."""
        return Sparse(self.penalty, self.until)


def l1_sparse(model: Classifier, fed: Federation, request: Request, settings: L1Sparse) -> Outcome:
    """Minimise ``CE(kept) + penalty * |w|_1`` with less and less of the penalty, then ``CE(kept)``."""
    sparse = trained(model, fed, request, settings, phase="l1_sparse")
    return Outcome(delivered(sparse, request), fed.cost("l1_sparse"))


L1_SPARSE = Method(
    "l1_sparse",
    "l1-sparse",
    "gradients on kept images",
    l1_sparse,
    settings=L1Sparse(),
    space={"penalty": (1e-5, 1e-4, 5e-4, 1e-3), "lr": (0.01, 0.03), "epochs": (None, 10.0)},
    source="Jia et al., NeurIPS 2023",
)
