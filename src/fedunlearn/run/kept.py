"""Retrained models that were kept: in the cache by what they depend on, in a folder of models, in that of a run."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import ValidationError
from torch import nn

from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import RunError
from fedunlearn.evidence.folder import RESULT, RunFolder, retrained_file
from fedunlearn.federation.journal import Step, header_of
from fedunlearn.federation.ledger import Entry, flops_per_image
from fedunlearn.files import cache_folder, write_tensors, write_text
from fedunlearn.run.experiment import Experiment, network_of
from fedunlearn.run.recipe import Recipe
from fedunlearn.training.compute import own_device
from fedunlearn.training.evaluation import count_correct
from fedunlearn.version import __version__

RETRAINING = "retraining.json"  # in the folder of a run
KNOWS = 0.5  # a share of a class that no model retrained without it names
_UNREADABLE = (OSError, safetensors.SafetensorError, RuntimeError, ValueError, KeyError, TypeError)
_logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parents[1]
# Files that decide what training from fresh weights computes.
_TRAINED_BY = (
    "training/**/*.py",
    "data/*.py",
    "federation/ask.py",
    "federation/averaging.py",
    "federation/federation.py",
    "federation/jobs.py",
    "federation/ledger.py",
    "federation/local.py",
    "federation/privacy.py",
    "federation/rounds.py",
    "federation/tasks.py",
    "models.py",
    "run/references.py",
    "run/experiment.py",
    "run/inputs.py",
    "run/kept.py",
    "run/recipe.py",
    "run/tables.py",
    "seeding.py",
)


def cached(recipe: Recipe, forget: Sequence[int], data: str, seed: int) -> Path | None:
    """Return where the cache has a model of a recipe's data, federation, training and precision, without ``forget``.

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
    fewest = recipe.rules().min_images  # clients with fewer images take no part, nor count those of validation
    about = [_code_digest(), torch.__version__, own_device().type, *parts, sorted(forget), data, seed, fewest]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return cache_folder() / "retrained" / f"{key}.safetensors"


def restore(path: Path, model: nn.Module, rounds: Path | None = None) -> list[Step] | None:
    """Fill ``model`` with kept weights and return the rounds that they took; None where there is nothing to read.

    Args:
        path: the weights.
        model: of their network.
        rounds: the file of a run that has the rounds of all its retrained models; they stand in ``path`` where None.
    """
    try:
        state, about = _read(path)
        told = json.loads(about["steps"]) if rounds is None else json.loads(rounds.read_text("utf-8"))[path.stem]
        steps = [Step.from_dict(value) for value in told]
        copy.deepcopy(model).load_state_dict(state)  # what does not fit would leave a model half filled
        model.load_state_dict(state)
    except _UNREADABLE:
        return None
    return steps


def store(path: Path, model: nn.Module, steps: Sequence[Step]) -> None:
    """Keep ``model`` and the rounds it took; a cache that cannot be written costs the next run a training."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, model.state_dict(), {"steps": json.dumps(_values(steps))})
    except OSError as error:
        _warn_once(cache_folder(), error.strerror or str(error))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Return the tensors in a file, and what stands beside them."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _values(steps: Sequence[Step]) -> list[Any]:
    return [json.loads(step.to_json()) for step in steps]


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


def write_rounds(out: Path, steps: Mapping[str, Sequence[Step]]) -> None:
    """Write the rounds of a run's retrained models, by which another run can take them: ``--models``, the folder."""
    write_text(out / RETRAINING, json.dumps({name: _values(rounds) for name, rounds in steps.items()}) + "\n")


def fill_kept(fresh: Classifier, experiment: Experiment, *, seed: int) -> list[Step]:
    """Fill ``fresh`` with the retrained model that the recipe's ``audit.models`` holds for ``seed``; return its rounds.

    Raises:
        RunError: there is none with its rounds, or it names a class to forget.
    """
    folder, name = Path(experiment.recipe.audit.models), f"retrained-{seed}"
    if _is_run(folder):
        path, rounds = retrained_file(folder, name), folder / RETRAINING
    else:
        path, rounds = folder / f"{name}.safetensors", None
    steps = restore(path, fresh.module, rounds)
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
    return _recounted(steps, fresh)


def _recounted(steps: Sequence[Step], model: Classifier) -> list[Step]:
    """Return rounds of training with their operations counted as they are now, not by the version that made them."""
    _, per_image = flops_per_image(model.module, model.shape)

    def counted(entry: Entry) -> Entry:
        return replace(entry, flops=entry.samples * per_image) if entry.job == "train" else entry

    return [replace(step, entries=tuple(map(counted, step.entries))) for step in steps]


def check_folder_of_models(experiment: Experiment, *, data: str) -> None:
    """Refuse the folder of a run whose retrained models are no answer to this request.

    Args:
        experiment: whose recipe names the folder in ``audit.models``.
        data: fingerprint of its images.

    Raises:
        RunError: the run is not finished, or had other images, clients, training, another network or other classes to
            forget.
    """
    folder, here = Path(experiment.recipe.audit.models), experiment.recipe
    if not _is_run(folder):
        return
    result = RunFolder.read(folder).result
    try:
        there = Recipe.model_validate(result["recipe"])
        forgot = [result["classes"][label] for label in result["forget"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise RunError(
            f"{folder}: {RESULT} is that of another version of fedunlearn: leave audit.models out to retrain"
        ) from error
    other = [name for name in ("data", "federation", "train") if there.digest(name) != here.digest(name)]
    if header_of(folder).get("data") != data and "data" not in other:  # images, names of classes, normalisation
        other.insert(0, "data")
    edited = header_of(folder).get("network") != network_of(experiment).get("network")
    if (there.model.name, there.model.shortcut) != (here.model.name, here.model.shortcut) or edited:
        other.append("model")
    if forgot != [experiment.splits.test.classes[label] for label in experiment.forget]:
        other.append("unlearn.forget")
    if other:
        raise RunError(
            f"{folder}: its models were retrained by another recipe ({', '.join(other)} differ): give the folder of "
            "a run with the same (audit.models), or leave audit.models out to retrain"
        )
    if there.compute.precision != here.compute.precision:
        raise RunError(
            f"{folder}: its models were retrained in {there.compute.precision}, and this run computes in "
            f"{here.compute.precision}: ask for --precision {there.compute.precision}, or leave audit.models out to "
            "retrain"
        )


def validation_unseen(experiment: Experiment) -> bool:
    """Return whether the original was trained here, by this run or by that which the recipe's ``audit.models`` names.

    Weights from elsewhere may have been trained on what is validation data here.
    """
    if experiment.weights is None:
        return True
    folder = Path(experiment.recipe.audit.models)
    if not experiment.recipe.audit.models or experiment.weights.path.resolve().parent != folder.resolve():
        return False
    if not _is_run(folder):
        return True
    return bool(RunFolder.read(folder).result.get("cost", {}).get("retrain", {}).get("validation_unseen"))


def most_named(model: Classifier, test: LabelledImages, forget: Sequence[int]) -> float:
    """Return the share of its test images that ``model`` names, of that class to forget where it is largest."""
    counted = count_correct(model.module, test.only(forget), labels=model.labels)
    return max(float(counted.correct[label]) / max(1, int(counted.counts[label])) for label in forget)


def _is_run(folder: Path) -> bool:
    return bool(header_of(folder)) or (folder / RESULT).exists()
