"""Audit: what is each class named?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
