"""Control: pruning without the repair after it."""

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Method, Outcome, Request, delivered, prunes
from fedunlearn.unlearn import Unlearned


def pruned(model: Classifier, fed: Federation, request: Request, settings: None = None) -> Outcome:
    """Return the model that unlearning had right after pruning."""
    assert isinstance(request.unlearned, Unlearned)  # it does not apply to others
    return Outcome(delivered(request.unlearned.pruned, request))


PRUNED = Method("pruned", "pruning only", "forward passes over all images", pruned, prunes)
