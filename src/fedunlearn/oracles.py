"""Retrained models: what unlearning is held against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedunlearn.cache import RetrainedCache
from fedunlearn.journal import Journal, Step
from fedunlearn.methods.retrain import retrain
from fedunlearn.setting import Setting, new_model


@dataclass(frozen=True, eq=False)
class Oracle:
    """A model retrained without the forgotten classes.

    Attributes:
        model: with a row for every class; those of the forgotten ones never saw an image of theirs.
        steps: its rounds.
        cached: whether it was kept from an earlier run.
    """

    model: nn.Module
    steps: list[Step]
    cached: bool


def retrained_models(setting: Setting, journal: Journal, *, data: str, count: int) -> dict[str, Oracle]:
    """Return ``count`` retrained models by name, ``retrained-SEED``.

    Their seeds follow the recipe's, so they share neither initial weights nor draws with the original or each other.

    Args:
        setting: the run.
        journal: of the run.
        data: fingerprint of the images, for the cache.
        count: how many.
    """
    seeds = [setting.recipe.federation.seed + 1 + k for k in range(count)]
    return {
        f"retrained-{seed}": _retrained(setting, journal.part(f"retrained-{seed}"), data=data, seed=seed)
        for seed in seeds
    }


def _retrained(setting: Setting, journal: Journal, *, data: str, seed: int) -> Oracle:
    recipe = setting.recipe
    model = new_model(recipe, setting.splits.train, seed=seed)
    cache = RetrainedCache.of(recipe, setting.forget, data, seed)
    if cache is not None and not journal.steps("retrain"):
        kept = cache.restore(model)
        if kept is not None:
            return Oracle(model, kept, True)
    steps = retrain(
        model,
        setting.engine,
        training=recipe.training(),
        rounds=recipe.train.rounds,
        forget=setting.forget,
        clients=setting.holders(),
        participation=recipe.federation.participation,
        validate=recipe.train.validate_every if recipe.data.validation else 0,
        seed=seed,
        journal=journal,
    )
    if cache is not None:
        cache.store(model, steps)
    return Oracle(model, steps, False)
