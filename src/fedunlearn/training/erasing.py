"""The erase step: how a client that still holds images of the forgotten classes trains on them, by no target of theirs.

A part of each batch are such images. What they add to the loss, with logits and features of the model as it is, needs
neither another model nor anything that a client would have to keep from round to round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedunlearn.arguments import is_number
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import RecipeError

Drawn = Callable[..., Iterator[tuple[Tensor, Tensor]]]

_RIDGE = 0.1  # of the mean variance: a batch has hardly more images than features
_LEAST = 1e-12


@dataclass(frozen=True)
class Erasing:
    """What clients add to their loss while they still hold images of the forgotten classes.

    Attributes:
        complement: weight of ``complement``.
        separation: weight of ``separation``.
        share: about the part of each batch that is of the forgotten classes, at least an image.
        until: share of the rounds, the first ones, in which it is done; the others train on the other classes alone.

    Raises:
        RecipeError: a value is out of range, or both weights are 0.
    """

    complement: float = 1.0
    separation: float = 0.0
    share: float = 0.25
    until: float = 1.0

    def __post_init__(self) -> None:
        for name, valid in {
            "complement": is_number(self.complement) and self.complement >= 0,
            "separation": is_number(self.separation) and self.separation >= 0,
            "share": is_number(self.share) and 0 < self.share < 1,
            "until": is_number(self.until) and 0 < self.until <= 1,
        }.items():
            if not valid:
                raise RecipeError(f"Erasing({name}=...) is out of range: got {getattr(self, name)!r}")
        if self.complement == self.separation == 0:
            raise RecipeError("Erasing(complement=..., separation=...) are both 0, so that nothing is erased: set one")

    def loss(self, logits: Tensor, features: Tensor, labels: Tensor, forget: Sequence[int]) -> Tensor:
        """Return what the images of the forgotten classes add to the loss of a batch.

        Args:
            logits: shape ``(images, classes)``.
            features: what the last layer receives, shape ``(images, width)``.
            labels: shape ``(images,)``; some are forgotten, some are not.
            forget: the forgotten classes.
        """
        forgotten = is_forgotten(labels, forget)
        added = logits.new_zeros(())
        if self.complement:
            added = added + self.complement * complement(logits[forgotten], forget)
        if self.separation:
            added = added + self.separation * separation(features, forgotten)
        return added


def is_forgotten(labels: Tensor, forget: Sequence[int]) -> Tensor:
    """Return which of ``labels`` are among the classes ``forget``, bool."""
    return torch.isin(labels, torch.tensor(list(forget), device=labels.device))


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


def again_and_again(
    drawn: Drawn, forgotten: LabelledImages, size: int, share: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what batches of ``size`` images take from ``forgotten``, without end; each image once before any again."""
    while True:
        yield from drawn(forgotten, _few(size, share), limit=None)


def mixed(
    drawn: Drawn,
    erased: Iterator[tuple[Tensor, Tensor]],
    share: float,
    kept: LabelledImages,
    size: int,
    *,
    limit: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of about ``size`` images, about a part of each of the forgotten classes.

    Args:
        drawn: draws shuffled batches: ``drawn(images, size, limit=...)``.
        erased: see ``again_and_again``.
        share: the part, at least an image.
        kept: images of the other classes; each at most once.
        size: images in a batch.
        limit: stop after about so many images.
    """
    for images, labels in drawn(kept, size - _few(size, share), limit=_kept(len(kept), size, share, limit)):
        forgotten = next(erased)
        yield torch.cat([images, forgotten[0]]), torch.cat([labels, forgotten[1]])


def fewest(kept: int, forgotten: int, size: int, share: float, limit: int) -> int:
    """Return how many different images of either kind, whichever are fewer, the first pass of ``mixed`` takes.

    Example:
        >>> fewest(1000, 100, size=64, share=0.25, limit=128)  # of 96 and 32
        32
    """
    few = _few(size, share)
    part, drawn = size - few, _kept(kept, size, share, limit)
    steps = -(-drawn // part) - (drawn > 1 and drawn % part == 1 % part)  # an image left over joins the batch before it
    return min(drawn, forgotten, max(1, steps) * few)


def _kept(kept: int, size: int, share: float, limit: int) -> int:
    return min(kept, max(1, round(limit * (size - _few(size, share)) / size)))


def _few(size: int, share: float) -> int:
    return min(max(1, round(share * size)), size - 1)
