"""Audit: does one label-free forward pass bring the class back?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedunlearn.audits.accuracy import accuracy
from fedunlearn.audits.base import Audit, FigureKind, Found, Subject, View
from fedunlearn.audits.images import AuditImages
from fedunlearn.channels.copying import copied
from fedunlearn.data.images import LabelledImages
from fedunlearn.seeding import generator
from fedunlearn.training.batch_norm import batch_norm_sums, fit_batch_norm


def reestimated(model: nn.Module, images: LabelledImages, *, draw: torch.Generator) -> nn.Module:
    """Return a copy of ``model`` whose batch normalisation statistics are those of ``images``.

    The formula is that of ``fedunlearn.reestimate``. Pruning shifts what batch normalisation receives, which alone
    can silence a class: it then comes back with the statistics, without a label or a gradient.

    Args:
        model: the CNN; without batch normalisation the copy is the same.
        images: of the kept classes.
        draw: owner of the order of the images.

    Example:
        >>> norm = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> pixels = torch.zeros(8, 1, 2, 2, dtype=torch.uint8)
        >>> black = LabelledImages(pixels, torch.zeros(8).long(), ("a",), mean=(0.5,), std=(0.5,))
        >>> reestimated(norm, black, draw=torch.Generator())[0].running_mean  # (0 - 0.5) / 0.5
        tensor([-1.])
    """
    fitted = copied(model)
    fit_batch_norm(fitted, [batch_norm_sums(copied(model), images, draw)])
    return fitted


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    if subject.row_kept is None:
        return Found()
    draw = generator(images.seed, "audit", "reestimation")
    fitted = reestimated(subject.row_kept.module, images.known.without(images.forget), draw=draw)
    return Found({"reestimated": accuracy(fitted, images.forgotten(images.test))})


AUDIT = Audit(
    "reestimation",
    {
        "reestimated": FigureKind(
            "U, re-estimated",
            "Does a label-free pass over kept images bring the class back?",
            "class",
            "named right with new statistics in the layers",
        )
    },
    _measure,
)
