"""Batches: normalised float images drawn from bytes, with vectorised augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import DataError

# Images in a forward pass: more leave the cache of a core, fewer cost small models more calls than they save.
FORWARD_BATCH = 128
_PADDING = 4
_CUTOUT = 16


def crop(images: Tensor, draw: torch.Generator) -> Tensor:
    """Pad each image by 4 pixels of the mean colour and cut out its old size at a place of its own."""
    return _shifted(F.pad(images, (_PADDING,) * 4), draw)


def translate(images: Tensor, draw: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels either way; what comes in over an edge mirrors what is beside it."""
    return _shifted(F.pad(images, (_PADDING,) * 4, mode="reflect"), draw)


def _shifted(padded: Tensor, draw: torch.Generator) -> Tensor:
    """Return of each image in ``padded`` a part without the width of the padding, at a place of its own."""
    n, _, height, width = padded.shape
    height, width = height - 2 * _PADDING, width - 2 * _PADDING
    top, left = torch.randint(0, 2 * _PADDING + 1, (2, n), generator=draw)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def flip(images: Tensor, draw: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(images), generator=draw) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def cutout(images: Tensor, draw: torch.Generator) -> Tensor:
    """Blank a 16 x 16 square around a random pixel of each image; it may reach over the border."""
    n, _, height, width = images.shape
    y = torch.randint(0, height, (n, 1), generator=draw)
    x = torch.randint(0, width, (n, 1), generator=draw)
    half = _CUTOUT // 2
    in_rows = (torch.arange(height) >= y - half) & (torch.arange(height) < y + half)
    in_columns = (torch.arange(width) >= x - half) & (torch.arange(width) < x + half)
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "crop": crop,
    "translate": translate,
    "flip": flip,
    "cutout": cutout,
}


def batches(
    images: LabelledImages,
    size: int,
    *,
    limit: int | None = None,
    draw: torch.Generator | None = None,
    augment: Sequence[str] = (),
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.channels_last,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(float images, labels)``: in order without ``draw``, shuffled (and augmented) with it.

    Args:
        images: where the batches come from.
        size: images in a batch. A last batch of one image joins the batch before it, because
            batch normalisation cannot train on a single value.
        limit: stop after so many images.
        draw: the owner of the shuffle and of the augmentation.
        augment: names in ``AUGMENTATIONS``, applied in this order; needs ``draw``.
        device: where the batches go.
        memory_format: how they lie there.

    Raises:
        DataError: an augmentation needs larger images.
    """
    if "translate" in augment and min(images.shape[1:]) <= _PADDING:
        raise DataError(
            f"translate mirrors {_PADDING} pixels and needs images of more than {_PADDING} x {_PADDING}, got "
            f"{images.shape[2]} x {images.shape[1]}: take it out of augment"
        )
    total = len(images) if limit is None else min(limit, len(images))
    order = torch.randperm(len(images), generator=draw) if draw is not None else torch.arange(len(images))
    for rows in torch.split(order[:total], sizes(total, size)):
        batch = images.pixels(rows)
        for name in augment:
            assert draw is not None  # who augments gives the draw
            batch = AUGMENTATIONS[name](batch, draw)
        yield batch.to(device, memory_format=memory_format), images.labels[rows].to(device)


def sizes(total: int, size: int) -> list[int]:
    """Return how many images each batch of about ``size`` has; a last one of one image joins the batch before it.

    Example:
        >>> sizes(10, 4), sizes(9, 4)
        ([4, 4, 2], [4, 5])
    """
    full, left = divmod(total, size)
    found = [size] * full + [left] * (left > 0)
    if (left == 1 and full) or (size == 1 and full > 1):
        found[-2:] = [found[-2] + 1]
    return found
