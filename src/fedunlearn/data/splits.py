"""Training and test images of one source, fitted together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedunlearn.data.images import LabelledImages, pixel_statistics
from fedunlearn.errors import DataError
from fedunlearn.seeding import generator

_TEST_SHARE = 0.2
_logger = logging.getLogger(__name__)


class Splits(NamedTuple):
    """Training images (which clients share) and test images (which nobody chooses by)."""

    train: LabelledImages
    test: LabelledImages


def labelled(
    path: Path,
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    pixels: tuple[tuple[float, ...], tuple[float, ...]],
) -> LabelledImages:
    """Return labelled images; where they do not fit together, say in which file."""
    try:
        return LabelledImages(images, labels, classes, *pixels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def both(path: Path, train: LabelledImages, test: LabelledImages) -> Splits:
    """Return both; refuse test images of another shape, which no model takes, and log classes without images."""
    if train.shape != test.shape:
        raise DataError(
            f"{path}: expected test images of shape {train.shape} (colours, height, width) like those to train on, "
            f"got {test.shape}: resize them (data.size for a folder)"
        )
    absent = [name for name, count in zip(train.classes, train.counts().tolist()) if count == 0]
    if absent:
        _logger.warning("%s: %d classes have no image to train on (%s)", path, len(absent), ", ".join(absent[:5]))
    return Splits(train, test)


def held_out(images: Tensor, labels: Tensor, classes: tuple[str, ...], *, fifth: int = 0) -> Splits:
    """Hold out a fifth of each class for testing, drawn once and for all (seed 0) by its name.

    A number changes when a class before it is deleted, and images that a model was trained on would be its test.
    """
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(classes)):
        rows = (labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator(0, "test", classes[label]))
        count = max(1, round(_TEST_SHARE * len(rows)))
        test[rows[order[fifth * count : (fifth + 1) * count]]] = True
    pixels = pixel_statistics(images[~test])
    return Splits(
        LabelledImages(images[~test], labels[~test], classes, *pixels),
        LabelledImages(images[test], labels[test], classes, *pixels),
    )
