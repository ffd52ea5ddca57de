"""What ours is compared with: PyTorch as it comes, bare passes, a plain loop, and a loop over images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.inputs import BATCH, taps_of
from fedunlearn.channels.stats import measure_channels
from fedunlearn.data.batches import FORWARD_BATCH, batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.training.compute import Compute, cores, one_torch_thread


class Default:
    """PyTorch as it comes: float32, NCHW, one batch after another, all cores inside each operation."""

    def __init__(self, model: nn.Module, images: LabelledImages) -> None:
        self._model = copy.deepcopy(model)
        self._optimiser = torch.optim.SGD(
            self._model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self._images = (images.images.float() / 255 - 0.5) / 0.25
        self._labels = images.labels

    def train(self) -> None:
        """Train on all images once."""
        self._model.train()
        with all_torch_threads():
            for start in range(0, len(self._labels), BATCH):
                logits = self._model(self._images[start : start + BATCH])
                loss = F.cross_entropy(logits, self._labels[start : start + BATCH])
                self._optimiser.zero_grad()
                torch.autograd.backward(loss)
                self._optimiser.step()

    def forward(self) -> None:
        """Compute the logits of all images."""
        self._model.eval()
        with all_torch_threads(), torch.no_grad():
            for start in range(0, len(self._labels), BATCH):
                self._model(self._images[start : start + BATCH])


class Bare:
    """Forward passes over the same batches with the same settings as clients, and nothing else."""

    def __init__(self, model: nn.Module, clients: Mapping[str, LabelledImages], compute: Compute) -> None:
        self._compute = compute
        self._models = [compute.placed(copy.deepcopy(model)).eval() for _ in range(compute.workers)]
        self._parts = [list(clients.values())[k :: compute.workers] for k in range(compute.workers)]

    def __call__(self) -> None:
        """Compute the logits of all images."""
        with one_torch_thread(), ThreadPoolExecutor(len(self._models)) as pool:
            list(pool.map(self._pass, self._models, self._parts))

    def _pass(self, model: nn.Module, parts: Sequence[LabelledImages]) -> None:
        with torch.inference_mode(), self._compute.autocast():
            for images in parts:
                for batch, _ in batches(images, FORWARD_BATCH, memory_format=self._compute.layout):
                    model(batch)


class PlainLoop:
    """Training steps over the same batches with the same settings as clients: no jobs, no replies, no averages."""

    def __init__(self, model: nn.Module, clients: Mapping[str, LabelledImages], compute: Compute) -> None:
        self._compute = compute
        self._models = [compute.placed(copy.deepcopy(model)).train() for _ in range(compute.workers)]
        self._parts = [list(clients.values())[k :: compute.workers] for k in range(compute.workers)]

    def __call__(self) -> None:
        """Train on all images once."""
        with one_torch_thread(), ThreadPoolExecutor(len(self._models)) as pool:
            list(pool.map(self._train, self._models, self._parts))

    def _train(self, model: nn.Module, parts: Sequence[LabelledImages]) -> None:
        optimiser = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        draw = torch.Generator().manual_seed(0)
        for images in parts:
            for batch, labels in batches(images, BATCH, draw=draw, memory_format=self._compute.layout):
                with self._compute.autocast():
                    logits = model(batch)
                loss = F.cross_entropy(logits.float(), labels)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()


def image_loop(model: nn.Module, images: LabelledImages) -> Callable[[], None]:
    """Return what measures 32 images as written down: one after another, channel by channel."""
    images, model = images.take(slice(0, 32)), copy.deepcopy(model).eval()
    layers = tuple(taps_of(model))

    def run() -> None:
        sums: dict[tuple[str, int, int], float] = {}
        maps: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: maps.update({name: out}))
            for name in layers
        ]
        with one_torch_thread(), torch.inference_mode():
            for row in range(len(images)):
                ((batch, labels),) = batches(images.take(slice(row, row + 1)), 1)
                model(batch)
                for name, z in maps.items():
                    for channel in range(z.shape[1]):
                        key = (name, int(labels), channel)
                        sums[key] = sums.get(key, 0.0) + float(z[0, channel].clamp_min(0).mean())
        for hook in hooks:
            hook.remove()

    return run


def image_batch(model: nn.Module, images: LabelledImages) -> Callable[[], None]:
    """Return what measures the same images by ``measure_channels``."""
    images, model = images.take(slice(0, 32)), copy.deepcopy(model).eval()
    taps = taps_of(model, hook="convolution")

    def run() -> None:
        with one_torch_thread():
            measure_channels(model, batches(images, 32), taps=taps, classes=10)

    return run


@contextmanager
def all_torch_threads() -> Iterator[None]:
    """Give torch all cores while the context lasts, as it has by default."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)
