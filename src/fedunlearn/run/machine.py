"""How the clients of a run compute on this machine: as the recipe says, as the run began, or as a probe found."""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fedunlearn.federation.journal import header_of
from fedunlearn.files import cache_folder, write_text
from fedunlearn.run.experiment import Experiment, computing
from fedunlearn.run.tables import ON_FLOWER, ComputeTable
from fedunlearn.training.compute import cores, own_device
from fedunlearn.training.speed import probe
from fedunlearn.version import __version__


def settled(experiment: Experiment, out: Path, *, elsewhere: bool = False) -> tuple[Experiment, dict[str, float]]:
    """Return ``experiment`` without ``auto`` in ``compute``, and the images per second of what a probe tried.

    A run goes on in ``out`` as it began. What a probe found is kept in the cache folder, so that a machine computes the
    same recipe in the same way each time.

    Args:
        experiment: the run.
        out: its folder.
        elsewhere: whether the clients are not in this process; they compute in float32 then, as on a GPU.
    """
    recipe = experiment.recipe
    if recipe.compute.precision != "auto":
        return experiment, {}
    if elsewhere or recipe.federation.engine != "local":
        return computing(experiment, ON_FLOWER), {}
    try:
        return computing(experiment, ComputeTable.model_validate(header_of(out)["recipe"]["compute"])), {}
    except (KeyError, TypeError, ValidationError):  # a new run; of a damaged one, Journal says what is wrong
        table, rates = _probed(experiment) if own_device().type == "cpu" else (ComputeTable(precision="float32"), {})
        return computing(experiment, table), rates


def processor() -> str:
    """Return the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _probed(experiment: Experiment) -> tuple[ComputeTable, dict[str, float]]:
    """Return what the probe finds best for the model of ``experiment``, or found before."""
    shape, batch_size = experiment.splits.train.shape, experiment.recipe.train.batch_size
    layout = [[name, *tensor.shape] for name, tensor in experiment.model.module.state_dict().items()]
    about = [__version__, torch.__version__, processor(), cores(), layout, shape, batch_size]
    kept = cache_folder() / "probe" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.json"
    try:
        value: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        return ComputeTable.model_validate(value["compute"]), dict(value["images_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        best, tried = probe(experiment.model.module, shape, batch_size=batch_size)
    table = ComputeTable.model_validate({key: getattr(best, key) for key in ComputeTable.model_fields})
    rates = {
        f"{choice.precision}, {choice.memory_format}, {choice.workers} workers": round(rate, 1)
        for choice, rate in tried
    }
    with suppress(OSError):  # a cache that cannot be written costs the next run a probe
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({"compute": table.model_dump(), "images_per_second": rates}) + "\n")
    return table, rates
