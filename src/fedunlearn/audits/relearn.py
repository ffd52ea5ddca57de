"""Audit: how fast does training bring the class back?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View, by_class, error_by_class, row_labels
from fedunlearn.audits.images import AuditImages
from fedunlearn.audits.observe import logits_of
from fedunlearn.channels.copying import copied
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.kinds import resize
from fedunlearn.channels.plan import Classifier
from fedunlearn.data.batches import batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.seeding import drawing, generator
from fedunlearn.training.sgd import Sgd

_BATCH = 64
_DOUBLINGS = 5


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
    model: Classifier,
    train: LabelledImages,
    test: LabelledImages,
    *,
    lr: float,
    doublings: int,
    draw: torch.Generator,
) -> Relearned:
    """Train a copy of ``model`` on all classes and return how U grows; rows that are gone start again from 0.

    SGD with momentum .9, batches of 64. U is measured when ``64, 128, ..., 64 * 2**doublings`` images are reached: a
    few more where an epoch ends in a smaller batch.

    Args:
        model: the model as delivered.
        train: images of all classes.
        test: test images of the forgotten classes.
        lr: learning rate.
        doublings: length of the training.
        draw: owner of the shuffles.
    """
    classes = len(train.classes)
    grown = with_all_rows(model, classes)
    learner = grown.module.requires_grad_(True)  # whoever relearns does not leave frozen what was delivered so
    device = next(learner.parameters()).device
    row_of = torch.empty(classes, dtype=torch.int64)
    row_of[torch.tensor(grown.labels)] = torch.arange(classes)
    rows = row_of.to(device)
    optimiser = Sgd(learner.parameters(), lr=lr, momentum=0.9)
    samples, forget, seen = [0], [_accuracy(learner, test, row_of)], 0
    points = [_BATCH * 2**k for k in range(doublings + 1)]
    with drawing(draw.initial_seed(), device):
        while points:
            for images, truth in batches(train, _BATCH, draw=draw, device=device):
                learner.train()
                loss = F.cross_entropy(learner(images), rows[truth])
                optimiser.zero_grad()
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


def with_all_rows(model: Classifier, classes: int) -> Classifier:
    """Return a copy of ``model`` whose last layer has new rows of zeros, after the others, for the classes it lacks."""
    labels = row_labels(model)
    missing = sorted(set(range(classes)) - set(labels))
    module = copied(model.module)
    grown = replace(model, module=module, labels=(*labels, *missing))
    if not missing:
        return grown
    path, _, attribute = head_layer(module, model.example).rpartition(".")
    head: nn.Linear | nn.Conv2d = getattr(module.get_submodule(path), attribute)
    new = head.weight.new_zeros((len(missing), *head.weight.shape[1:]))
    head.weight = nn.Parameter(torch.cat([head.weight.detach(), new]))
    if head.bias is not None:
        # Level with the others: a bias of 0 beside a trained -5 or +5 would be a head start or a handicap.
        level = head.bias.detach().mean().expand(len(missing))
        head.bias = nn.Parameter(torch.cat([head.bias.detach(), level]))
    resize(head, attribute, None)
    return grown


def _accuracy(model: nn.Module, test: LabelledImages, row_of: torch.Tensor) -> float:
    return by_class(logits_of(model, test).argmax(1) == row_of[test.labels], test.labels).value


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    forgotten = images.forgotten(images.test)
    # A row that was left in place can be at its end (a bias of -60) or at its beginning, whatever the features know.
    rows = set(subject.labels) & set(images.forget)
    curve = relearn(
        subject.model.without_rows(rows) if rows and not seen.before else subject.model,
        images.known,
        forgotten,
        lr=images.lr,
        doublings=_DOUBLINGS,
        draw=generator(images.seed, "audit", "relearn"),
    )
    return Found(
        {"relearn": Figure(curve.mean(), error_by_class(curve.mean(), forgotten.labels))},
        {"relearn": {"samples": list(curve.samples), "forget": list(curve.forget)}},
    )


AUDIT = Audit(
    "relearn",
    {
        "relearn": FigureKind(
            "relearning",
            "How far does a short training bring it back (mean U along the curve)?",
            "class",
            "named right in the mean while the class is taught again",
        )
    },
    _measure,
)
