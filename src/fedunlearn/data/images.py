"""Labelled images: the one value that all data becomes."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedunlearn.errors import DataError

MOST_IMAGES = 10**9  # that one client may say it holds, or saw in a round
MOST_PIXELS = 10**8  # that an image may have, its colours counted, as one process says to another

COLOURS = (1, 3, 4)  # numbers of colours by which the axis of the colours is known
_CONSTANT = 1e-6


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one split with their labels, kept as bytes until a batch is drawn.

    Attributes:
        images: uint8, shape ``(images, colours, height, width)``.
        labels: int64, shape ``(images,)``, each in ``0 .. classes - 1``.
        classes: the name of each class, all different.
        mean: per colour, of pixels in [0, 1], ``0 <= mean <= 1``; a model sees ``(pixel / 255 - mean) / std``.
        std: per colour, of pixels in [0, 1], ``0 < std <= 1``.
        groups: int64, shape ``(images,)``, who made each image (a writer, a site), if known.

    Raises:
        DataError: shapes, types, labels or names do not fit together, or the normalisation is not of pixels in [0, 1].
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("images", "labels") if self.groups is None else ("images", "labels", "groups"):
            if not isinstance(getattr(self, name), Tensor):
                kind = type(getattr(self, name)).__name__
                raise DataError(f"{name} must be a tensor, got {kind}: torch.as_tensor makes one of an array or a list")
        self._check_images()
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape ({len(self.images)},), one per image, "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        _check_names(self.classes)
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(
                f"labels must lie in 0 .. {len(self.classes) - 1}, a number per name of a class, "
                f"got {int(self.labels.min())} .. {int(self.labels.max())}: count the classes from 0"
            )
        self._check_normalisation()
        if self.groups is not None and (self.groups.is_floating_point() or self.groups.shape != self.labels.shape):
            raise DataError(
                f"groups must have shape ({len(self.labels)},), a whole number per image, "
                f"got {self.groups.dtype} of shape {tuple(self.groups.shape)}"
            )

    def _check_images(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise DataError(
                "images must be uint8 of shape (images, colours, height, width), pixels in 0 .. 255, "
                f"got {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        _, first, second, last = self.images.shape
        if 0 in (first, second, last):
            raise DataError(f"images must have pixels, got the shape {tuple(self.images.shape)}")
        if last in COLOURS and first > max(COLOURS) and second != last:
            raise DataError(
                f"images must have the shape (images, colours, height, width), got {tuple(self.images.shape)}, which "
                "looks like (images, height, width, colours): use images.permute(0, 3, 1, 2)"
            )

    def _check_normalisation(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            numbers = isinstance(values, Sequence) and all(
                isinstance(value, int | float) and not isinstance(value, bool) for value in values
            )
            if not numbers or len(values) != self.colours:
                raise DataError(
                    f"{name} must be a tuple of {self.colours} floats, one value per colour, got {values!r}"
                )
        if not all(0 <= mean <= 1 for mean in self.mean) or not all(0 < std <= 1 for std in self.std):
            raise DataError(
                f"mean must lie in [0, 1] and std above 0, up to 1, for pixels scaled to [0, 1], got mean {self.mean} "
                f"and std {self.std}: divide by 255 what was measured on pixels of 0 to 255"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        colours, height, width = self.shape
        return f"{type(self).__name__}({len(self)} images {colours}x{height}x{width}, {len(self.classes)} classes)"

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

    def stored(self, rows: Tensor | slice) -> Tensor:
        """Return the images at ``rows`` as they are kept, shape ``(rows, colours, height, width)``."""
        return self.images[rows]

    def pixels(self, rows: Tensor | slice) -> Tensor:
        """Return the images at ``rows`` as a model sees them, float32, shape ``(rows, colours, height, width)``."""
        mean = torch.tensor(self.mean)[:, None, None] * 255
        scale = 1 / (torch.tensor(self.std)[:, None, None] * 255)
        return (self.stored(rows).float() - mean) * scale

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

    def only(self, classes: Collection[int]) -> LabelledImages:
        """Return the images of these classes; labels keep their numbers."""
        return self.take(torch.isin(self.labels, torch.tensor(sorted(classes))).nonzero().flatten())

    def narrowed(self, gone: Collection[int]) -> LabelledImages:
        """Return the images of all classes but ``gone`` as images of the others alone, which are numbered anew."""
        kept = [label for label in range(len(self.classes)) if label not in gone]
        rest = self.without(gone)
        numbers = torch.zeros(len(self.classes), dtype=torch.int64)
        numbers[kept] = torch.arange(len(kept))
        return replace(rest, labels=numbers[rest.labels], classes=tuple(self.classes[label] for label in kept))

    def followed_by(self, others: Sequence[LabelledImages], groups: Tensor | None) -> LabelledImages:
        """Return these images and those of ``others``, in order.

        Raises:
            DataError: some of them are of another kind.
        """
        for other in others:
            if type(other) is not type(self):
                raise DataError("images of a data set and images in memory cannot be joined: give all clients one kind")
        parts = (self, *others)
        return replace(
            self,
            images=torch.cat([part.images for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            groups=groups,
        )


@dataclass(frozen=True)
class Meaning:
    """What the images of all clients must agree in for their labels and pixels to mean the same.

    Attributes:
        shape: ``(colours, height, width)`` of one image.
        classes: the name of each class, in the order of the labels.
        mean: per colour, of pixels in [0, 1].
        std: per colour, of pixels in [0, 1].
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(images: LabelledImages) -> Meaning:
        """Return that of ``images``."""
        return Meaning(images.shape, tuple(images.classes), tuple(images.mean), tuple(images.std))

    def check(self) -> None:
        """Refuse what no images can have.

        Raises:
            DataError: see ``LabelledImages``; or an image has more than ``MOST_PIXELS`` values.
        """
        if any(side < 0 for side in self.shape) or math.prod(self.shape) > MOST_PIXELS:
            raise DataError(f"images must have pixels, at most {MOST_PIXELS:,} values, got the shape {self.shape}")
        nothing = torch.zeros(0, dtype=torch.int64)
        LabelledImages(nothing.new_zeros((0, *self.shape)).byte(), nothing, self.classes, self.mean, self.std)

    def difference(self, others: Meaning) -> str | None:
        """Return in what this differs from ``others``, or None."""
        if self.shape != others.shape or len(self.classes) != len(others.classes):
            return (
                f"images of shape {self.shape} in {len(self.classes)} classes, "
                f"the others {others.shape} in {len(others.classes)}"
            )
        for label, (mine, other) in enumerate(zip(self.classes, others.classes)):
            if mine != other:
                return f"images whose class {label} is {mine[:80]!r}, that of the others {other[:80]!r}"
        for name in ("mean", "std"):
            if getattr(self, name) != getattr(others, name):
                return f"images normalised by {name} {getattr(self, name)}, the others by {getattr(others, name)}"
        return None


