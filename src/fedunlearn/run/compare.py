"""What unlearning is held against: retrained models, kept by what they depend on, and controls."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from fedunlearn.channels.plan import Classifier, Cut
from fedunlearn.errors import RunError
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import Step
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.privacy import DEFAULT_RULES
from fedunlearn.files import cache_folder, write_tensors
from fedunlearn.methods.base import Outcome, Request, resolved
from fedunlearn.methods.erase_only import ERASE_ONLY
from fedunlearn.methods.retrain import retrain
from fedunlearn.methods.table import CONTROLS, METHODS
from fedunlearn.run.experiment import Experiment, new_model, unlearned_model
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.tables import PRUNE
from fedunlearn.unlearn import Forgotten, Unlearned
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
    "seeding.py",
)


@dataclass(frozen=True, eq=False)
class Oracle:
    """A model retrained without the forgotten classes.

    Attributes:
        model: with a row for every class; those of the forgotten ones never saw an image of theirs.
        steps: its rounds.
        cached: whether it was kept from an earlier run.
    """

    model: Classifier
    steps: list[Step]
    cached: bool


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
        text = json.dumps([json.loads(step.to_json()) for step in steps])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self.path, model.state_dict(), {"steps": text})
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


def forgotten_model(experiment: Experiment, original: Classifier, fed: Federation) -> Forgotten:
    """Return what the recipe's method makes of ``original``."""
    u = experiment.recipe.unlearn
    if u.method == PRUNE:
        return unlearned_model(experiment, original, fed)
    method, part = METHODS[u.method], fed.part("method")  # a control may have phases of the same names
    settings = replace(method.settings, **u.settings)
    asked = request(experiment, part, cut=experiment.cut(), clients=experiment.holders())
    outcome = method.run(original, part, asked, settings)
    subject = outcome.subject
    assert subject.row_kept is not None  # controls alone lack the rows
    return Forgotten(
        forget=experiment.forget,
        repaired=subject.row_kept,
        model=subject.model,
        clients=experiment.holders(),
        cost=outcome.cost or Cost(),
    )


def method_block(experiment: Experiment, fed: Federation) -> dict[str, Any]:
    """Return the block ``method``: by what the recipe forgets, where that is not the method of this project."""
    u = experiment.recipe.unlearn
    if u.method == PRUNE:
        return {}
    method = METHODS[u.method]
    asked = request(experiment, fed, cut=experiment.cut(), clients=experiment.holders())
    used = resolved(replace(method.settings, **u.settings), asked, fed.participation)
    about = {"name": method.name, "label": method.label, "needs": method.needs, "source": method.source}
    return {"method": about | {"settings": used}}


def controls(experiment: Experiment, original: Classifier, unlearned: Forgotten, fed: Federation) -> dict[str, Outcome]:
    """Return what each control makes of ``original``, by name.

    Args:
        experiment: the run.
        original: the model before unlearning.
        unlearned: what the controls stand beside.
        fed: the clients and the record of the run.
    """
    cut = unlearned.cut if isinstance(unlearned, Unlearned) else experiment.cut()
    asked = request(experiment, fed, cut=cut, clients=unlearned.clients, spent=unlearned.cost)
    asked = replace(asked, unlearned=unlearned)
    return {
        control.name: control.run(original, fed, asked, None if control is ERASE_ONLY else control.settings)
        for control in CONTROLS
        if control.applies(asked)
    }


def request(
    experiment: Experiment, fed: Federation, *, cut: Cut, clients: Sequence[str], spent: Cost | None = None
) -> Request:
    """Return what methods are asked for.

    Args:
        experiment: the run.
        fed: its clients.
        cut: how many channels go.
        clients: those that take part in training.
        spent: what pruning and repair cost, for a method of equal cost.
    """
    forget = list(experiment.forget)
    rows = [experiment.engine.clients.index(name) for name in clients]
    stay = [label for label in range(len(experiment.splits.train.classes)) if label not in forget]
    kept = experiment.table[rows][:, stay].sum()
    # Clients elsewhere have rules of their own: those that hold fewer images than the default lets an answer stand for
    # would only refuse.
    local = experiment.recipe.federation.engine == "local"
    least = (experiment.recipe.rules() if local else DEFAULT_RULES).min_images
    holds = (experiment.table[:, forget].sum(1) >= max(1, least)).tolist()
    return Request(
        experiment.forget,
        experiment.ranking(),
        cut,
        experiment.repair(),
        experiment.recipe.unlearn.jointly,
        tuple(clients),
        tuple(name for name, own in zip(experiment.clients, holds) if own),
        float(kept) * fed.participation,
        spent,
    )


def retrained_models(experiment: Experiment, fed: Federation, *, data: str, count: int) -> dict[str, Oracle]:
    """Return ``count`` retrained models by name, ``retrained-SEED``.

    Their seeds follow the recipe's, so they share neither initial weights nor draws with the original or each other.

    Args:
        experiment: the run.
        fed: the clients and the record of the run.
        data: fingerprint of the images, for the cache.
        count: how many.
    """
    seeds = [fed.seed + 1 + k for k in range(count)]
    return {
        f"retrained-{seed}": _retrained(experiment, replace(fed.part(f"retrained-{seed}"), seed=seed), data)
        for seed in seeds
    }


def _retrained(experiment: Experiment, fed: Federation, data: str) -> Oracle:
    recipe = experiment.recipe
    earlier = experiment.earlier
    fresh = new_model(recipe, experiment.splits.train, seed=fed.seed, earlier=earlier)
    if recipe.audit.models:
        path = Path(recipe.audit.models) / f"retrained-{fed.seed}.safetensors"
        known = RetrainedCache(path).restore(fresh.module)
        if known is None:
            raise RunError(
                f"{path}: expected a retrained model with its rounds, as the recipe gives it: ask for fewer "
                "(audit.oracles), or leave audit.models out to retrain"
            )
        return Oracle(fresh, known, True)
    # The shares of clients depend on the images of all classes.
    place = f"{data} of {experiment.all_classes} without {earlier}" if earlier else data
    cache = RetrainedCache.of(recipe, experiment.forget, place, fed.seed)
    if cache is not None and not fed.journal.steps("retrain"):
        restored = cache.restore(fresh.module)
        if restored is not None:
            return Oracle(fresh, restored, True)
    kept = fed.keeping(exclude=experiment.forget, clients=experiment.holders())
    validate = recipe.train.validate_every if recipe.data.validation else 0
    model = retrain(
        fresh, kept, recipe.training(), rounds=recipe.train.rounds, server=experiment.server(), validate=validate
    )
    steps = fed.journal.steps("retrain")
    if cache is not None:
        cache.store(model.module, steps)
    return Oracle(model, steps, False)
