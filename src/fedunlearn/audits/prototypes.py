"""Audit: do a few images of each class bring the class back?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def prototype_accuracy(
    features: Tensor,
    truth: Tensor,
    test_features: Tensor,
    test_truth: Tensor,
    *,
    shots: int,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Return, per draw, the share of test images whose nearest class prototype is that of their class.

    With ``h' = h / |h|`` and ``p_k`` the mean of ``h'`` over ``shots`` random images of class ``k``, all classes
    included, an image is named ``argmin_k |h' - p_k|``.

    Args:
        features: ``h`` of the images to draw from, shape ``(images, width)``.
        truth: their classes, int64, shape ``(images,)``.
        test_features: shape ``(test images, width)``.
        test_truth: their classes, int64, shape ``(test images,)``.
        shots: images per class; all where a class has fewer.
        draws: how often to draw.
        generator: owner of the draws.

    Returns:
        Shares, float64, shape ``(draws,)``.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> prototype_accuracy(h, torch.tensor([0, 1]), h, torch.tensor([0, 1]), shots=1, draws=2,
        ...                    generator=torch.Generator())
        tensor([1., 1.], dtype=torch.float64)
    """
    unit, test_unit = F.normalize(features), F.normalize(test_features)
    classes = torch.tensor(sorted(set(truth.tolist())))
    shares = []
    for _ in range(draws):
        prototypes = []
        for label in classes:
            rows = (truth == label).nonzero().flatten()
            chosen = rows[torch.randperm(len(rows), generator=generator)[:shots]]
            prototypes.append(unit[chosen].mean(0))
        named = classes[torch.cdist(test_unit, torch.stack(prototypes)).argmin(1)]
        shares.append((named == test_truth).double().mean())
    return torch.stack(shares)
