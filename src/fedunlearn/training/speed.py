"""A short probe of the machine: how fast a model trains, and in which precision, memory format and by how many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn

from fedunlearn.channels.checks import example_images
from fedunlearn.channels.copying import copied
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.training.compute import Compute, cores, has_bfloat16, one_torch_thread
from fedunlearn.training.sgd import Training, train_locally

_REPEATS = 3
_SECONDS = 0.1  # of each timing, where a batch takes less
# Other results than on other machines are worth it only for what is clearly faster; timings waver by as much.
_MARGIN = 1.15


def probe(
    model: nn.Module, shape: tuple[int, int, int], *, batch_size: int
) -> tuple[Compute, list[tuple[Compute, float]]]:
    """Return the fastest way to train ``model`` on this machine's CPU, and the images per second of all that was tried.

    First precision and memory format are compared with a worker per core, then the best of these with half as many
    workers. The first of a comparison is kept unless another is faster by 15 %. bfloat16 is tried where torch has
    kernels for it on this CPU and the model trains in it.

    Args:
        model: the CNN; left as it was.
        shape: ``(colours, height, width)`` of the images.
        batch_size: images in a step.

    Example:
        >>> from fedunlearn.models import build_model
        >>> best, tried = probe(build_model("small-cnn", classes=10, colours=1), (1, 8, 8), batch_size=8)
        >>> best in dict(tried)
        True
    """
    first = Compute(workers=cores()).able(model, example_images(shape))
    formats = list(dict.fromkeys([first, replace(first, memory_format="contiguous")]))
    rough = replace(first, precision="bfloat16")
    if has_bfloat16() and _trains(rough, model, shape, batch_size):
        formats.append(rough)
    tried = _rates(formats, model, shape, batch_size)
    best = _fastest(tried)
    if best.workers > 1:
        fewer = [best, replace(best, workers=best.workers // 2)]
        again = _rates(fewer, model, shape, batch_size)
        tried, best = tried + again[1:], _fastest(again)
    return best, tried


def rate(compute: Compute, model: nn.Module, shape: tuple[int, int, int], *, batch_size: int) -> float:
    """Return how many images per second ``compute`` trains ``model`` on; arguments as for ``probe``."""
    return _rates([compute], model, shape, batch_size)[0][1]


def _trains(compute: Compute, model: nn.Module, shape: tuple[int, int, int], batch_size: int) -> bool:
    """Return whether ``model`` takes a step of training by ``compute``: its own code may ask for float32."""
    try:
        _seconds([compute.placed(copied(model))], compute, _noise(shape, batch_size), epochs=1)
    except (RuntimeError, FederationError):
        return False
    return True


def _noise(shape: tuple[int, int, int], number: int) -> LabelledImages:
    """Return images to train on."""
    pixels = torch.randint(0, 256, (number, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(number, dtype=torch.int64)
    return LabelledImages(pixels, labels, ("any",), (0.5,) * shape[0], (0.25,) * shape[0])


def _fastest(tried: Sequence[tuple[Compute, float]]) -> Compute:
    first, best = tried[0], max(tried, key=lambda choice: choice[1])
    return best[0] if best[1] > _MARGIN * first[1] else first[0]


def _rates(
    candidates: Sequence[Compute], model: nn.Module, shape: tuple[int, int, int], batch_size: int
) -> list[tuple[Compute, float]]:
    """Return the images per second of each candidate: its best of a few timings, taken in turns."""
    images = _noise(shape, batch_size)
    copies = {compute: [compute.placed(copied(model)) for _ in range(compute.workers)] for compute in candidates}
    prepared = [_seconds(copies[compute], compute, images, epochs=1) for compute in candidates for _ in range(2)]
    epochs = max(1, round(_SECONDS / min(prepared)))
    best = dict.fromkeys(candidates, 0.0)
    for _ in range(_REPEATS):
        for compute in candidates:
            seconds = _seconds(copies[compute], compute, images, epochs=epochs)
            best[compute] = max(best[compute], compute.workers * epochs * batch_size / seconds)
    return list(best.items())


def _seconds(copies: Sequence[nn.Module], compute: Compute, images: LabelledImages, *, epochs: int) -> float:
    """Return how long it takes to train all ``copies`` side by side."""
    training = Training(lr=1e-6, batch_size=len(images), local_epochs=epochs)

    def train(model: nn.Module) -> None:
        train_locally(model, images, training, lr=training.lr, draw=torch.Generator(), compute=compute)

    with one_torch_thread(), ThreadPoolExecutor(len(copies)) as pool:
        started = time.perf_counter()
        list(pool.map(train, copies))
        return time.perf_counter() - started
