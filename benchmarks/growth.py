"""How cost grows with clients, classes and channels."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from benchmarks.baselines import Bare
from benchmarks.inputs import averaged, done, empty_job, measure_job, random_images, shares, train_job
from benchmarks.turns import overhead, timed
from fedunlearn.data.partition import partition
from fedunlearn.data.readers import read_digits
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.privacy import Privacy
from fedunlearn.models import SmallCNN, build_model
from fedunlearn.training.compute import Compute, cores


def growth() -> dict[str, Any]:
    """Return how cost grows with clients, classes and channels."""
    return {"clients": clients_growth(), "classes": classes_growth(), "channels": channels_growth()}


def clients_growth() -> list[dict[str, Any]]:
    """Return the cost of an empty and of a training round, and the peak memory: digits over 2 clients and more."""
    rows = []
    for clients in (2, 10, 100, 1000):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: memory never shrinks
            rows.append(pool.apply(clients_row, (clients,)))
        print(rows[-1], flush=True)
    return rows


def clients_row(clients: int) -> dict[str, Any]:
    """Return the row of so many clients."""
    images = read_digits().train
    model = SmallCNN(10, 1)
    rules = Privacy(min_images=1)  # a thousand clients hold an image or two
    engine = LocalEngine(partition(images, by="iid", clients=clients, seed=0), rules=rules)
    empty, train = empty_job(model, images.shape), train_job(model, images.shape)
    averaged(engine, train)
    return {
        "clients": clients,
        "empty_ms_per_client": round(1e3 * median(timed(lambda: done(engine, empty), 5)) / clients, 3),
        "train_seconds": round(median(timed(lambda: averaged(engine, train), 3)), 3),
        "peak_mb": peak_mb(),
    }


def peak_mb() -> int | None:
    """Return the most memory this process ever held; None where /proc does not tell (getrusage counts the parent's)."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((round(int(line.split()[1]) / 1e3) for line in lines if line.startswith("VmHWM:")), None)


def classes_growth() -> list[dict[str, Any]]:
    """Return the time of the statistics over that of bare forward passes, by classes."""
    rows = []
    for classes in (10, 100):
        model = build_model("resnet20", classes=classes, colours=3)
        rows.append({"classes": classes} | statistics_overhead(model, classes))
        print(rows[-1], flush=True)
    return rows


def channels_growth() -> list[dict[str, Any]]:
    """Return the time of the statistics over that of bare forward passes, by channels per layer."""
    rows = []
    for width in (16, 64, 256):
        model = nn.Sequential(
            *layer(3, width), nn.MaxPool2d(2), *layer(width, width), nn.MaxPool2d(2), *layer(width, width)
        )
        model.extend((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)))
        rows.append({"channels": width} | statistics_overhead(model, 10))
        print(rows[-1], flush=True)
    return rows


def layer(before: int, after: int) -> list[nn.Module]:
    """Return a convolution with batch normalisation and ReLU."""
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


def statistics_overhead(model: nn.Module, classes: int) -> dict[str, Any]:
    """Return the time of the statistics over that of bare passes over 1,024 images, and images per second."""
    compute = Compute(workers=cores())
    clients = shares(random_images(1024, classes), cores())
    engine, bare = LocalEngine(clients, compute=compute), Bare(model, clients, compute)
    job = measure_job(model, classes)
    compared = overhead("statistics over bare passes", bare, lambda: done(engine, job), images=1024)
    return {"statistics_vs_bare_forward": compared["ratio"], "images_per_second": compared["images_per_second"]["ours"]}
