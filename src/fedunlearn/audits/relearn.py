"""Audit: how fast does training bring the class back?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fedunlearn.audits.observe import observe
from fedunlearn.channels.groups import head_layer
from fedunlearn.data.batches import batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.training.sgd import Sgd

_BATCH = 64


@dataclass(frozen=True)
class Relearned:
    """How the accuracy on the forgotten classes grows in training.

    Attributes:
        samples: images trained on, repeats counted, at each point; 0 first, then doubling.
        forget: accuracy on test images of the forgotten classes (U) at each point.
    """

    samples: tuple[int, ...]
    forget: tuple[float, ...]

    def mean(self) -> float:
        """Return the mean of U over the points after the first: the area under the curve, samples on a log scale."""
        return sum(self.forget[1:]) / len(self.forget[1:])

    def samples_until(self, accuracy: float) -> int | None:
        """Return the samples of the first point with at least this U; None where it was not reached.

        Example:
            >>> Relearned((0, 64, 128), (0.0, 0.4, 0.9)).samples_until(0.8)
            128
        """
        return next((s for s, u in zip(self.samples, self.forget) if u >= accuracy), None)


def relearn(
    model: nn.Module,
    train: LabelledImages,
    test: LabelledImages,
    *,
    labels: Sequence[int],
    lr: float,
    doublings: int,
    draw: torch.Generator,
) -> Relearned:
    """Train a copy of ``model`` on all classes and return how U grows; rows that are gone start again from 0.

    SGD with momentum .9, batches of 64. U is measured when ``64, 128, ..., 64 * 2**doublings`` images are reached: a
    few more where an epoch ends in a smaller batch.

    Args:
        model: the CNN as delivered.
        train: images of all classes.
        test: test images of the forgotten classes.
        labels: the class of each output row.
        lr: learning rate.
        doublings: length of the training.
        draw: owner of the shuffles.
    """
    classes = len(train.classes)
    learner = with_all_rows(model, labels, classes, train.shape)
    row_of = torch.empty(classes, dtype=torch.int64)
    row_of[torch.tensor(_all_labels(labels, classes))] = torch.arange(classes)
    optimiser = Sgd(learner.parameters(), lr=lr, momentum=0.9)
    samples, forget, seen = [0], [_accuracy(learner, test, row_of)], 0
    points = [_BATCH * 2**k for k in range(doublings + 1)]
    while points:
        for images, truth in batches(train, _BATCH, draw=draw):
            learner.train()
            loss = F.cross_entropy(learner(images), row_of[truth])
            optimiser.forget_gradients()
            torch.autograd.backward(loss)
            optimiser.step()
            seen += len(truth)
            if seen >= points[0]:
                samples.append(seen)
                forget.append(_accuracy(learner, test, row_of))
                points = [point for point in points if point > seen]
            if not points:
                break
    return Relearned(tuple(samples), tuple(forget))


def with_all_rows(model: nn.Module, labels: Sequence[int], classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Return a copy of ``model`` whose last layer has rows of zeros after its own for the classes it lacks."""
    grown = copy.deepcopy(model)
    missing = classes - len(labels)
    if missing == 0:
        return grown
    path, _, attribute = head_layer(grown, torch.zeros((1, *shape))).rpartition(".")
    head: nn.Linear = getattr(grown.get_submodule(path), attribute)
    larger = nn.Linear(head.in_features, head.out_features + missing, bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        larger.weight.zero_()[: head.out_features] = head.weight
        if head.bias is not None:
            # Level with the others: a bias of 0 beside a trained -5 or +5 would be a head start or a handicap.
            larger.bias.fill_(float(head.bias.mean()))[: head.out_features] = head.bias
    setattr(grown.get_submodule(path), attribute, larger)
    return grown


def _all_labels(labels: Sequence[int], classes: int) -> list[int]:
    return [*labels, *sorted(set(range(classes)) - set(labels))]


def _accuracy(model: nn.Module, test: LabelledImages, row_of: torch.Tensor) -> float:
    return float((observe(model, test).logits.argmax(1) == row_of[test.labels]).double().mean())
