"""The phases of a run as its recipe sets them: the original, and unlearning."""

from __future__ import annotations

from torch import nn

from fedunlearn.federation.rounds import train_rounds
from fedunlearn.journal import Journal
from fedunlearn.plan import PruningPlan
from fedunlearn.setting import Setting, criterion_of
from fedunlearn.training import one_cycle
from fedunlearn.unlearn import Unlearned, unlearn


def original_model(setting: Setting, journal: Journal) -> tuple[nn.Module, PruningPlan]:
    """Return the original, trained or loaded, and how its shapes follow from its architecture."""
    if setting.weights is not None:
        return setting.model, setting.weights.plan
    fed = setting.recipe.federation
    train_rounds(
        setting.model,
        setting.engine,
        phase="train",
        training=setting.recipe.training(),
        rounds=setting.recipe.train.rounds,
        journal=journal,
        schedule=one_cycle,
        participation=fed.participation,
        seed=fed.seed,
    )
    return setting.model, PruningPlan()


def unlearned_model(setting: Setting, original: nn.Module, plan: PruningPlan, journal: Journal) -> Unlearned:
    """Return what the recipe makes of ``original``."""
    u = setting.recipe.unlearn
    return unlearn(
        original,
        setting.engine,
        forget=setting.forget,
        fraction=u.fraction,
        training=setting.recipe.repair(),
        rounds=u.rounds if u.repair == "finetune" else 0,
        criterion=criterion_of(setting.recipe),
        hook=u.hook,
        end=u.end,
        scope=u.scope,
        jointly=u.jointly,
        mean_of_clients=u.mean_of_clients,
        influence=u.influence,
        sample=u.sample or None,
        batch_norm=u.repair != "none",
        target=u.target,
        participation=setting.recipe.federation.participation,
        seed=setting.recipe.federation.seed,
        plan=plan,
        journal=journal,
    )
