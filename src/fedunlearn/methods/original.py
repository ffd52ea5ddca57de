"""Control: the original model, nothing done."""

from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Method, Outcome, Request


def original(model: Classifier, fed: Federation, request: Request, settings: None = None) -> Outcome:
    """Return ``model`` as it is, with a row for every class."""
    return Outcome(Subject(model, model))


ORIGINAL = Method("original", "original", "nothing", original)
