"""How the clients of a run compute on this machine: as the recipe says, as the run began, or as a probe found."""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fedunlearn.cache import cache_folder
from fedunlearn.compute import own_device
from fedunlearn.files import write_text
from fedunlearn.journal import header_of
from fedunlearn.probe import probe
from fedunlearn.recipe import ON_FLOWER, ComputeTable
from fedunlearn.setting import Setting, computing
from fedunlearn.threads import cores
from fedunlearn.version import __version__


def settled(setting: Setting, out: Path, *, elsewhere: bool = False) -> tuple[Setting, dict[str, float]]:
    """Return ``setting`` without ``auto`` in ``compute``, and the images per second of what a probe tried.

    A run goes on in ``out`` as it began. What a probe found is kept in the cache folder, so that a machine computes the
    same recipe in the same way each time.

    Args:
        setting: the run.
        out: its folder.
        elsewhere: whether the clients are not in this process; they compute in float32 then, as on a GPU.
    """
    recipe = setting.recipe
    if recipe.compute.precision != "auto":
        return setting, {}
    if elsewhere or recipe.federation.engine != "local":
        return computing(setting, ON_FLOWER), {}
    try:
        return computing(setting, ComputeTable.model_validate(header_of(out)["recipe"]["compute"])), {}
    except (KeyError, TypeError, ValidationError):  # a new run; of a damaged one, Journal says what is wrong
        table, rates = _probed(setting) if own_device().type == "cpu" else (ComputeTable(precision="float32"), {})
        return computing(setting, table), rates


def _probed(setting: Setting) -> tuple[ComputeTable, dict[str, float]]:
    """Return what the probe finds best for the model of ``setting``, or found before."""
    shape, batch_size = setting.splits.train.shape, setting.recipe.train.batch_size
    layout = [[name, *tensor.shape] for name, tensor in setting.model.state_dict().items()]
    about = [__version__, torch.__version__, processor(), cores(), layout, shape, batch_size]
    kept = cache_folder() / "probe" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.json"
    try:
        value: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        return ComputeTable.model_validate(value["compute"]), dict(value["images_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        best, tried = probe(setting.model, shape, batch_size=batch_size)
    table = ComputeTable.model_validate(asdict(best))
    rates = {f"{own.precision}, {own.memory_format}, {own.workers} workers": round(rate, 1) for own, rate in tried}
    with suppress(OSError):  # a cache that cannot be written costs the next run a probe
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({"compute": table.model_dump(), "images_per_second": rates}) + "\n")
    return table, rates


def processor() -> str:
    """Return the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
