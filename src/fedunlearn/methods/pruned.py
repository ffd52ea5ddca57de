"""Control: pruning without the repair after it."""

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Method, Outcome, Request, delivered, prunes


def pruned(model: Classifier, fed: Federation, request: Request, settings: None = None) -> Outcome:
    """Return the model that unlearning had right after pruning."""
    assert request.unlearned is not None  # it is a control of unlearning
    return Outcome(delivered(request.unlearned.pruned, request))


PRUNED = Method("pruned", "pruning only", "forward passes over all images", pruned, prunes)
