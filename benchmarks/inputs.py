"""What the comparisons run on: random images of CIFAR-10's shape, as speed does not depend on them, and jobs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedunlearn.channels.groups import prunable_layers
from fedunlearn.channels.taps import Tap, find_taps
from fedunlearn.data.images import LabelledImages
from fedunlearn.data.partition import partition
from fedunlearn.federation.ask import Answers
from fedunlearn.federation.jobs import Engine, Job, Measure, Train
from fedunlearn.federation.rounds import fedavg
from fedunlearn.training.sgd import Training

BATCH = 128
SHAPE = (3, 32, 32)
TRAINING = Training(lr=0.01, batch_size=BATCH)


def random_images(count: int, classes: int = 10) -> LabelledImages:
    """Return random bytes in the shape of CIFAR-10."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=draw)
    names = tuple(str(label) for label in range(classes))
    return LabelledImages(pixels, torch.arange(count) % classes, names, (0.5,) * 3, (0.25,) * 3)


def shares(images: LabelledImages, clients: int) -> dict[str, LabelledImages]:
    """Return equal shares of ``images``."""
    return partition(images, by="iid", clients=clients, seed=0)


def write_npz(path: Path, images: LabelledImages) -> None:
    """Write ``images`` as the training images of an npz file, a few of them as its test images."""
    x, y = images.images.permute(0, 2, 3, 1).numpy(), images.labels.numpy()
    np.savez(path, x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])


def example() -> Tensor:
    """Return a batch to follow a model with."""
    return torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))


def taps_of(model: nn.Module, hook: str = "activation") -> dict[str, Tap]:
    """Return where all layers of ``model`` are read."""
    return find_taps(model, prunable_layers(model, example()), example(), hook=hook)


def measure_job(model: nn.Module, classes: int = 10) -> Measure:
    """Return the job of the statistics of all layers."""
    return Measure(phase="measure", model=model, taps=taps_of(model), classes=classes)


def train_job(model: nn.Module) -> Train:
    """Return the job of one local epoch."""
    return Train(phase="train", model=model, training=TRAINING, lr=TRAINING.lr)


def done(engine: Engine, job: Job) -> None:
    """Run ``job`` with all that the server does but using the answers."""
    answers = Answers(engine, job)
    for _ in answers:
        pass
    if answers.entry.refused:
        raise RuntimeError(f"clients were lost: {answers.entry.refused}")


def averaged(engine: Engine, job: Job) -> None:
    """Run a round of training, the average included."""
    answers = Answers(engine, job)
    fedavg((reply.tensors, reply.images) for reply in answers)
    if answers.entry.refused:
        raise RuntimeError(f"clients were lost: {answers.entry.refused}")
