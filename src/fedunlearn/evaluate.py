"""Accuracy on test images, and the size of a model: the figures of the table."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from fedunlearn.data.images import LabelledImages
from fedunlearn.federation.client import count_correct
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.scores import forget_classes
from fedunlearn.threads import cores, one_torch_thread


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
        row_kept: the same model with the rows of the forgotten classes still in place, for ``forget_row_kept``; where
            None, that is ``forget``, or None if the model has no such rows.
    """
    wanted = forget_classes(forget, len(images.classes))
    correct, counts = _count(model, images, labels)
    gone = torch.zeros(len(counts), dtype=torch.bool)
    gone[list(wanted)] = True
    accuracy: dict[str, Any] = {
        "forget": _share(correct[gone], counts[gone]),
        "retain": _share(correct[~gone], counts[~gone]),
        "per_class": {name: _share(correct[k], counts[k]) for k, name in enumerate(images.classes)},
    }
    if row_kept is not None:
        only = images.take(torch.isin(images.labels, torch.tensor(wanted)).nonzero().flatten())
        accuracy["forget_row_kept"] = _share(*_count(row_kept, only, None))
    else:
        has_rows = labels is None or set(wanted) <= set(labels)
        accuracy["forget_row_kept"] = accuracy["forget"] if has_rows else None
    forward, _ = flops_per_image(model, images.shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"accuracy": accuracy, "parameters": parameters, "macs": forward // 2}


def _count(model: nn.Module, images: LabelledImages, labels: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right answers and images per class, each core counting a part of the images."""
    part = max(1, -(-len(images) // cores()))
    parts = [images.take(slice(start, start + part)) for start in range(0, max(len(images), 1), part)]
    with one_torch_thread(), ThreadPoolExecutor(len(parts)) as pool:
        counted = list(pool.map(lambda p: count_correct(model, p, len(images.classes), labels=labels), parts))
    return torch.stack([c for c, _ in counted]).sum(0), torch.stack([n for _, n in counted]).sum(0)


def _share(correct: torch.Tensor, counts: torch.Tensor) -> float | None:
    total = int(counts.sum())
    return int(correct.sum()) / total if total else None
