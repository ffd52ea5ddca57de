"""Batches of which a part is of the forgotten classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedunlearn.data.images import LabelledImages

Drawn = Callable[..., Iterator[tuple[Tensor, Tensor]]]


def is_forgotten(labels: Tensor, forget: Sequence[int]) -> Tensor:
    """Return which of ``labels`` are among the classes ``forget``, bool."""
    return torch.isin(labels, torch.tensor(list(forget), device=labels.device))


def share_of(share: float, classes: int) -> float:
    """Return the part of a batch that ``k`` forgotten classes have: ``k s / (1 + (k - 1) s)``.

    Each has as many images beside the kept ones as one class alone, whose part is ``s``.

    Example:
        >>> share_of(0.25, 3)  # one image of each class for three kept ones
        0.5
    """
    return classes * share / (1 + (classes - 1) * share)


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
