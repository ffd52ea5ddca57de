"""The images that audits are done with: the same for every model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from fedunlearn.arguments import is_positive, is_whole, must_be
from fedunlearn.channels.scores import Classes, forget_classes
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import DataError
from fedunlearn.seeding import generator

_TOGETHER = 1024  # images that are read at a time
_COMPARED = 500


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
        lr: learning rate of relearning.
    """

    known: LabelledImages
    members: LabelledImages
    test: LabelledImages
    others: Tensor
    compared: Tensor
    forget: tuple[int, ...]
    seed: int
    lr: float = 0.05

    @property
    def duplicates(self) -> int:
        """Test images that are training images too."""
        return len(self.test) - len(self.others)

    @property
    def kept(self) -> tuple[int, ...]:
        """The classes that are not forgotten."""
        return tuple(label for label in range(len(self.test.classes)) if label not in self.forget)

    def digest(self) -> str:
        """Return the SHA-256 of the images, of how they are shared out, and of all settings."""
        about = [self.forget, self.seed, self.lr, self.others.tolist(), self.compared.tolist()]
        digest = hashlib.sha256(json.dumps(about).encode())
        for images in (self.known, self.members, self.test):
            kind = [list(images.images.shape), images.classes, images.mean, images.std]
            digest.update(json.dumps(kind).encode())
            for start in range(0, len(images), _TOGETHER):
                digest.update(images.stored(slice(start, start + _TOGETHER)).contiguous().numpy().tobytes())
            digest.update(images.labels.numpy().tobytes())
        return digest.hexdigest()

    def forgotten(self, images: LabelledImages) -> LabelledImages:
        """Return the images of the forgotten classes."""
        return images.only(self.forget)


def audit_images(
    train: LabelledImages,
    test: LabelledImages,
    *,
    forget: Classes,
    per_class: int,
    seed: int,
    lr: float = 0.05,
) -> AuditImages:
    """Return the images to audit with.

    Args:
        train: what the original was trained on: all clients' images, or those of the client who audits.
        test: images it was not trained on.
        forget: the forgotten classes, by number or name.
        per_class: at most so many images of each class in ``known``.
        seed: owner of the draws.
        lr: learning rate of relearning.

    Raises:
        PlanError: the classes to forget are no classes of the images.
        DataError: the classes of training and test images differ, or either lack a forgotten class or all kept ones.
    """
    for name, images in (("train", train), ("test", test)):
        must_be(LabelledImages, images, f"audit_images({name})", "LabelledImages, as the readers give", DataError)
    if not is_whole(per_class, 1):
        raise DataError(f"audit_images(per_class=...) must be a whole number of at least 1, got {per_class!r}")
    if not is_whole(seed, 0):
        raise DataError(f"audit_images(seed=...) must be a whole number of at least 0, got {seed!r}")
    if not is_positive(lr):
        raise DataError(f"audit_images(lr=...) must be a number above 0, got {lr!r}")
    if train.classes != test.classes:
        raise DataError(
            f"training images have the classes {', '.join(train.classes)}, test images {', '.join(test.classes)}: "
            "an audit needs the same in the same order"
        )
    wanted = forget_classes(forget, train.classes)
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
    unseen, others = train.take(_rows_beside(train, gone)), _rows_beside(test, gone)
    chosen = torch.isin(unseen.labels, torch.tensor(wanted))
    rest = (~chosen).nonzero().flatten()
    drawn = rest[torch.randperm(len(rest), generator=generator(seed, "audit", "members"))[: int(chosen.sum())]]
    members = unseen.take(torch.cat([chosen.nonzero().flatten(), drawn]).sort().values)
    compared = torch.randperm(len(test), generator=generator(seed, "audit", "compared"))[:_COMPARED].sort().values
    return AuditImages(known, members, test, others, compared, wanted, seed, lr)


def _at_most(images: LabelledImages, per_class: int, draw: torch.Generator) -> LabelledImages:
    rows: list[Tensor] = []
    for label in range(len(images.classes)):
        of_class = (images.labels == label).nonzero().flatten()
        rows.append(of_class[torch.randperm(len(of_class), generator=draw)[:per_class]])
    return images.take(torch.cat(rows).sort().values)


def _hashes(images: LabelledImages) -> list[bytes]:
    return [
        hashlib.sha256(image.numpy().tobytes()).digest()
        for start in range(0, len(images), _TOGETHER)
        for image in images.stored(slice(start, start + _TOGETHER))
    ]


def _rows_beside(images: LabelledImages, gone: set[bytes]) -> Tensor:
    return torch.tensor([row for row, digest in enumerate(_hashes(images)) if digest not in gone], dtype=torch.int64)
