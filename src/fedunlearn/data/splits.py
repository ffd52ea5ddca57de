"""Training and test images of one source, fitted together."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedunlearn.data.images import LabelledImages, pixel_statistics
from fedunlearn.errors import DataError

TEST_SHARE = 0.2
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


def held_out(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Splits:
    """Hold out a fifth of each class for testing: the images that come first by the SHA-256 of class name and pixels.

    Images that a model was trained on must not become its test images when a class is deleted, or when a class has an
    image more or less: one more moves one other at most.
    """
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(classes):
        rows = (labels == label).nonzero().flatten().tolist()
        rows.sort(key=lambda row: hashlib.sha256(name.encode() + images[row].contiguous().numpy().tobytes()).digest())
        test[rows[: max(1, round(TEST_SHARE * len(rows)))]] = True
    return apart(images, labels, classes, test)


def apart(images: Tensor, labels: Tensor, classes: tuple[str, ...], test: Tensor) -> Splits:
    """Return the images of the mask ``test`` as those to test with, and the others; all normalised by the others."""
    pixels = pixel_statistics(images[~test])
    return Splits(
        LabelledImages(images[~test], labels[~test], classes, *pixels),
        LabelledImages(images[test], labels[test], classes, *pixels),
    )
