"""Audit: do a few images of each class bring the class back?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View, alike, error_by_class
from fedunlearn.audits.images import AuditImages
from fedunlearn.seeding import generator

_SHOTS = (1, 5, 10)
_DRAWS = 50


def prototype_accuracy(
    features: Tensor,
    truth: Tensor,
    test_features: Tensor,
    test_truth: Tensor,
    *,
    shots: int,
    draws: int,
    draw: torch.Generator,
) -> Tensor:
    """Return, per draw, the share of test images whose nearest class prototype is their own's, the mean over classes.

    With ``h' = h / |h|`` and ``p_k`` the mean of ``h'`` over ``shots`` random images of class ``k``, all classes
    included, an image is named ``argmin_k |h' - p_k|``; where ``m`` prototypes are equally near, it counts ``1/m`` if
    its own is one of them. Of features that are all alike the share is that of chance.

    Args:
        features: ``h`` of the images to draw from, shape ``(images, width)``.
        truth: their classes, int64, shape ``(images,)``.
        test_features: shape ``(test images, width)``.
        test_truth: their classes, int64, shape ``(test images,)``.
        shots: images per class; all where a class has fewer.
        draws: how often to draw.
        draw: owner of the draws.

    Returns:
        Shares, float64, shape ``(draws,)``.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> prototype_accuracy(h, torch.tensor([0, 1]), h, torch.tensor([0, 1]), shots=1, draws=2,
        ...                    draw=torch.Generator())
        tensor([1., 1.], dtype=torch.float64)
    """
    # In float64, and not as a product of matrices: a large channel would cancel what tells the images apart.
    unit, test_unit = F.normalize(features.double()), F.normalize(test_features.double())
    classes = torch.tensor(sorted(set(truth.tolist())))
    if alike(torch.cat([unit, test_unit])):
        return torch.full((draws,), 1 / len(classes), dtype=torch.float64)
    shares = []
    for _ in range(draws):
        prototypes = []
        for label in classes:
            rows = (truth == label).nonzero().flatten()
            chosen = rows[torch.randperm(len(rows), generator=draw)[:shots]]
            prototypes.append(unit[chosen].mean(0))
        away = torch.cdist(test_unit, torch.stack(prototypes), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = (away == away.amin(1, keepdim=True)).double()
        right = ((classes == test_truth[:, None]) * nearest).sum(1) / nearest.sum(1)
        shares.append(fmean(float(right[test_truth == label].mean()) for label in torch.unique(test_truth)))
    return torch.tensor(shares, dtype=torch.float64)


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    of_class = torch.isin(images.test.labels, torch.tensor(images.forget))
    found = Found(details={"prototype_draws": {}})
    for shots in _SHOTS:
        shares = prototype_accuracy(
            seen.known.features,
            images.known.labels,
            seen.test.features[of_class],
            images.test.labels[of_class],
            shots=shots,
            draws=_DRAWS,
            draw=generator(images.seed, "audit", "prototypes", shots),
        )
        mean = float(shares.mean())
        found.figures[f"prototype_{shots}"] = Figure(mean, error_by_class(mean, images.test.labels[of_class]))
        found.details["prototype_draws"][str(shots)] = [float(shares.quantile(q)) for q in (0.05, 0.5, 0.95)]
    return found


AUDIT = Audit(
    "prototypes",
    {
        "prototype_1": FigureKind(
            "1-shot prototypes",
            "Does one image per class bring it back (nearest prototype)?",
            "class",
            "recognised from one sample image of each class",
        ),
        "prototype_5": FigureKind(
            "5-shot prototypes",
            "Do five images per class?",
            "class",
            "recognised from five sample images of each class",
        ),
        "prototype_10": FigureKind(
            "10-shot prototypes", "Do ten?", "class", "recognised from ten sample images of each class"
        ),
    },
    _measure,
)
