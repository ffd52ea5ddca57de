"""Accuracy on test images, and the size of a model: the figures of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedunlearn.data.images import LabelledImages
from fedunlearn.federation.client import count_correct
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.scores import forget_classes


def evaluate(
    model: nn.Module,
    images: LabelledImages,
    *,
    forget: int | Sequence[int],
    labels: Sequence[int] | None = None,
    row_kept: nn.Module | None = None,
) -> dict[str, Any]:
    """Return accuracy, parameters and multiply-adds of ``model`` as they stand in result.json.

    Args:
        model: the CNN.
        images: test images.
        forget: forgotten class or classes: ``forget`` (U) is the accuracy on their images, ``retain`` (R) on the rest.
        labels: the class of each output row; row ``r`` is class ``r`` where None. A class without a row is never
            named, so its accuracy is 0.
        row_kept: the same model with the rows of the forgotten classes still in place, for ``forget_row_kept``;
            ``model`` itself where None.
    """
    correct, counts = count_correct(model, images, len(images.classes), labels=labels)
    gone = torch.zeros(len(counts), dtype=torch.bool)
    wanted = forget_classes(forget, len(images.classes))
    gone[list(wanted)] = True
    accuracy: dict[str, Any] = {
        "forget": _share(correct[gone], counts[gone]),
        "retain": _share(correct[~gone], counts[~gone]),
        "per_class": {name: _share(correct[k], counts[k]) for k, name in enumerate(images.classes)},
    }
    accuracy["forget_row_kept"] = accuracy["forget"]
    if row_kept is not None:
        only = images.take(torch.isin(images.labels, torch.tensor(wanted)).nonzero().flatten())
        right, all_ = count_correct(row_kept, only, len(images.classes))
        accuracy["forget_row_kept"] = _share(right, all_)
    forward, _ = flops_per_image(model, images.shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"accuracy": accuracy, "parameters": parameters, "macs": forward // 2}


def _share(correct: torch.Tensor, counts: torch.Tensor) -> float | None:
    total = int(counts.sum())
    return int(correct.sum()) / total if total else None
