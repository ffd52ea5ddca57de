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
from fedunlearn.journal import Journal, Step
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
    def of(recipe: Recipe, forget: Sequence[int], data: str) -> RetrainedCache:
        """Return the place for a recipe's data, federation, architecture and training, without ``forget``.

        Args:
            recipe: the recipe; how it unlearns does not matter here.
            forget: the classes left out.
            data: fingerprint of the images.
        """
        parts = [recipe.digest("data", "federation", "train"), recipe.model.name, recipe.model.shortcut]
        key = hashlib.sha256(json.dumps([__version__, *parts, sorted(forget), data]).encode()).hexdigest()
        return RetrainedCache(cache_folder() / "retrained" / f"{key}.safetensors")

    def restore(self, model: nn.Module, journal: Journal) -> bool:
        """Put a kept model's rounds into ``journal`` unless it has rounds of its own; say whether that was done."""
        if (journal.steps("retrain") and not journal.adopted("retrain")) or not self.path.exists():
            return journal.adopted("retrain")
        with safetensors.safe_open(self.path, "pt") as file:
            steps = [Step.from_dict(value) for value in json.loads(file.metadata()["steps"])]
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        model.load_state_dict(state)  # an error here, before the journal is touched, if the file is not what it says
        journal.adopt(steps, state)
        return True

    def store(self, model: nn.Module, steps: Sequence[Step]) -> None:
        """Keep ``model`` and the rounds it took."""
        if self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([json.loads(step.to_json()) for step in steps])
        write_tensors(self.path, model.state_dict(), {"steps": text})
