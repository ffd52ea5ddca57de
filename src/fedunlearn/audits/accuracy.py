"""Audit: which classes does the model name?

``U`` is the accuracy on the forgotten classes, their mean, with their output rows in place; ``R`` that on all images of
the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View, by_class, share
from fedunlearn.audits.images import AuditImages
from fedunlearn.audits.observe import observe
from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages


def confusion(logits: Tensor, truth: Tensor, *, labels: Sequence[int], classes: int) -> Tensor:
    """Return how many images of each class are given each name.

    ``counts[u, v] = #{x : truth[x] = u, labels[argmax_r logits[x, r]] = v}``

    Args:
        logits: shape ``(images, rows)``.
        truth: int64, shape ``(images,)``.
        labels: the class of each output row.
        classes: number of classes.

    Returns:
        int64, shape ``(classes, classes)``; the column of a class without a row is 0.

    Example:
        >>> confusion(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 2]), labels=[0, 1], classes=3)
        tensor([[1, 0, 0],
                [0, 0, 0],
                [0, 1, 0]])
    """
    named = torch.tensor(list(labels))[logits.argmax(1)]
    return torch.bincount(truth * classes + named, minlength=classes**2).reshape(classes, classes)


def accuracy(model: nn.Module | Classifier, images: LabelledImages) -> Figure:
    """Return how often ``model``, which has a row for every class, names the class of an image: ``by_class``."""
    return by_class(observe(model, images).logits.argmax(1) == images.labels, images.labels)


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    classes = len(images.test.classes)
    table = confusion(seen.test.logits, images.test.labels, labels=subject.labels, classes=classes)
    right, counts, kept = table.diagonal(), table.sum(1), list(images.kept)
    found = Found({"retain": share(int(right[kept].sum()), int(counts[kept].sum()))}, {"confusion": table.tolist()})
    if subject.row_kept is not None:  # without a row U is 0 whatever the model knows
        found.figures["forget"] = accuracy(subject.row_kept, images.forgotten(images.test))
    return found


AUDIT = Audit(
    "accuracy",
    {
        "forget": FigureKind(
            "U, row in place",
            "Does the model still name the class, its output row in place where it is known?",
            "class",
            "named right",
        ),
        "retain": FigureKind("R, other classes", "Does it still name the others?", "near"),
    },
    _measure,
)
