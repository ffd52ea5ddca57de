"""Control: the erase step and the repair alone, nothing is pruned. What pruning adds is what this lacks."""

from __future__ import annotations

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Method, Outcome, Request, delivered


def erase_only(model: Classifier, fed: Federation, request: Request) -> Outcome:
    """Train ``model`` as the repair does, from its own weights."""
    kept = fed.keeping(exclude=request.forget, clients=request.unlearned.clients)
    erased = request.repair.of(model, kept, phase="erase_only")
    return Outcome(delivered(erased, request), fed.cost("erase_only"))


ERASE_ONLY = Method(
    "erase_only",
    "erase step, nothing pruned",
    "gradients on images of all classes",
    erase_only,
    applies=lambda request: request.repair.training.objective is not None and request.cut.fraction > 0,
)
