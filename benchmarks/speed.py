"""How fast it is: python -m benchmarks.speed --json FILE compares, side by side and in turns (A B A B), in minutes.

Ratios are above 1 where ours is faster; ``statistics_vs_bare_forward`` and ``round_vs_plain_loop`` are our time over
the other's, 1.05 being five percent more.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import Bare, Default, PlainLoop, image_batch, image_loop
from benchmarks.growth import growth
from benchmarks.inputs import BATCH, SHAPE, averaged, done, measure_job, random_images, shares, train_job, write_npz
from benchmarks.turns import compared, overhead, timed
from fedunlearn.federation.jobs import Job
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.tasks import Train
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.launch import simulation
from fedunlearn.models import build_model
from fedunlearn.run.experiment import prepare
from fedunlearn.run.machine import processor
from fedunlearn.run.recipe import load_recipe
from fedunlearn.training.compute import Compute, cores, has_bfloat16, one_torch_thread
from fedunlearn.training.speed import probe

Work = Callable[[], None]
Compare = Callable[..., dict[str, Any]]
_SIDE = 1536  # of the matrices whose product shows what the cores can do


def main() -> None:
    """Measure, print a line for each comparison and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file that the figures are written to")
    out = parser.parse_args().json
    began = time.monotonic()
    model = build_model("resnet20", classes=10, colours=3)
    with one_torch_thread():
        compute, tried = probe(model, SHAPE, batch_size=BATCH)
    print(f"probe: {compute}", flush=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "compute": asdict(compute),
        "probe": [asdict(choice) | {"images_per_second": round(rate)} for choice, rate in tried],
    }
    result["comparisons"] = comparisons(model, compute)
    for name in (
        "train_vs_default",
        "statistics_vs_default_forward",
        "statistics_vs_bare_forward",
        "round_vs_plain_loop",
        "round_vs_flower_simulation",
    ):
        result[name] = result["comparisons"][name]["ratio"]
    result["peak"] = shares_of_peak(model, compute, result["comparisons"])
    result["growth"] = growth()
    result["seconds"] = round(time.monotonic() - began)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{out}: {result['seconds']} s", flush=True)


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    return {
        "processor": processor(),
        "cores": cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def comparisons(model: nn.Module, compute: Compute) -> dict[str, Any]:
    """Return every comparison by name."""
    images = random_images(4 * BATCH * cores())
    halves = shares(images, cores())
    ten = shares(random_images(10 * BATCH), 10)
    engine, many = LocalEngine(halves, compute=compute), LocalEngine(ten, compute=compute)
    bare, plain = Bare(model, halves, compute), PlainLoop(model, ten, compute)
    default = Default(model, images)
    measure, train = measure_job(model), train_job(model)
    pairs: dict[str, tuple[Compare, Work, Work, int]] = {
        "train_vs_default": (compared, default.train, lambda: averaged(engine, train), len(images)),
        "statistics_vs_default_forward": (compared, default.forward, lambda: done(engine, measure), len(images)),
        "statistics_vs_bare_forward": (overhead, bare, lambda: done(engine, measure), len(images)),
        "statistics_vs_image_loop": (compared, image_loop(model, images), image_batch(model, images), 32),
        "round_vs_plain_loop": (overhead, plain, lambda: averaged(many, train), 10 * BATCH),
    }
    found = {name: how(name, theirs, ours, images=count) for name, (how, theirs, ours, count) in pairs.items()}
    return found | flower_comparisons()


def flower_comparisons() -> dict[str, Any]:
    """Return rounds against the same clients on Flower's simulation, both in float32."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cifar.npz"
        write_npz(path, random_images(10 * 64))
        for name, recipe in {
            "round_vs_flower_simulation": load_recipe(
                "digits", ("federation.clients=100", "data.validation=0", "train.local_epochs=1")
            ),
            "resnet20_round_vs_flower_simulation": load_recipe(
                "cifar10-resnet20",
                (
                    "data.source=npz",
                    f"data.path={path}",
                    "data.validation=0",
                    "compute.precision=float32",
                    "train.local_epochs=1",
                    "train.batch_size=32",
                ),
            ),
        }.items():
            experiment = prepare(recipe)
            task = Train(training=recipe.training(), lr=0.01)
            job = Job(task=task, model=experiment.model, phase="train")
            with simulation(recipe) as grid, one_torch_thread():
                flower = FlowerEngine(grid, clients=tuple(experiment.clients), patience=300)
                used = int(experiment.table.sum())
                ours, theirs = (partial(averaged, engine, job) for engine in (experiment.engine, flower))
                found[name] = compared(name, theirs, ours, images=used, repeats=3)
    return found


def shares_of_peak(model: nn.Module, compute: Compute, found: dict[str, Any]) -> dict[str, float]:
    """Return which share of the speed of large matrix products training and statistics reach."""
    forward, training = flops_per_image(model, SHAPE)
    top = peak(compute)
    rates = {
        "train": training * found["train_vs_default"]["images_per_second"]["ours"],
        "statistics": forward * found["statistics_vs_default_forward"]["images_per_second"]["ours"],
    }
    return {"gflops": round(top / 1e9, 1), **{name: round(rate / top, 3) for name, rate in rates.items()}}


def peak(compute: Compute) -> float:
    """Return the operations per second of large matrix products on all cores, in the precision of ``compute``."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[compute.precision]
    pairs = [(torch.randn(_SIDE, _SIDE).to(dtype), torch.randn(_SIDE, _SIDE).to(dtype)) for _ in range(cores())]
    with one_torch_thread(), ThreadPoolExecutor(len(pairs)) as pool:
        best = min(timed(lambda: list(pool.map(lambda pair: pair[0] @ pair[1], pairs)), 6))
    return len(pairs) * 2 * _SIDE**3 / best


if __name__ == "__main__":
    main()
