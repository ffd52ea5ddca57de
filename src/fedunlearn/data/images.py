"""Labelled images: the one value that all data becomes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedunlearn.errors import DataError


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one split with their labels, kept as bytes until a batch is drawn.

    Attributes:
        images: uint8, shape ``(images, colours, height, width)``.
        labels: int64, shape ``(images,)``, each in ``0 .. classes - 1``.
        classes: the name of each class.
        mean: per colour, of pixels in [0, 1]; a model sees ``(pixel / 255 - mean) / std``.
        std: per colour, of pixels in [0, 1].
        groups: int64, shape ``(images,)``, who made each image (a writer, a site), if known.

    Raises:
        DataError: shapes, types or labels do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise DataError(
                "images must be uint8 of shape (images, colours, height, width), "
                f"got {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape ({len(self.images)},), one per image, "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(
                f"labels must lie in 0 .. {len(self.classes) - 1}, "
                f"got {int(self.labels.min())} .. {int(self.labels.max())}"
            )
        if not len(self.mean) == len(self.std) == self.colours or not all(s > 0 for s in self.std):
            raise DataError(
                f"mean and std need one value per colour ({self.colours}), std above 0, got {self.mean} and {self.std}"
            )
        if self.groups is not None and self.groups.shape != self.labels.shape:
            raise DataError(
                f"groups must have shape ({len(self.labels)},), one per image, got {tuple(self.groups.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        colours, height, width = self.shape
        return f"LabelledImages({len(self)} images {colours}x{height}x{width}, {len(self.classes)} classes)"

    @property
    def colours(self) -> int:
        """Channels of one image."""
        return int(self.images.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(colours, height, width)`` of one image."""
        _, colours, height, width = self.images.shape
        return colours, height, width

    def counts(self) -> Tensor:
        """Return how many images each class has, int64, shape ``(classes,)``."""
        return torch.bincount(self.labels, minlength=len(self.classes))

    def take(self, rows: Tensor | slice) -> LabelledImages:
        """Return the images at ``rows``: a view for a slice, a copy for an index."""
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, images=self.images[rows], labels=self.labels[rows], groups=groups)

    def without(self, classes: Collection[int]) -> LabelledImages:
        """Return the images of all classes but these; labels keep their numbers."""
        if not classes:
            return self
        unwanted = torch.isin(self.labels, torch.tensor(sorted(classes)))
        return self.take((~unwanted).nonzero().flatten())


def joined(parts: Iterable[LabelledImages]) -> LabelledImages:
    """Return all images of ``parts``, which agree in shape, classes and normalisation, in order."""
    first, *rest = parts
    if not rest:
        return first
    everyone = (first, *rest)
    groups = [own.groups for own in everyone if own.groups is not None]
    return replace(
        first,
        images=torch.cat([own.images for own in everyone]),
        labels=torch.cat([own.labels for own in everyone]),
        groups=torch.cat(groups) if len(groups) == len(everyone) else None,
    )


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per colour of uint8 ``images``, pixels scaled to [0, 1].

    They come from the histogram of each colour, so no float copy of the images is made.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for colour in range(images.shape[1]):
        shares = torch.bincount(images[:, colour].flatten(), minlength=256).double()
        shares /= shares.sum()
        mean = float(shares @ values)
        means.append(mean)
        deviations.append(max(float(shares @ (values - mean) ** 2) ** 0.5, 1e-6))
    return tuple(means), tuple(deviations)
