"""What the comparisons run on: random images of CIFAR-10's shape, as speed does not depend on them, and jobs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.taps import Tap
from fedunlearn.data.images import LabelledImages
from fedunlearn.data.partition import partition
from fedunlearn.federation.ask import ask
from fedunlearn.federation.averaging import fedavg
from fedunlearn.federation.jobs import Engine, Job
from fedunlearn.federation.ledger import Entry
from fedunlearn.federation.tasks import Evaluate, Measure, Train
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


def taps_of(model: nn.Module, hook: str = "activation") -> Mapping[str, Tap]:
    """Return where all layers of ``model`` are read."""
    return find_channels(model, Classifier(model, SHAPE).example, hook=hook).taps


def measure_job(model: nn.Module, classes: int = 10) -> Job:
    """Return the job of the statistics of all layers."""
    return Job(task=Measure(classes=classes), model=Classifier(model, SHAPE), phase="measure")


def train_job(model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Job:
    """Return the job of one local epoch on images of ``shape``."""
    return Job(task=Train(training=TRAINING, lr=TRAINING.lr), model=Classifier(model, shape), phase="train")


def empty_job(model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Job:
    """Return the job of an evaluation: nothing is computed by clients without validation images."""
    return Job(task=Evaluate(), model=Classifier(model, shape), phase="empty")


def done(engine: Engine, job: Job) -> None:
    """Run ``job`` with all that the server does but using the answers."""
    _, entry = ask(engine, job, lambda replies: None)
    _check(entry)


def averaged(engine: Engine, job: Job) -> None:
    """Run a round of training, the average included."""
    _, entry = ask(engine, job, lambda replies: fedavg((reply.tensors, reply.images) for reply in replies))
    _check(entry)


def _check(entry: Entry) -> None:
    if entry.refused:
        raise RuntimeError(f"clients were lost: {entry.refused}")
