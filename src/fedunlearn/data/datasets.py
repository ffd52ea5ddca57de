"""Images of a torch data set, drawn from it batch by batch: nothing is copied, nothing but labels is kept.

``as_dataset`` goes the other way, for a train function of the user's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from fedunlearn.arguments import is_whole, must_be
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import DataError

_LOOKS = 64  # items that targets are held against


class _Nothing(Dataset[Any]):
    """A data set without images: fields after those with a default need one."""


@dataclass(frozen=True, eq=False, repr=False)
class DatasetImages(LabelledImages):
    """Labelled images that a data set gives when a batch is drawn, as the model takes them: see ``from_dataset``.

    Attributes:
        images: stands for their shape alone, it takes no memory.
        dataset: gives ``(image, label)`` for a row.
        rows: int64, the rows of the data set that these images are.
    """

    dataset: Dataset[Any] = field(default_factory=_Nothing)
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def stored(self, rows: Tensor | slice) -> Tensor:
        """Return the images at ``rows`` as the data set gives them, float32."""
        wanted = self.rows[rows].reshape(-1).tolist()
        return torch.stack([self._image(row) for row in wanted]) if wanted else torch.zeros(0, *self.shape)

    def pixels(self, rows: Tensor | slice) -> Tensor:
        """Return the images at ``rows`` as a model sees them: as the data set gives them."""
        return self.stored(rows)

    def take(self, rows: Tensor | slice) -> DatasetImages:
        """Return the images at ``rows``."""
        groups = None if self.groups is None else self.groups[rows]
        return self._of(self.dataset, self.rows[rows], self.labels[rows], groups)

    def followed_by(self, others: Sequence[LabelledImages], groups: Tensor | None) -> DatasetImages:
        """Return these images and those of ``others``, in order.

        Raises:
            DataError: some of them are kept as bytes.
        """
        parts: list[DatasetImages] = [self]
        for other in others:
            if not isinstance(other, DatasetImages):
                raise DataError("images of a data set and images in memory cannot be joined: give all clients one kind")
            parts.append(other)
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + _length(part.dataset))
        rows = torch.cat([part.rows + offset for part, offset in zip(parts, offsets)])
        dataset: Dataset[Any] = ConcatDataset([part.dataset for part in parts])
        return self._of(dataset, rows, torch.cat([part.labels for part in parts]), groups)

    def _of(self, dataset: Dataset[Any], rows: Tensor, labels: Tensor, groups: Tensor | None) -> DatasetImages:
        placeholder = _placeholder(len(rows), self.shape)
        return replace(self, images=placeholder, labels=labels, groups=groups, dataset=dataset, rows=rows)

    def _image(self, row: int) -> Tensor:
        image, _ = _item(self.dataset, row)
        if tuple(image.shape) != self.shape:
            raise DataError(
                f"the data set's image {row} has shape {tuple(image.shape)}, the first one {self.shape}: resize them"
            )
        return image


def from_dataset(
    dataset: Dataset[Any], classes: Sequence[str], *, labels: Sequence[int] | Tensor | None = None
) -> DatasetImages:
    """Return the images of ``dataset`` with their labels; an image is asked for when a batch needs it.

    A model sees what the data set gives, so it normalises images itself. It is asked by several threads at once. Where
    it draws at random (an augmentation), a run does not repeat bit for bit, and audits see what it happens to draw:
    give test images from a data set that does not.

    Args:
        dataset: ``dataset[i]`` is an image, float of any width and shape ``(colours, height, width)``, and its label.
        classes: the name of each class; labels count them from 0.
        labels: of all images; where None, ``dataset.targets``, which some of the items are held against, or what one
            pass over the data set tells.

    Raises:
        DataError: the data set has no length or is empty, an image is no float tensor of three axes, labels do not
            name the classes, or an item has another label than its target.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images = from_dataset(TensorDataset(torch.rand(6, 3, 8, 8), torch.arange(6) % 2), ("cat", "dog"))
        >>> images, images.counts().tolist()
        (DatasetImages(6 images 3x8x8, 2 classes), [3, 3])
    """
    must_be(Dataset, dataset, "from_dataset(dataset)", "a torch.utils.data.Dataset", DataError)
    count = _length(dataset)
    if count == 0:
        raise DataError("the data set holds no images: give one that does")
    first, _ = _item(dataset, 0)
    given = labels is not None
    if not given and getattr(dataset, "target_transform", None) is None:
        labels = getattr(dataset, "targets", None)
    found = [_item(dataset, row)[1] for row in range(count)] if labels is None else labels
    try:
        numbers, names = torch.as_tensor(found), classes if isinstance(classes, str) else tuple(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"labels must be whole numbers, one per image, and classes their names, but {error}: check "
            "from_dataset(classes, labels=...)"
        ) from error
    if numbers.is_floating_point() or numbers.shape != (count,):
        raise DataError(
            f"the data set has {count} images and labels of {numbers.dtype} and shape {tuple(numbers.shape)}: one "
            "whole number per image is needed, from_dataset(labels=...)"
        )
    if labels is not None and not given:
        _check_targets(dataset, numbers.tolist())
    colours, height, width = first.shape
    shape = (int(colours), int(height), int(width))
    return DatasetImages(
        _placeholder(count, shape),
        numbers.long(),
        names,  # type: ignore[arg-type]
        (0.0,) * shape[0],
        (1.0,) * shape[0],
        dataset=dataset,
        rows=torch.arange(count),
    )


def _check_targets(dataset: Dataset[Any], targets: Sequence[int]) -> None:
    """Refuse targets that items gainsay: a subclass may number or order its items anew and leave its targets alone."""
    for row in torch.linspace(0, len(targets) - 1, min(len(targets), _LOOKS)).long().tolist():
        _, label = _item(dataset, row)
        if targets[row] != label:
            raise DataError(
                f"the data set gives item {row} the label {label}, and its targets {targets[row]}: say which, "
                "from_dataset(labels=...)"
            )


def as_dataset(images: LabelledImages) -> Dataset[tuple[Tensor, int]]:
    """Return ``images`` as a torch data set: ``dataset[i]`` is an image as a model sees it, float32, and its label."""
    return _Images(images)


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: LabelledImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        try:
            number = operator.index(row)  # of numpy and torch too
        except TypeError as error:
            raise IndexError(f"there are {len(self)} images, got {row!r}: give the number of one") from error
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} images, got {number}")  # a loop over the data set ends by it
        place = number % len(self)
        return self._images.pixels(slice(place, place + 1))[0], int(self._images.labels[place])


def _placeholder(count: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.zeros((), dtype=torch.uint8).expand(count, *shape)


def _length(dataset: Dataset[Any]) -> int:
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(
            "the data set has no length, and a client must know how many images it holds: give one with __len__"
        ) from error


def _item(dataset: Dataset[Any], row: int) -> tuple[Tensor, int]:
    """Return an image, float32, and its label."""
    try:
        item = dataset[row]
    except Exception as error:  # the user's own code can fail in any way
        raise DataError(f"the data set fails at item {row} ({type(error).__name__}: {error})") from error
    try:
        image, label = item
    except (TypeError, ValueError) as error:
        raise DataError(f"the data set's item {row} is no pair of an image and a label: give (image, label)") from error
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
        found = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise DataError(
            f"the data set's image {row} is {found}, expected a float tensor (colours, height, width) as the model "
            "takes it: let the data set transform it, by ToTensor and Normalize of torchvision for example"
        )
    whole = int(label) if isinstance(label, Tensor) and label.numel() == 1 else label
    if not is_whole(whole, 0):
        raise DataError(f"the data set's label {row} is {label!r}, expected the number of a class, counted from 0")
    return image.detach().float(), int(whole)
