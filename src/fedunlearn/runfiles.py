"""What all commands write into the folder of a run, and how they name it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from fedunlearn.checkpoint import save_checkpoint
from fedunlearn.errors import RunError
from fedunlearn.plan import PruningPlan
from fedunlearn.recipe import Recipe
from fedunlearn.setting import Setting
from fedunlearn.version import __version__

SCHEMA = 1


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of what its figures depend on."""
    packages = ("fedunlearn", "torch", "numpy", "torch-pruning", "scikit-learn", "scipy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written before any work is done."""
    there = next(path for path in (out, *out.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{out}: expected a folder that can be written, but {there} is not one: choose another --out")


def run_header(command: str, recipe: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Return what identifies a run in its journal; how many clients work side by side does not."""
    compute = {key: value for key, value in recipe["compute"].items() if key != "workers"}
    return {"command": command, "version": __version__, "recipe": {**recipe, "compute": compute}, "data": data}


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_model(path: Path, model: nn.Module, setting: Setting, plan: PruningPlan, labels: Sequence[int]) -> None:
    """Write a model of the run; ``labels`` is the class of each of its output rows."""
    test = setting.splits.test
    save_checkpoint(
        path,
        model,
        plan=plan,
        labels=labels,
        classes=[test.classes[label] for label in labels],
        mean=test.mean,
        std=test.std,
        architecture={"name": setting.recipe.model.name, "shortcut": setting.recipe.model.shortcut},
    )


def portable_recipe(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Return the recipe as JSON values, its paths relative to ``out``."""
    value: dict[str, Any] = recipe.model_dump(mode="json")
    for table, key in (("data", "path"), ("model", "weights")):
        if value[table][key]:
            value[table][key] = os.path.relpath(value[table][key], out)
    return value
