"""Audit: does rounding the weights bring the class back?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedunlearn.audits.accuracy import accuracy
from fedunlearn.audits.base import Audit, FigureKind, Found, Subject, View
from fedunlearn.audits.images import AuditImages
from fedunlearn.channels.copying import copied

_BITS = (8, 4)


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy of ``model`` whose convolution and linear weights are rounded to ``bits`` bits.

    Symmetric, a step per output channel: ``w -> s round(w / s)`` with ``s = max |w| / (2^(bits-1) - 1)``.

    Args:
        model: the CNN.
        bits: at least 2; 8 and 4 are usual on devices.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.4, -0.8]]))
        >>> rounded(layer, 2).weight.data  # levels -1, 0, 1
        tensor([[ 1.,  0., -1.]])
    """
    coarse = copied(model)
    with torch.no_grad():
        for module in coarse.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = module.weight
                step = weight.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)
                step = step.clamp_min(torch.finfo(weight.dtype).tiny).reshape(-1, *[1] * (weight.ndim - 1))
                weight.copy_((weight / step).round() * step)
    return coarse


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    if subject.row_kept is None:
        return Found()
    module, forgotten = subject.row_kept.module, images.forgotten(images.test)
    return Found({f"int{bits}": accuracy(rounded(module, bits), forgotten) for bits in _BITS})


AUDIT = Audit(
    "rounding",
    {
        "int8": FigureKind(
            "U, 8 bits",
            "Does rounding the weights to 8 bits bring it back?",
            "class",
            "named right by a copy of 8 bits",
        ),
        "int4": FigureKind("U, 4 bits", "Does rounding to 4 bits?", "class", "named right by a copy of 4 bits"),
    },
    _measure,
)
