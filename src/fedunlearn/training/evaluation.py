"""Right answers, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fedunlearn.channels.copying import copied
from fedunlearn.channels.fit import finite
from fedunlearn.data.batches import FORWARD_BATCH, batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.training.compute import FLOAT32, Compute, cores, device_of, one_torch_thread

_Part = TypeVar("_Part")


class Counted(NamedTuple):
    """What a model makes of images, per class, shape ``(classes,)`` each.

    Attributes:
        correct: right answers, int64.
        counts: images, int64.
        probability: sum of the probabilities that the images' own class is given, float64.
    """

    correct: Tensor
    counts: Tensor
    probability: Tensor


def count_correct(
    model: nn.Module,
    images: LabelledImages,
    *,
    labels: Sequence[int] | None = None,
    compute: Compute = FLOAT32,
) -> Counted:
    """Return right answers, images and probabilities per class.

    Output row ``r`` names the class ``labels[r]``, or ``r`` where ``labels`` is None; a class without a row is given no
    probability.

    Raises:
        ModelError: outputs of the model are not finite.
    """
    classes = len(images.classes)
    counts = torch.bincount(images.labels, minlength=classes)
    correct, given = torch.zeros_like(counts), torch.zeros(classes, dtype=torch.float64)
    if len(images) == 0:
        return Counted(correct, counts, given)
    named = torch.tensor(list(range(classes) if labels is None else labels))
    model.eval()
    with torch.inference_mode(), compute.autocast(device_of(model)):
        for batch, own_classes in in_order(images, model, compute):
            logits, truth = finite(model(batch)).cpu(), own_classes.cpu()
            correct += torch.bincount(truth[named[logits.argmax(1)] == truth], minlength=classes)
            probability = logits.double().softmax(1) * (named == truth[:, None])
            given.index_add_(0, truth, probability.sum(1))
    return Counted(correct, counts, given)


def in_order(images: LabelledImages, model: nn.Module, compute: Compute) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images as ``model`` takes them, in order."""
    return batches(images, FORWARD_BATCH, device=device_of(model), memory_format=compute.layout)


def in_parts(
    model: nn.Module, images: LabelledImages, work: Callable[[nn.Module, LabelledImages], _Part], *, least: int = 1
) -> list[_Part]:
    """Return what ``work`` makes of parts of ``images``, one a core and in order, each with a copy of ``model``.

    A model that keeps an activation on itself between two steps of a pass would read that of another thread.

    Args:
        model: in evaluation mode; left as it was.
        images: what is shared out.
        work: called with a copy and its part.
        least: images of a part, where there are as many: for fewer, a thread and its copy cost more than they save.
    """
    part = max(least, -(-len(images) // cores()))
    parts = [images.take(slice(start, start + part)) for start in range(0, max(len(images), 1), part)]
    with one_torch_thread(), ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda some: work(copied(model).eval(), some), parts))
