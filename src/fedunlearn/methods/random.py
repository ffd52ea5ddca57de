"""Control: unlearning with channels drawn at random, of the same number and cost, or nearly."""

from dataclasses import replace

from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.scores import random_scores
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Method, Outcome, Request, prunes
from fedunlearn.unlearn import unlearn


def randomly(model: Classifier, fed: Federation, request: Request, settings: None = None) -> Outcome:
    """Return what unlearning makes of ``model`` when its scores are random."""
    beside = fed.part("random")
    if (len(request.forget) == 1 or request.jointly) and fed.journal.steps("measure-0"):
        # The same job: a second answer would only tell more of the clients.
        beside.journal.adopt("measure-0", fed.journal)
    done = unlearn(
        model,
        beside,
        forget=request.forget,
        cut=replace(request.cut, end="highest"),
        repair=request.repair,
        rank=replace(request.rank, criterion=random_scores),
        jointly=request.jointly,
    )
    return Outcome(Subject(done.model, done.repaired), done.cost)


RANDOM = Method(
    "random",
    "random + repair",
    "forward passes over all images, then gradients as in the repair",
    randomly,
    prunes,
    matched=True,
    measures=True,
)
