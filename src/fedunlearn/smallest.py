"""The whole method with a cut that nobody has to choose: the smallest that forgets, by validation images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedunlearn.channels.plan import Classifier, Cut
from fedunlearn.channels.scores import Classes, Ranking
from fedunlearn.errors import FederationError, PlanError
from fedunlearn.federation.ask import ask
from fedunlearn.federation.averaging import evened
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import Reply
from fedunlearn.federation.journal import Step
from fedunlearn.federation.rounds import Repair
from fedunlearn.federation.tasks import Evaluate
from fedunlearn.unlearn import Ranked, Unlearned, accepted, rank_channels, repair_pruned

FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
MOST = 0.05
_CHECK = "check"


@dataclass(frozen=True)
class Attempt:
    """A cut that was tried.

    Attributes:
        fraction: share of the channels that went.
        forget: U, the row in place, after the repair, on the clients' validation images.
        probability: what those images are given for their class, in the mean.
        client_flops: operations of its re-estimation, repair and evaluation.
    """

    fraction: float
    forget: float
    probability: float
    client_flops: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Smallest(Unlearned):
    """The result of ``unlearn_smallest``: that of the cut it chose, at the cost of all attempts.

    Attributes:
        attempts: the cuts that were tried, in their order.
        passed: whether one of them passed; where none did, the cut is that of the lowest probability.
    """

    attempts: tuple[Attempt, ...]
    passed: bool


def unlearn_smallest(
    model: nn.Module | Classifier,
    federation: Federation,
    *,
    forget: Classes,
    repair: Repair,
    rank: Ranking = Ranking(),
    jointly: bool = False,
    scope: str = "layer",
) -> Smallest:
    """Make ``model`` forget classes by the smallest cut after whose repair the clients' validation images say so.

    Channels are measured and ranked once. Each attempt prunes the original and repairs it. It passes where the mean
    probability that validation images of the classes are given for their class, its row in place, is at most ``MOST``:
    clients hold out few images, of which right answers tell little (none of 16 leaves U at up to 17 %). Of
    ``FRACTIONS`` the middle one is tried first, then the middle of those below it where it passed, of those above it
    where not: three attempts, which find the smallest if a larger cut never forgets less. Where none passes, the cut
    after which the probability was lowest is the result, and ``passed`` is False. The cost is that of all.

    Args:
        model: a CNN with a row per class at its end, see ``head_layer``.
        federation: the clients, which need validation images of the classes.
        forget: class or classes to forget; several need ``jointly``.
        repair: what follows each pruning.
        rank: how channels are measured and ranked.
        jointly: score several classes as one.
        scope: of the cut, see ``Cut``.

    Raises:
        ModelError, PlanError, RecipeError: as in ``unlearn``, before any client is asked.
        PlanError: no cut removes a channel.
        FederationError: too few clients gave usable replies, or none counts validation images of the classes.
        RunError: the journal holds steps of another request.
    """
    Cut(FRACTIONS[0], scope=scope)  # refuses a scope that there is not
    original, wanted, federation = accepted(
        model,
        federation,
        "unlearn_smallest",
        forget=forget,
        repair=repair,
        rank=rank,
        jointly=jointly,
        scope=scope,
        most=MOST,
    )
    if len(wanted) > 1 and not jointly:
        raise PlanError(
            "a cut that is chosen holds for one ranking, and classes that go one after another have one each: forget "
            "them jointly (unlearn.jointly = true), or give a fraction"
        )
    ranked = rank_channels(original, federation, wanted, rank=rank)
    attempts: list[Attempt] = []
    best: tuple[Attempt, Unlearned] | None = None
    # Of narrow layers, and of blocks, a small share is no channel: the repair alone would pass for a cut.
    left: Sequence[float] = [fraction for fraction in FRACTIONS if ranked.removes(Cut(fraction, scope=scope))]
    if not left:
        raise PlanError(f"no cut up to {FRACTIONS[-1]} removes a channel: the model's layers are too narrow to prune")
    while left:
        middle = len(left) // 2
        attempt, done = _attempt(ranked, federation, Cut(left[middle], scope=scope), wanted, repair=repair, rank=rank)
        attempts.append(attempt)
        passed = attempt.probability <= MOST
        if passed or best is None or attempt.probability < best[0].probability:
            best = attempt, done
        left = left[:middle] if passed else left[middle + 1 :]
    assert best is not None  # a cut was tried
    chosen, result = best
    cost = federation.cost("measure", "attempt-")
    return Smallest(**{**vars(result), "cost": cost}, attempts=tuple(attempts), passed=chosen.probability <= MOST)


def _attempt(
    ranked: Ranked, federation: Federation, cut: Cut, forget: Sequence[int], *, repair: Repair, rank: Ranking
) -> tuple[Attempt, Unlearned]:
    """Return what came of a cut, and the model it gave."""
    fed = federation.part(f"attempt-{100 * cut.fraction:g}")
    pruned = ranked.without(cut)
    repaired, kept = repair_pruned(pruned, fed, forget, ranked.held, repair=repair, rank=rank)
    named, probability = _forgotten(repaired, fed, forget)
    done = Unlearned(
        forget=tuple(forget),
        stats=ranked.stats,
        scores=ranked.scores,
        cut=cut,
        pruned=pruned,
        repaired=repaired,
        model=repaired.without_rows(tuple(forget)),
        clients=kept.clients or (),
        cost=fed.cost(""),
    )
    return Attempt(cut.fraction, named, probability, done.cost.client_flops), done


def _forgotten(repaired: Classifier, fed: Federation, forget: Sequence[int]) -> tuple[float, float]:
    """Return U and the mean probability, the rows in place, on the clients' validation images: a step that costs too.

    Raises:
        FederationError: no client counts any.
    """
    stay = fed.besides(forget)
    task = Evaluate(exclude=stay, labels=repaired.labels, probability=True)
    about = [fed.about(weights=repaired, **vars(task))]
    if not fed.journal.finished(_CHECK, about):
        job = replace(fed.job(task, repaired, phase=_CHECK), clients=None)
        sums, entry = ask(fed.engine, job, _summed)
        fed.journal.finish(Step(_CHECK, 0, (entry,), about=about[0]), sums)
    sums = fed.journal.state(_CHECK)
    if not float(sums["counts"]):
        raise FederationError(
            "no client counts validation images of the classes to forget, by which a cut is chosen: set "
            "data.validation above 0, high enough for the clients' min_images, or give a fraction"
        )
    return float(sums["correct"] / sums["counts"]), float(sums["probability"] / sums["counts"])


def _summed(replies: Iterable[Reply]) -> dict[str, Tensor]:
    counted = [reply for reply in replies if reply.images]
    none = dict.fromkeys(("correct", "counts", "probability"), torch.zeros((), dtype=torch.float64))
    parts = [{name: tensor.double() for name, tensor in part.items()} for part in evened(counted)]
    return {name: torch.stack([zero, *(part[name] for part in parts)]).sum(0) for name, zero in none.items()}