def joined(parts: Iterable[LabelledImages]) -> LabelledImages:
    """Return all images of ``parts``, in order.

    Raises:
        DataError: they differ in shape, names of classes or normalisation.
    """
    first, *rest = parts
    if not rest:
        return first
    everyone = (first, *rest)
    for images in rest:
        why = Meaning.of(images).difference(Meaning.of(first))
        if why is not None:
            raise DataError(f"images that mean different things cannot be joined: {why}")
    groups = [images.groups for images in everyone if images.groups is not None]
    return first.followed_by(rest, torch.cat(groups) if len(groups) == len(everyone) else None)


def in_both(train: LabelledImages, test: LabelledImages) -> int:
    """Return how many images of ``test`` are images of ``train`` too, to the byte; none of a data set is looked at."""
    if train.shape != test.shape or type(train) is not LabelledImages or type(test) is not LabelledImages:
        return 0
    known, asked = ([hash(row.tobytes()) for row in part.images.numpy()] for part in (train, test))
    return sum(map(set(known).__contains__, asked))


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per colour of uint8 ``images``, pixels scaled to [0, 1].

    They come from the histogram of each colour, so no float copy of the images is made. The deviation of a colour
    that never changes, an opaque alpha for one, is given as 1: by a tiny one, any other value would drown the rest.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for colour in range(images.shape[1]):
        shares = torch.bincount(images[:, colour].flatten(), minlength=256).double()
        shares /= shares.sum()
        mean = float(shares @ values)
        means.append(mean)
        deviation = float(shares @ (values - mean) ** 2) ** 0.5
        deviations.append(deviation if deviation > _CONSTANT else 1.0)
    return tuple(means), tuple(deviations)


def _check_names(classes: Sequence[str]) -> None:
    """Refuse names of classes that are not text, or by which a class could not be told from another."""
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not all(isinstance(n, str) for n in classes):
        raise DataError(f"classes must be a tuple of names, one string per class, got {classes!r}")
    composed = [unicodedata.normalize("NFC", name) for name in classes]  # as names to forget are compared
    twice = [name for name, count in Counter(composed).items() if count > 1]
    if twice:
        raise DataError(f"the names of the classes must differ, {twice[0]!r} is there twice: name each class once")
