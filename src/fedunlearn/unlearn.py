"""The whole method: measure, score, plan, prune, repair, remove the rows of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedunlearn.channels.groups import head_layer, prunable_layers
from fedunlearn.channels.plan import PruningPlan, check_fraction, plan_pruning, plan_without_rows, prune
from fedunlearn.channels.scores import ChannelScores, Criterion, forget_classes, tf_idf
from fedunlearn.channels.stats import ChannelStats
from fedunlearn.channels.taps import find_taps
from fedunlearn.errors import ModelError
from fedunlearn.federation.jobs import Engine, Measure
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.rounds import measure, repair
from fedunlearn.seeding import generator
from fedunlearn.training.sgd import Training


@dataclass(frozen=True, eq=False)
class Unlearned:
    """The result of ``unlearn``, every stage kept.

    Attributes:
        forget: the forgotten classes.
        stats: what the clients measured (of the last class, where several went one after another).
        scores: what the criterion made of it.
        plan: all that was removed, output rows included.
        channels: the part of the plan that ``pruned`` and ``repaired`` follow: all but the output rows.
        pruned: the model right after pruning.
        repaired: after repair, the output rows of the forgotten classes still in place.
        model: the unlearned model: smaller, without those rows.
        labels: the class of each output row of ``model``.
        clients: ids of the clients that take part in the repair: all but those left with nothing.
        cost: what it cost the clients, statistics and evaluations included.
    """

    forget: tuple[int, ...]
    stats: ChannelStats
    scores: ChannelScores
    plan: PruningPlan
    channels: PruningPlan
    pruned: nn.Module
    repaired: nn.Module
    model: nn.Module
    labels: tuple[int, ...]
    clients: tuple[str, ...]
    cost: Cost


def unlearn(
    model: nn.Module,
    engine: Engine,
    *,
    forget: int | Sequence[int],
    fraction: float,
    training: Training,
    rounds: int,
    criterion: Criterion = tf_idf,
    hook: str = "activation",
    end: str = "highest",
    scope: str = "layer",
    jointly: bool = False,
    mean_of_clients: bool = False,
    influence: float | None = None,
    sample: int | None = None,
    batch_norm: bool = True,
    target: float | None = None,
    participation: float = 1.0,
    seed: int = 0,
    plan: PruningPlan | None = None,
    journal: Journal | None = None,
) -> Unlearned:
    """Make ``model`` forget classes; the model itself is left as it was.

    Args:
        model: a CNN that ends in a linear layer with one row per class.
        engine: who runs the jobs on the clients.
        forget: class or classes to forget.
        fraction: share of each layer's channels to remove (per class where they go one after another).
        training: local settings of the repair.
        rounds: rounds of repair; 0 for none.
        criterion: ranks the channels.
        hook: what is measured, see ``find_taps``.
        end: which end of the ranking goes.
        scope: ``"layer"`` or ``"global"``, see ``plan_pruning``.
        jointly: score several classes as one, in one go; otherwise one after another as in the paper.
        mean_of_clients: average the clients' means, as the paper does, instead of pooling their images.
        influence: how many times the median a client's statistics may weigh, see ``limit_influence``; any where None.
        sample: at most so many images per client for the statistics and for batch normalisation.
        batch_norm: re-estimate the batch normalisation statistics after pruning.
        target: stop the repair at this accuracy on the clients' validation images of the kept classes.
        participation: share of the clients drawn in each round of repair.
        seed: owner of all draws.
        plan: how the shapes of ``model`` follow from its architecture, where channels were removed before.
        journal: where steps are recorded, to go on after a kill; memory where None.

    Raises:
        ModelError, PlanError: the model or an argument is not usable; nothing was asked of a client yet.
        FederationError: too few clients gave usable replies.
    """
    journal = journal or Journal()
    example = torch.randn((2, *engine.shape), generator=generator(seed, "example"))
    head, wanted = _checked(model, engine, forget, example)
    check_fraction(fraction)

    pruned, plan = model, plan or PruningPlan()
    for index, target_classes in enumerate([wanted] if jointly else [(label,) for label in wanted]):
        taps = find_taps(pruned, prunable_layers(pruned, example), example, hook=hook)
        job = Measure(
            phase=f"measure-{index}",
            model=pruned,
            plan=plan,
            taps=taps,
            classes=engine.classes,
            sample=sample,
            seed=seed,
        )
        stats, held = measure(job, engine, journal, mean_of_clients=mean_of_clients, influence=influence)
        scores = criterion(stats, target_classes)
        step = plan_pruning(pruned, scores, fraction=fraction, example=example, end=end, scope=scope)
        pruned, plan = prune(pruned, step), plan.then(step)

    labels = tuple(label for label in range(engine.classes) if label not in wanted)
    # A client that did not answer, or reports nothing by its rules, may hold images of the kept classes all the same.
    nothing_known = {name for name in engine.clients if name not in held or not held[name].any()}
    clients = tuple(name for name in engine.clients if name in nothing_known or int(held[name][list(labels)].sum()) > 0)
    repaired = repair(
        pruned,
        engine,
        training=training,
        rounds=rounds,
        batch_norm=batch_norm,
        journal=journal,
        exclude=wanted,
        clients=clients,
        sample=sample,
        participation=participation,
        seed=seed,
        plan=plan,
        target=target,
    )
    rows = plan_without_rows(repaired, head, wanted)
    cost = Cost.of(journal.entries("measure", "reestimate", "repair"))
    final = prune(repaired, rows)
    return Unlearned(wanted, stats, scores, plan.then(rows), plan, pruned, repaired, final, labels, clients, cost)


def _checked(
    model: nn.Module, engine: Engine, forget: int | Sequence[int], example: Tensor
) -> tuple[str, tuple[int, ...]]:
    """Return the name of the last layer and the classes to forget; refuse a model or classes that cannot be used."""
    head = head_layer(model, example)
    rows = int(model.get_submodule(head).get_parameter("weight").shape[0])
    if rows != engine.classes:
        raise ModelError(
            f"the model has {rows} output rows, the clients' data {engine.classes} classes: "
            "start from the model that has a row for every class"
        )
    prunable_layers(model, example)
    return head, forget_classes(forget, rows)
