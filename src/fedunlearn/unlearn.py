"""The whole method: measure, score, plan, prune, repair, remove the rows of the classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fedunlearn.arguments import must_be
from fedunlearn.channels.plan import Classifier, Cut, plan_pruning
from fedunlearn.channels.scores import ChannelScores, Classes, Ranking, forget_classes
from fedunlearn.channels.stats import ChannelStats
from fedunlearn.errors import PlanError, RecipeError
from fedunlearn.federation.about import asked
from fedunlearn.federation.federation import Federation, whole_model
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.measuring import measure, reestimate
from fedunlearn.federation.rounds import Repair
from fedunlearn.federation.tasks import channels_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Forgotten:
    """What any method made of a model.

    Attributes:
        forget: the forgotten classes.
        repaired: the result, the output rows of the forgotten classes still in place.
        model: the unlearned model, without those rows; its ``plan`` is all that was removed.
        clients: ids of the clients that take part in training: all but those left with nothing.
        cost: what it cost the clients, statistics and evaluations included.
    """

    forget: tuple[int, ...]
    repaired: Classifier
    model: Classifier
    clients: tuple[str, ...]
    cost: Cost


@dataclass(frozen=True, eq=False, kw_only=True)
class Unlearned(Forgotten):
    """The result of ``unlearn``, every stage kept.

    Attributes:
        stats: what the clients measured (of the last class, where several went one after another).
        scores: what the criterion made of it.
        pruned: the model right after pruning.
    """

    stats: ChannelStats
    scores: ChannelScores
    pruned: Classifier


def unlearn(
    model: nn.Module | Classifier,
    federation: Federation,
    *,
    forget: Classes,
    cut: Cut,
    repair: Repair,
    rank: Ranking = Ranking(),
    jointly: bool = False,
) -> Unlearned:
    """Make ``model`` forget classes; the model itself is left as it was.

    Args:
        model: a CNN that ends in a linear layer with one row per class.
        federation: the clients, the record that a killed run goes on from, the owner of all draws.
        forget: class or classes to forget, by number: a federation knows no names.
        cut: how many channels go (per class where classes go one after another).
        repair: what follows the pruning.
        rank: how channels are measured and ranked.
        jointly: score several classes as one, in one go; otherwise one after another as in the paper.

    Raises:
        ModelError, PlanError, RecipeError: the model, the classes or a setting are not usable; nothing was asked of a
            client yet.
        FederationError: too few clients gave usable replies.
        RunError: the journal holds steps of another request.

    Example:
        >>> import fedunlearn as fu
        >>> train, test = fu.read_digits()
        >>> fed = fu.Federation(fu.LocalEngine(fu.partition(train, by="iid", clients=3, seed=0)))
        >>> net = fu.build_model("small-cnn", classes=10, colours=1)
        >>> repair = fu.Repair(fu.Training(lr=0.05, local_epochs=0.1), rounds=1)
        >>> fu.unlearn(net, fed, forget=9, cut=fu.Cut(0.2), repair=repair).model.labels
        (0, 1, 2, 3, 4, 5, 6, 7, 8)
    """
    original = whole_model(model, federation)
    must_be(Cut, cut, "unlearn(cut=...)", "a Cut, such as Cut(0.2)", PlanError)
    must_be(Repair, repair, "unlearn(repair=...)", "a Repair, such as Repair(Training(lr=0.05))", RecipeError)
    must_be(Ranking, rank, "unlearn(rank=...)", "a Ranking, such as Ranking('contrast')", PlanError)
    must_be(bool, jointly, "unlearn(jointly=...)", "True or False", PlanError)
    repair.check(original)
    wanted = forget_classes(forget, federation.engine.classes)
    request = asked(forget=wanted, **vars(rank), cut=cut, repair=repair, jointly=jointly)
    federation = replace(federation, request=request)

    pruned = original
    for index, turn in enumerate([wanted] if jointly else [(label,) for label in wanted]):
        channels = channels_of(pruned, rank.hook)
        stats, held = measure(
            pruned, federation, hook=rank.hook, phase=f"measure-{index}", pooling=rank.pooling, sample=rank.sample
        )
        scores = rank.scores(stats, turn, seed=federation.seed)
        pruned = pruned.cut(plan_pruning(channels, scores, cut))

    kept = federation.keeping(exclude=wanted, clients=held.with_images_besides(wanted))
    refitted = reestimate(pruned, kept, sample=rank.sample) if repair.batch_norm else pruned
    repaired = repair.of(refitted, kept)
    unlearned = repaired.without_rows(wanted)
    cost = kept.cost("measure", "reestimate", "repair")
    return Unlearned(
        forget=wanted,
        stats=stats,
        scores=scores,
        pruned=pruned,
        repaired=repaired,
        model=unlearned,
        clients=kept.clients or (),
        cost=cost,
    )
