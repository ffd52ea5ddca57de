"""Control: the output rows of the classes are removed, the features stay. Every audit must catch it."""

from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Method, Outcome, Request


def head_only(model: Classifier, fed: Federation, request: Request, settings: None = None) -> Outcome:
    """Return ``model`` without the rows of the forgotten classes.

    The model with its rows in place is not given to the audits: it is the original, and its only edit is that the
    rows are gone.
    """
    return Outcome(Subject(model.without_rows(request.forget)))


HEAD_ONLY = Method("head_only", "head only", "nothing", head_only)
