"""Right answers, counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.channels.fit import finite
from fedunlearn.data.batches import FORWARD_BATCH, batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.training.compute import FLOAT32, Compute, device_of


def count_correct(
    model: nn.Module,
    images: LabelledImages,
    *,
    labels: Sequence[int] | None = None,
    compute: Compute = FLOAT32,
) -> tuple[Tensor, Tensor]:
    """Return right answers and images per class, int64, shape ``(classes,)`` each.

    Output row ``r`` names the class ``labels[r]``, or ``r`` where ``labels`` is None.

    Raises:
        ModelError: outputs of the model are not finite.
    """
    classes = len(images.classes)
    counts = torch.bincount(images.labels, minlength=classes)
    correct = torch.zeros_like(counts)
    if len(images) == 0:
        return correct, counts
    named = torch.tensor(list(range(classes) if labels is None else labels))
    model.eval()
    with torch.inference_mode(), compute.autocast(device_of(model)):
        for batch, truth in in_order(images, model, compute):
            right = truth.cpu()[named[finite(model(batch)).argmax(1).cpu()] == truth.cpu()]
            correct += torch.bincount(right, minlength=classes)
    return correct, counts


def in_order(images: LabelledImages, model: nn.Module, compute: Compute) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images as ``model`` takes them, in order."""
    return batches(images, FORWARD_BATCH, device=device_of(model), memory_format=compute.layout)
