"""Retrained models, kept by what they depend on: an oracle is trained once per recipe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import nn

from fedunlearn.files import write_tensors
from fedunlearn.journal import Step
from fedunlearn.recipe import Recipe
from fedunlearn.version import __version__


def cache_folder() -> Path:
    """Return where caches are kept: ``$FEDUNLEARN_CACHE``, or ``fedunlearn`` in the user's cache folder."""
    named = os.environ.get("FEDUNLEARN_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "fedunlearn"


@dataclass(frozen=True)
class RetrainedCache:
    """The place of one retrained model.

    Attributes:
        path: its file, which may not be there yet.
    """

    path: Path

    @staticmethod
    def of(recipe: Recipe, forget: Sequence[int], data: str, seed: int) -> RetrainedCache | None:
        """Return the place for a recipe's data, federation, architecture, training and precision, without ``forget``.

        Args:
            recipe: the recipe; how it unlearns does not matter here.
            forget: the classes left out.
            data: fingerprint of the images and of how they are normalised.
            seed: of the retrained model.

        Returns:
            None for a model of the user's own, whose code a name does not identify.
        """
        if ":" in recipe.model.name:
            return None
        parts = [recipe.digest("data", "federation", "train", "compute"), recipe.model.name, recipe.model.shortcut]
        key = hashlib.sha256(json.dumps([__version__, *parts, sorted(forget), data, seed]).encode()).hexdigest()
        return RetrainedCache(cache_folder() / "retrained" / f"{key}.safetensors")

    def restore(self, model: nn.Module) -> list[Step] | None:
        """Fill ``model`` with the kept weights and return their rounds; None where there is nothing to read."""
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                steps = [Step.from_dict(value) for value in json.loads(file.metadata()["steps"])]
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, KeyError, TypeError):
            return None
        return steps

    def store(self, model: nn.Module, steps: Sequence[Step]) -> None:
        """Keep ``model`` and the rounds it took."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([json.loads(step.to_json()) for step in steps])
        write_tensors(self.path, model.state_dict(), {"steps": text})
