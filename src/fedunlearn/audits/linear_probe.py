"""Audit: is the class still separable in the frozen features?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View, alike, by_class, error_by_class
from fedunlearn.audits.images import AuditImages

_STEPS = 300


def linear_probe(features: Tensor, truth: Tensor, test_features: Tensor) -> Tensor:
    """Return the class that a linear probe names for each test image.

    The probe is multinomial logistic regression on standardised features (L2 coefficient 1), trained with images of
    all classes, the forgotten ones included::

        argmax_k  w_k . (h - mean) / std + b_k

    Args:
        features: ``h`` of the training images, shape ``(images, width)``.
        truth: their classes, int64, shape ``(images,)``.
        test_features: shape ``(test images, width)``.

    Returns:
        int64, shape ``(test images,)``.

    Example:
        >>> h = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> linear_probe(h, torch.tensor([0, 0, 7, 7]), torch.tensor([[2.0], [9.0]]))
        tensor([0, 7])
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))
    with warnings.catch_warnings():
        # All models get as many steps; those of one that is not quite there yet are as comparable.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features.double().numpy(), truth.numpy())
    return torch.from_numpy(probe.predict(test_features.double().numpy()))


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    truth = images.test.labels
    right = linear_probe(seen.known.features, images.known.labels, seen.test.features) == truth
    of_class = torch.isin(truth, torch.tensor(images.forget))
    found = by_class(right[of_class], truth[of_class])
    if alike(torch.cat([seen.known.features, seen.test.features])):
        guess = 1 / len(images.known.classes)
        found = Figure(guess, error_by_class(guess, truth[of_class]))
    return Found(
        {"probe": found},
        {"probe_retain": float(right[~of_class].double().mean())},
    )


AUDIT = Audit(
    "linear_probe",
    {
        "probe": FigureKind(
            "linear probe",
            "Can a linear probe on the frozen features tell the class?",
            "class",
            "recognised by a simple reader of the model's inside",
        )
    },
    _measure,
)
