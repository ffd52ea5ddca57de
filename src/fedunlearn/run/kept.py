"""Retrained models that were kept: in the cache by what they depend on, in a folder of models, in that of a run."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch
from torch import nn

from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import RunError
from fedunlearn.evidence.folder import RESULT, RunFolder
from fedunlearn.federation.journal import Step
from fedunlearn.federation.ledger import Entry
from fedunlearn.files import cache_folder, write_tensors
from fedunlearn.run.experiment import Experiment
from fedunlearn.run.recipe import Recipe
from fedunlearn.training.evaluation import count_correct
from fedunlearn.version import __version__

_logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parents[1]
# Files that decide what training from fresh weights computes.
_TRAINED_BY = (
    "training/*.py",
    "data/*.py",
    "federation/ask.py",
    "federation/averaging.py",
    "federation/federation.py",
    "federation/jobs.py",
    "federation/local.py",
    "federation/rounds.py",
    "federation/tasks.py",
    "methods/retrain.py",
    "models.py",
    "run/compare.py",
    "run/experiment.py",
    "run/inputs.py",
    "run/kept.py",
    "seeding.py",
)


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
        about = [_code_digest(), torch.__version__, *parts, sorted(forget), data, seed]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        return RetrainedCache(cache_folder() / "retrained" / f"{key}.safetensors")

    def restore(self, model: nn.Module) -> list[Step] | None:
        """Fill ``model`` with the kept weights and return their rounds; None where there is nothing to read."""
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                steps = [Step.from_dict(value) for value in json.loads(file.metadata()["steps"])]
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            copy.deepcopy(model).load_state_dict(state)  # what does not fit would leave a model half filled
            model.load_state_dict(state)
        except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, KeyError, TypeError):
            return None
        return steps

    def store(self, model: nn.Module, steps: Sequence[Step]) -> None:
        """Keep ``model`` and the rounds it took; a cache that cannot be written costs the next run a training."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self.path, model.state_dict(), rounds_of(steps))
        except OSError as error:
            _warn_once(cache_folder(), error.strerror or str(error))


@functools.cache
def _warn_once(folder: Path, why: str) -> None:
    _logger.warning(
        "%s: the cache of retrained models cannot be written (%s): the run goes on without; set FEDUNLEARN_CACHE to a "
        "folder that can be written",
        folder,
        why,
    )


def _code_digest() -> str:
    """Return the SHA-256 of the source of all that decides what training from fresh weights computes."""
    files = [path for name in _TRAINED_BY for path in sorted(_PACKAGE.glob(name))]
    digest = hashlib.sha256(__version__.encode())
    for path in files:
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def rounds_of(steps: Sequence[Step]) -> dict[str, str]:
    """Return the rounds of a retrained model as its file holds them, beside the weights."""
    return {"steps": json.dumps([json.loads(step.to_json()) for step in steps])}


def without_names(steps: Sequence[Step]) -> list[Step]:
    """Return rounds with numbers for clients: who took part is nobody's business where a model is handed out."""
    numbers: dict[str, str] = {}

    def unnamed(entry: Entry) -> Entry:
        clients = tuple(numbers.setdefault(name, str(len(numbers))) for name in entry.clients)
        return replace(entry, clients=clients, refused={})

    # What was asked names them too.
    return [replace(step, entries=tuple(map(unnamed, step.entries)), about={}) for step in steps]


def kept_model(fresh: Classifier, experiment: Experiment, *, seed: int) -> list[Step]:
    """Fill ``fresh`` with the retrained model that the recipe's ``audit.models`` holds for ``seed``; return its rounds.

    Raises:
        RunError: there is none with its rounds, it names a class to forget, or the folder is that of a run of another
            recipe.
    """
    folder = Path(experiment.recipe.audit.models)
    if (folder / RESULT).exists():
        _check_run(RunFolder.read(folder), experiment)
        folder /= "oracles"
    path = folder / f"retrained-{seed}.safetensors"
    steps = RetrainedCache(path).restore(fresh.module)
    if steps is None:
        raise RunError(
            f"{path}: expected a retrained model with its rounds, as the recipe gives it: ask for fewer "
            "(audit.oracles), or leave audit.models out to retrain"
        )
    share = most_named(fresh, experiment.splits.test, experiment.forget)
    if share > KNOWS:
        raise RunError(
            f"{path} names a class to forget in {100 * share:.1f} % of its test images, so it was not retrained "
            "without it: give models of this request (audit.models), or leave audit.models out to retrain"
        )
    return steps


KNOWS = 0.2  # a share of a class that no model retrained without it names


def most_named(model: Classifier, test: LabelledImages, forget: Sequence[int]) -> float:
    """Return the share of its test images that ``model`` names, of that class to forget where it is largest."""
    own = test.take(torch.isin(test.labels, torch.tensor(forget)).nonzero().flatten())
    counted = count_correct(model.module, own, labels=model.labels)
    return max(float(counted.correct[label]) / max(1, int(counted.counts[label])) for label in forget)


def _check_run(run: RunFolder, experiment: Experiment) -> None:
    """Refuse the retrained models of a run with other data, clients, network, training or classes to forget."""
    there, here = Recipe.model_validate(run.result["recipe"]), experiment.recipe
    other = [name for name in ("data", "federation", "train") if there.digest(name) != here.digest(name)]
    if (there.model.name, there.model.shortcut) != (here.model.name, here.model.shortcut):
        other.append("model")
    forgot = [run.result["classes"][label] for label in run.result["forget"]]
    if forgot != [experiment.splits.test.classes[label] for label in experiment.forget]:
        other.append("unlearn.forget")
    if other:
        raise RunError(
            f"{run.path}: its models were retrained by another recipe ({', '.join(other)} differ): give the folder of "
            "a run with the same (audit.models), or leave audit.models out to retrain"
        )
