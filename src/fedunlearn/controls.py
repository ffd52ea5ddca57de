"""Models that an audit must not pass: what a careless operator might call unlearned."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from fedunlearn.audits.subject import Subject, without_rows
from fedunlearn.federation.ledger import Cost
from fedunlearn.journal import Journal
from fedunlearn.methods.finetune import finetune
from fedunlearn.phases import unlearned_model
from fedunlearn.plan import PruningPlan
from fedunlearn.setting import Setting
from fedunlearn.unlearn import Unlearned


@dataclass(frozen=True, eq=False)
class Control:
    """A model to compare with.

    Attributes:
        subject: the model as it would be delivered.
        cost: what it cost the clients; None where that is nothing beyond what unlearning did.
    """

    subject: Subject
    cost: Cost | None = None


def controls(
    setting: Setting, original: nn.Module, plan: PruningPlan, unlearned: Unlearned, journal: Journal
) -> dict[str, Control]:
    """Return the controls by name.

    ``original``: nothing done. ``head_only``: the output rows removed, nothing else. ``pruned``: unlearning without
    its repair. ``random``: unlearning with random scores. ``finetune``: training on the kept classes only, with as
    many operations as unlearning took.

    Args:
        setting: the run.
        original: the model before unlearning.
        plan: how the shapes of ``original`` follow from its architecture.
        unlearned: what the controls stand beside.
        journal: of the run.
    """
    classes, shape = len(setting.splits.test.classes), setting.splits.test.shape
    delivered = partial(without_rows, forget=setting.forget, classes=classes, shape=shape)
    beside = journal.part("random")
    if len(setting.forget) == 1 or setting.recipe.unlearn.jointly:
        beside.adopt("measure-0", journal)  # the same job: a second answer would only tell more of the clients
    randomly = unlearned_model(_at_random(setting), original, plan, beside)
    tuned, cost = _finetuned(setting, original, plan, unlearned, journal)
    return {
        "original": Control(Subject(original, tuple(range(classes)), original)),
        "head_only": Control(delivered(original, row_known=False)),
        "pruned": Control(delivered(unlearned.pruned)),
        "random": Control(Subject(randomly.model, randomly.labels, randomly.repaired), randomly.cost),
        "finetune": Control(delivered(tuned), cost),
    }


def _at_random(setting: Setting) -> Setting:
    recipe = setting.recipe
    unlearning = recipe.unlearn.model_copy(update={"criterion": "random", "end": "highest"})
    return replace(setting, recipe=recipe.model_copy(update={"unlearn": unlearning}))


def _finetuned(
    setting: Setting, original: nn.Module, plan: PruningPlan, unlearned: Unlearned, journal: Journal
) -> tuple[nn.Module, Cost]:
    """Return fine-tuning only, with as many operations as unlearning took."""
    fed = setting.recipe.federation
    model = copy.deepcopy(original)
    finetune(
        model,
        setting.engine,
        training=setting.recipe.repair(),
        rounds=max(1, unlearned.cost.rounds),
        flops=unlearned.cost.client_flops,
        images=int(_images_kept(setting, unlearned)),
        forget=setting.forget,
        clients=unlearned.clients,
        participation=fed.participation,
        seed=fed.seed,
        plan=plan,
        journal=journal,
    )
    return model, Cost.of(journal.entries("finetune"))


def _images_kept(setting: Setting, unlearned: Unlearned) -> float:
    """Return how many images of the kept classes the clients of a round hold, on average."""
    rows = [setting.engine.clients.index(name) for name in unlearned.clients]
    kept = setting.table[rows][:, list(unlearned.labels)].sum()
    return float(kept) * setting.recipe.federation.participation
