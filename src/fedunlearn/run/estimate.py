"""How long a run will train: images over the images per second of a short timing on this machine."""

from __future__ import annotations

import math

from fedunlearn.federation.journal import Journal
from fedunlearn.run.experiment import Experiment
from fedunlearn.smallest import FRACTIONS
from fedunlearn.training.compute import Compute, cores, own_device
from fedunlearn.training.speed import rate

_ATTEMPTS = math.ceil(math.log2(len(FRACTIONS) + 1))  # by halves, where the tool chooses the fraction
_FORWARD = 1 / 3  # of a training step: a pass that measures


def images_to_train(experiment: Experiment, command: str) -> float:
    """Return about how many images pass through training in a run; a pass that measures counts for a third.

    A method that is not the recipe's own pruning is taken to train as much.

    Args:
        experiment: the run.
        command: ``"train"``, ``"unlearn"``, ``"run"``, or ``"audit"`` of a model that is there. Retrained models are
            counted though some may be kept from earlier runs, and auditing is not.
    """
    recipe, held = experiment.recipe, int(experiment.table.sum())
    train, unlearn, share = recipe.train, recipe.unlearn, experiment.federation(Journal()).share()
    whole = train.rounds * share * train.local_epochs * held
    wanted = whole if experiment.weights is None else 0.0
    if command == "train":
        return wanted
    retrained = 0 if recipe.audit.models else recipe.audit.oracles
    kept = 1 - int(experiment.table[:, list(experiment.forget)].sum()) / held
    if command == "audit":
        return retrained * whole * kept
    sample = min(held, (unlearn.sample or held) * len(experiment.clients))
    rounds = unlearn.rounds if unlearn.repair == "finetune" else 0
    attempts = _ATTEMPTS if unlearn.fraction == "auto" else 1
    measured = 1 if unlearn.jointly else len(experiment.forget)  # of classes in turn each, with one repair for all
    once = rounds * share * unlearn.local_epochs * held * kept + (measured + 1) * _FORWARD * sample
    if command == "unlearn":
        return wanted + attempts * once
    # Fine-tuning costs as much as all attempts; random channels as one, and the erase step alone.
    times = 2 * attempts + 1 + (recipe.erase.erasing() is not None)
    return wanted + times * once + retrained * whole * kept


def seconds_to_train(experiment: Experiment, command: str) -> float | None:
    """Return how long this machine will train if alone; None where the clients are elsewhere or on a GPU."""
    recipe = experiment.recipe
    if recipe.federation.engine != "local" or own_device().type != "cpu" or recipe.compute.precision == "auto":
        return None
    compute = Compute(recipe.compute.precision, recipe.compute.memory_format, recipe.compute.workers or cores())
    compute = compute.able(experiment.model.module, experiment.model.example)
    images = images_to_train(experiment, command)
    shape = experiment.splits.train.shape
    return images / rate(compute, experiment.model.module, shape, batch_size=recipe.train.batch_size)
