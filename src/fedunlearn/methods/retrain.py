"""Retraining from fresh weights without the forgotten classes: what unlearning is held against."""

from __future__ import annotations

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.rounds import Federation, Watch, train_rounds
from fedunlearn.training.sgd import Training, one_cycle


def retrain(fresh: Classifier, kept: Federation, training: Training, *, rounds: int, validate: int = 1) -> Classifier:
    """Train ``fresh`` on the kept classes as the original was trained: all rounds, one cycle of the learning rate.

    Args:
        fresh: the original architecture with fresh weights; the rows of the forgotten classes stay and learn nothing.
        kept: the clients that hold images of the kept classes, the others' images left out.
        training: the settings of the original.
        rounds: likewise.
        validate: measure the accuracy on validation images after every so many rounds; never where 0.
    """
    watch = Watch(every=validate)
    return train_rounds(fresh, kept, training, rounds=rounds, phase="retrain", schedule=one_cycle, watch=watch)
