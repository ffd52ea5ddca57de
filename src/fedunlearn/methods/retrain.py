"""Retraining from fresh weights without the forgotten classes: what unlearning is held against."""

from __future__ import annotations

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.rounds import Watch, train_rounds
from fedunlearn.training.sgd import Training


def retrain(
    fresh: Classifier, kept: Federation, training: Training, *, rounds: int, server: Server, validate: int = 1
) -> Classifier:
    """Train ``fresh`` on the kept classes as the original was trained; all rounds are run.

    Args:
        fresh: the original architecture with fresh weights; the rows of the forgotten classes stay and learn nothing.
        kept: the clients that hold images of the kept classes, the others' images left out.
        training: the settings of the original.
        rounds: likewise.
        server: likewise.
        validate: measure the accuracy on validation images after every so many rounds; never where 0.
    """
    watch = Watch(every=validate)
    return train_rounds(fresh, kept, training, rounds=rounds, phase="retrain", server=server, watch=watch)
