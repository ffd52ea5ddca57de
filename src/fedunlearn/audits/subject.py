"""What is audited: a model as delivered.

And the images it is audited with, which are the same for every model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedunlearn.channels.groups import head_layer
from fedunlearn.channels.plan import plan_without_rows, prune
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import DataError
from fedunlearn.seeding import generator

_COMPARED = 500


@dataclass(frozen=True, eq=False)
class Subject:
    """A model as delivered.

    Attributes:
        model: the CNN.
        labels: the class of each of its output rows.
        row_kept: the same model with a row for every class, where it is known; it can show what the missing rows hide.
    """

    model: nn.Module
    labels: tuple[int, ...]
    row_kept: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class AuditImages:
    """The images that audits are done with; every model is audited with the same.

    Attributes:
        known: training images of all classes, equally many of each where there are enough.
        members: training images for the question who was in the training set: all of the forgotten classes, as many of
            the others; none that is also a test image.
        test: test images.
        others: rows of ``test`` that are not also training images.
        compared: rows of ``test`` on which layers are compared.
        forget: the forgotten classes.
        seed: owner of all draws.
    """

    known: LabelledImages
    members: LabelledImages
    test: LabelledImages
    others: Tensor
    compared: Tensor
    forget: tuple[int, ...]
    seed: int

    @property
    def duplicates(self) -> int:
        """Test images that are training images too."""
        return len(self.test) - len(self.others)

    @property
    def kept(self) -> tuple[int, ...]:
        """The classes that are not forgotten."""
        return tuple(label for label in range(len(self.test.classes)) if label not in self.forget)

    def forgotten(self, images: LabelledImages) -> LabelledImages:
        """Return the images of the forgotten classes."""
        return images.without(self.kept)


def without_rows(
    model: nn.Module, forget: Sequence[int], *, classes: int, shape: tuple[int, int, int], row_known: bool = True
) -> Subject:
    """Return ``model``, which has a row for every class, delivered without those of ``forget``.

    Args:
        model: the CNN.
        forget: classes whose rows go.
        classes: number of classes.
        shape: ``(colours, height, width)`` of the images.
        row_known: keep the model with all its rows for the audits that need one; not so for a model whose only edit
            is that its rows are gone.
    """
    head = head_layer(model, torch.zeros((1, *shape)))
    labels = tuple(label for label in range(classes) if label not in forget)
    delivered = prune(model, plan_without_rows(model, head, forget))
    return Subject(delivered, labels, model if row_known else None)


def audit_images(
    train: LabelledImages, test: LabelledImages, *, forget: Sequence[int], per_class: int, seed: int
) -> AuditImages:
    """Return the images to audit with.

    Args:
        train: what the original was trained on: all clients' images, or those of the client who audits.
        test: images it was not trained on.
        forget: the forgotten classes.
        per_class: at most so many images of each class in ``known``.
        seed: owner of the draws.

    Raises:
        DataError: training or test images lack a forgotten class, or there are none of the kept ones.
    """
    wanted = tuple(sorted(forget))
    for name, images in (("training", train), ("test", test)):
        counts = images.counts()
        for label in wanted:
            if int(counts[label]) == 0:
                raise DataError(
                    f"the {name} images hold none of class {label} ({images.classes[label]}): an audit of how it was "
                    "forgotten needs some: give data, or a client, with images of it"
                )
        if len(images.without(wanted)) == 0:
            raise DataError(f"the {name} images hold forgotten classes only: an audit needs images of the others too")
    known = _at_most(train, per_class, generator(seed, "audit", "known"))
    gone = set(_hashes(train)) & set(_hashes(test))
    own, others = train.take(_rows_beside(train, gone)), _rows_beside(test, gone)
    chosen = torch.isin(own.labels, torch.tensor(wanted))
    rest = (~chosen).nonzero().flatten()
    drawn = rest[torch.randperm(len(rest), generator=generator(seed, "audit", "members"))[: int(chosen.sum())]]
    members = own.take(torch.cat([chosen.nonzero().flatten(), drawn]).sort().values)
    compared = torch.randperm(len(test), generator=generator(seed, "audit", "compared"))[:_COMPARED].sort().values
    return AuditImages(known, members, test, others, compared, wanted, seed)


def _at_most(images: LabelledImages, per_class: int, draw: torch.Generator) -> LabelledImages:
    rows: list[Tensor] = []
    for label in range(len(images.classes)):
        own = (images.labels == label).nonzero().flatten()
        rows.append(own[torch.randperm(len(own), generator=draw)[:per_class]])
    return images.take(torch.cat(rows).sort().values)


def _hashes(images: LabelledImages) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.images]


def _rows_beside(images: LabelledImages, gone: set[bytes]) -> Tensor:
    return torch.tensor([row for row, own in enumerate(_hashes(images)) if own not in gone], dtype=torch.int64)
