"""Control: unlearning with channels drawn at random, of the same number and cost, or nearly."""

from dataclasses import replace

from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier, Cut, quota
from fedunlearn.channels.scores import random_scores
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import Method, Outcome, Request, prunes
from fedunlearn.unlearn import Unlearned, unlearn


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
        cut=replace(_as_much(request), end="highest"),
        repair=request.repair,
        rank=replace(request.rank, criterion=random_scores),
        jointly=request.jointly,
    )
    return Outcome(Subject(done.model, done.repaired), done.cost)


def _as_much(request: Request) -> Cut:
    """Return the cut of the run; where too few channels spoke for the class, the smallest by which as many go."""
    cut, done = request.cut, request.unlearned
    if not isinstance(done, Unlearned):
        return cut
    speak = [int((scores > 0).sum()) for scores in done.scores.values()]
    widths = [len(scores) for scores in done.scores.values()]
    if cut.scope == "global":
        speak, widths = [sum(speak)], [sum(widths)]
    if cut.end == "lowest" or all(positive >= quota(cut.fraction, width) for positive, width in zip(speak, widths)):
        return cut
    went = round(done.removed() * sum(widths))

    def goes(fraction: float) -> int:
        return sum(quota(fraction, width) for width in widths)

    shares = {count / width for width in widths for count in range(width)}
    return replace(cut, fraction=min(share for share in shares if goes(share) >= went))


RANDOM = Method(
    "random", "random + repair", "forward passes over all images, then gradients as in the repair", randomly, prunes
)
