"""The whole method: measure, score, plan, prune, repair, remove the rows of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedunlearn.arguments import must_be
from fedunlearn.channels.groups import Channels
from fedunlearn.channels.plan import Classifier, Cut, plan_pruning
from fedunlearn.channels.scores import ChannelScores, Classes, Ranking, forget_classes
from fedunlearn.channels.stats import ChannelStats
from fedunlearn.errors import FederationError, PlanError, RecipeError
from fedunlearn.federation.about import asked
from fedunlearn.federation.federation import Federation, whole_model
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.measuring import Holdings, measure, reestimate
from fedunlearn.federation.rounds import Repair
from fedunlearn.federation.tasks import channels_of
from fedunlearn.tabular import Tabular, amount


@dataclass(frozen=True, eq=False, kw_only=True)
class Forgotten(Tabular):
    """What any method made of a model; ``print`` shows what was removed and what it cost.

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

    def table(self) -> list[dict[str, Any]]:
        """Return a row per convolution that can lose channels: how many the architecture has, and how many are gone."""
        plan = self.model.plan
        state = self.model.module.state_dict()

        def channels(layer: str) -> int:
            name = f"{layer}.weight"
            return int(plan.shapes.get(name, state[name].shape)[0])  # the plan knows the layers that lost any

        return [
            {"layer": layer, "channels": channels(layer), "removed": len(gone)} for layer, gone in plan.pruned.items()
        ]

    def headline(self) -> str:
        """Return what was forgotten, how small the model is, and the cost."""
        classes = f"class{'es' if len(self.forget) > 1 else ''} {', '.join(map(str, self.forget))}"
        weights = sum(parameter.numel() for parameter in self.model.module.parameters())
        c = self.cost
        return (
            f"forgot {classes}: {weights:,} parameters stay; {c.rounds} round{'s' * (c.rounds != 1)}, "
            f"{c.client_samples:,} images, {amount(c.client_flops / 1e9)} GFLOP, "
            f"{amount((c.bytes_up + c.bytes_down) / 1e6)} MB"
        )

    def cells(self) -> list[Sequence[str]]:
        """Return a row per convolution."""
        rows = [(row["layer"], str(row["channels"]), str(row["removed"])) for row in self.table()]
        return [("layer", "channels", "removed"), *rows]


@dataclass(frozen=True, eq=False, kw_only=True)
class Unlearned(Forgotten):
    """The result of ``unlearn``, every stage kept.

    Attributes:
        stats: what the clients measured (of the last class, where several went one after another).
        scores: what the criterion made of it.
        cut: how many channels went.
        pruned: the model right after pruning.
    """

    stats: ChannelStats
    scores: ChannelScores
    cut: Cut
    pruned: Classifier

    def removed(self) -> float:
        """Return the share of the ranked channels that went: less than the cut where too few speak for the class.

        Of classes that went one after another, by the ranking of the last.
        """
        state = self.pruned.module.state_dict()
        ranked = sum(len(scores) for scores in self.scores.values())
        return (ranked - sum(len(state[f"{layer}.weight"]) for layer in self.scores)) / ranked


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
        model: a CNN with a row per class at its end, see ``head_layer``.
        federation: the clients, the record that a killed run goes on from, the owner of all draws.
        forget: class or classes to forget, by number, or by name where the engine runs in this process: from elsewhere
            clients send no names.
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
    must_be(Cut, cut, "unlearn(cut=...)", "a Cut, such as Cut(0.2)", PlanError)
    original, wanted, federation = accepted(
        model, federation, "unlearn", forget=forget, cut=cut, repair=repair, rank=rank, jointly=jointly
    )
    pruned = original
    for index, turn in enumerate([wanted] if jointly else [(label,) for label in wanted]):
        ranked = rank_channels(pruned, federation, turn, rank=rank, phase=f"measure-{index}")
        pruned = ranked.without(cut)
    repaired, kept = repair_pruned(pruned, federation, wanted, ranked.held, repair=repair, rank=rank)
    return Unlearned(
        forget=wanted,
        stats=ranked.stats,
        scores=ranked.scores,
        cut=cut,
        pruned=pruned,
        repaired=repaired,
        model=repaired.without_rows(wanted),
        clients=kept.clients or (),
        cost=kept.cost("measure", "reestimate", "repair"),
    )


def accepted(
    model: nn.Module | Classifier,
    federation: Federation,
    caller: str,
    *,
    forget: Classes,
    repair: Repair,
    rank: Ranking,
    jointly: bool,
    **values: object,
) -> tuple[Classifier, tuple[int, ...], Federation]:
    """Return the model, the classes as numbers and the federation with this request; refuse what would fail later."""
    original = whole_model(model, federation)
    must_be(Repair, repair, f"{caller}(repair=...)", "a Repair, such as Repair(Training(lr=0.05))", RecipeError)
    must_be(Ranking, rank, f"{caller}(rank=...)", "a Ranking, such as Ranking('contrast')", PlanError)
    must_be(bool, jointly, f"{caller}(jointly=...)", "True or False", PlanError)
    if federation.exclude:
        raise FederationError(
            f"{caller}(federation) leaves out the classes {list(federation.exclude)}, whose images would be measured, "
            "and erased, with those of the classes to forget: give a federation that leaves none out, its clients "
            "without these images"
        )
    repair.check(original)
    # Only who has the images knows the names of their classes: an engine in this process.
    wanted = forget_classes(forget, getattr(federation.engine, "class_names", federation.engine.classes))
    request = asked(forget=wanted, **vars(rank), **values, repair=repair, jointly=jointly)
    return original, wanted, replace(federation, request=request)


@dataclass(frozen=True, eq=False)
class Ranked:
    """A model whose channels have scores.

    Attributes:
        model: the model.
        channels: its channels that can go.
        stats: what the clients measured.
        scores: what the criterion made of it.
        held: who holds images of which class.
    """

    model: Classifier
    channels: Channels
    stats: ChannelStats
    scores: ChannelScores
    held: Holdings

    def removes(self, cut: Cut) -> bool:
        """Return whether ``cut`` removes any channel."""
        return any(plan_pruning(self.channels, self.scores, cut).pruned.values())

    def without(self, cut: Cut) -> Classifier:
        """Return the model without the channels that ``cut`` removes by these scores."""
        return self.model.cut(plan_pruning(self.channels, self.scores, cut))


def rank_channels(
    model: Classifier, fed: Federation, forget: Sequence[int], *, rank: Ranking, phase: str = "measure-0"
) -> Ranked:
    """Have the clients measure the channels of ``model`` and return their scores for ``forget``."""
    channels = channels_of(model, rank.hook)
    stats, held = measure(model, fed, hook=rank.hook, phase=phase, pooling=rank.pooling, sample=rank.sample)
    return Ranked(model, channels, stats, rank.scores(stats, forget, seed=fed.seed), held)


def repair_pruned(
    pruned: Classifier, fed: Federation, forget: Sequence[int], held: Holdings, *, repair: Repair, rank: Ranking
) -> tuple[Classifier, Federation]:
    """Return ``pruned`` after its repair, and the federation that repaired it: those who hold other images."""
    kept = fed.keeping(exclude=forget, clients=held.with_images_besides(forget))
    kept = replace(kept, holders=held.with_images_of(forget), measured=True)
    refitted = reestimate(pruned, kept, sample=rank.sample) if repair.batch_norm else pruned
    return repair.of(refitted, kept), kept
