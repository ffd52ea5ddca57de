"""Retraining from fresh weights without the forgotten classes: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedunlearn.federation.jobs import Engine
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.training.sgd import Training, one_cycle


def retrain(
    model: nn.Module,
    engine: Engine,
    *,
    training: Training,
    rounds: int,
    forget: tuple[int, ...],
    clients: Sequence[str],
    journal: Journal,
    participation: float = 1.0,
    validate: int = 1,
    seed: int = 0,
) -> list[Step]:
    """Train ``model``, which has fresh weights, in place on the kept classes, as the original was trained.

    Args:
        model: the original architecture; the rows of the forgotten classes stay and learn nothing.
        engine: who runs the jobs.
        training: the settings of the original.
        rounds: all are run: one cycle of the learning rate.
        forget: classes whose images are not used.
        clients: those that hold images of other classes.
        journal: where each round is recorded.
        participation: share of the clients drawn in each round.
        validate: measure the accuracy on validation images after every so many rounds; never where 0.
        seed: owner of all draws.
    """
    return train_rounds(
        model,
        engine,
        phase="retrain",
        training=training,
        rounds=rounds,
        journal=journal,
        schedule=one_cycle,
        exclude=forget,
        clients=clients,
        participation=participation,
        seed=seed,
        validate=validate,
    )
