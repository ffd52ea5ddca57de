"""The erase step: how a client that still holds images of the forgotten classes trains on them, by no target of theirs.

What these images add to the loss, with logits and features of the model as it is, needs neither another model nor
anything that a client would have to keep from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedunlearn.arguments import is_count, is_part, is_share, is_weight
from fedunlearn.errors import RecipeError
from fedunlearn.training.objectives.base import Seen, in_range

_RIDGE = 0.1  # of the mean variance: a batch has hardly more images than features
_LEAST = 1e-12


@dataclass(frozen=True)
class Erasing:
    """What clients add to their loss while they still hold images of the forgotten classes.

    Attributes:
        complement: weight of ``complement``.
        separation: weight of ``separation``.
        share: about the part of each batch that is of a forgotten class, at least an image; of several ``each_of``.
        until: share of the rounds, the first ones, in which it is done; the others train on the other classes alone.
        every: of these rounds it is done in the first and then in every ``every``-th, so that what the rounds between
            bring back is erased again.

    Raises:
        RecipeError: a value is out of range, or both weights are 0.
    """

    complement: float = 1.0
    separation: float = 0.0
    share: float = 0.25
    until: float = 1.0
    every: int = 1
    kind: Literal["erase"] = "erase"

    def __post_init__(self) -> None:
        weights = {"complement": is_weight, "separation": is_weight}
        in_range(self, **weights, share=is_part, until=is_share, every=is_count)
        if self.complement == self.separation == 0:
            raise RecipeError("Erasing(complement=..., separation=...) are both 0, so that nothing is erased: set one")

    @property
    def teacher(self) -> bool:
        """Nothing is distilled."""
        return False

    def loss(self, seen: Seen) -> Tensor:
        """Return the cross-entropy of the kept images, and what the others add to it, each by its share of a batch."""
        share = float(seen.forgotten.float().mean())
        added = seen.logits.new_zeros(())
        if self.complement:
            added = added + self.complement * complement(seen.logits[seen.forgotten], seen.forget)
        if self.separation:
            added = added + self.separation * separation(seen.features, seen.forgotten)
        return (1 - share) * seen.cross_entropy(~seen.forgotten) + share * added


def complement(logits: Tensor, forget: Sequence[int]) -> Tensor:
    """Return the mean of ``-log(1 - sum_{k in forget} p_k)`` with ``p = softmax(logits)``.

    Its gradient is that of distilling the model from itself with the forgotten classes masked out: the other classes
    keep their ratios.

    Args:
        logits: of images of the forgotten classes, shape ``(images, classes)``.
        forget: the forgotten classes.

    Example:
        >>> complement(torch.tensor([[0.0, 0.0]]), [1])  # -log(1/2)
        tensor(0.6931)
    """
    rows = [label for label in range(logits.shape[1]) if label not in forget]
    return (logits.logsumexp(1) - logits[:, rows].logsumexp(1)).mean()


def separation(features: Tensor, forgotten: Tensor) -> Tensor:
    """Return how far the forgotten classes lie from the others in the features of a batch, in their deviations.

    With the means ``a`` and ``b`` of the two groups and the covariance ``C`` of all, the direction that tells them
    apart best is ``w = (C + r I)^-1 (a - b)``, ``r`` a tenth of the mean variance. The result is
    ``w . (a - b) / sd(w . h)``; ``w`` and the deviation count as constants in its gradient. Several classes count as
    one group. Of few images for the width of the features, some direction tells any two groups apart: the term never
    comes to rest, its weight has to be small.

    Args:
        features: ``h``, shape ``(images, width)``.
        forgotten: which images are of the forgotten classes, bool, shape ``(images,)``; some are, some are not.
    """
    h = features.float()
    apart = h[forgotten].mean(0) - h[~forgotten].mean(0)
    with torch.no_grad():
        centred = h - h.mean(0)
        covariance = centred.T @ centred / len(h)
        ridge = (_RIDGE * covariance.diagonal().mean()).clamp_min(_LEAST)  # features may be constant
        direction = torch.linalg.solve(covariance + ridge * torch.eye(h.shape[1], device=h.device), apart)
        direction /= (centred @ direction).std().clamp_min(_LEAST)
    return torch.dot(direction, apart)
