"""Models that an audit must not pass: what a careless operator might call unlearned.

And retrained models, what unlearning is held against, kept by what they depend on: an oracle is trained once per
recipe.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import safetensors
from torch import nn

from fedunlearn.audits.subject import Subject, without_rows
from fedunlearn.channels.plan import PruningPlan
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Cost
from fedunlearn.files import cache_folder, write_tensors
from fedunlearn.methods.finetune import finetune
from fedunlearn.methods.retrain import retrain
from fedunlearn.run.experiment import Setting, new_model, unlearned_model
from fedunlearn.run.recipe import Recipe
from fedunlearn.unlearn import Unlearned
from fedunlearn.version import __version__


@dataclass(frozen=True, eq=False)
class Control:
    """A model to compare with.

    Attributes:
        subject: the model as it would be delivered.
        cost: what it cost the clients; None where that is nothing beyond what unlearning did.
    """

    subject: Subject
    cost: Cost | None = None


@dataclass(frozen=True, eq=False)
class Oracle:
    """A model retrained without the forgotten classes.

    Attributes:
        model: with a row for every class; those of the forgotten ones never saw an image of theirs.
        steps: its rounds.
        cached: whether it was kept from an earlier run.
    """

    model: nn.Module
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


def controls(
    setting: Setting, original: nn.Module, plan: PruningPlan, unlearned: Unlearned, journal: Journal
) -> dict[str, Control]:
    """Return the controls by name.

    ``original``: nothing done. ``head_only``: the output rows removed, nothing else. ``pruned``: unlearning without
    its repair. ``random``: unlearning with random scores. ``finetune``: training on the kept classes only, with as
    many operations as unlearning took.

    Args:
        setting: the run.
        original: the model before unlearning.
        plan: how the shapes of ``original`` follow from its architecture.
        unlearned: what the controls stand beside.
        journal: of the run.
    """
    classes, shape = len(setting.splits.test.classes), setting.splits.test.shape
    delivered = partial(without_rows, forget=setting.forget, classes=classes, shape=shape)
    beside = journal.part("random")
    if len(setting.forget) == 1 or setting.recipe.unlearn.jointly:
        beside.adopt("measure-0", journal)  # the same job: a second answer would only tell more of the clients
    randomly = unlearned_model(_at_random(setting), original, plan, beside)
    tuned, cost = _finetuned(setting, original, plan, unlearned, journal)
    return {
        "original": Control(Subject(original, tuple(range(classes)), original)),
        "head_only": Control(delivered(original, row_known=False)),
        "pruned": Control(delivered(unlearned.pruned)),
        "random": Control(Subject(randomly.model, randomly.labels, randomly.repaired), randomly.cost),
        "finetune": Control(delivered(tuned), cost),
    }


def retrained_models(setting: Setting, journal: Journal, *, data: str, count: int) -> dict[str, Oracle]:
    """Return ``count`` retrained models by name, ``retrained-SEED``.

    Their seeds follow the recipe's, so they share neither initial weights nor draws with the original or each other.

    Args:
        setting: the run.
        journal: of the run.
        data: fingerprint of the images, for the cache.
        count: how many.
    """
    seeds = [setting.recipe.federation.seed + 1 + k for k in range(count)]
    return {
        f"retrained-{seed}": _retrained(setting, journal.part(f"retrained-{seed}"), data=data, seed=seed)
        for seed in seeds
    }


def _at_random(setting: Setting) -> Setting:
    recipe = setting.recipe
    unlearning = recipe.unlearn.model_copy(update={"criterion": "random", "end": "highest"})
    return replace(setting, recipe=recipe.model_copy(update={"unlearn": unlearning}))


def _finetuned(
    setting: Setting, original: nn.Module, plan: PruningPlan, unlearned: Unlearned, journal: Journal
) -> tuple[nn.Module, Cost]:
    """Return fine-tuning only, with as many operations as unlearning took."""
    fed = setting.recipe.federation
    model = copy.deepcopy(original)
    finetune(
        model,
        setting.engine,
        training=setting.recipe.repair(),
        rounds=max(1, unlearned.cost.rounds),
        flops=unlearned.cost.client_flops,
        images=int(_images_kept(setting, unlearned)),
        forget=setting.forget,
        clients=unlearned.clients,
        participation=fed.participation,
        seed=fed.seed,
        plan=plan,
        journal=journal,
    )
    return model, Cost.of(journal.entries("finetune"))


def _images_kept(setting: Setting, unlearned: Unlearned) -> float:
    """Return how many images of the kept classes the clients of a round hold, on average."""
    rows = [setting.engine.clients.index(name) for name in unlearned.clients]
    kept = setting.table[rows][:, list(unlearned.labels)].sum()
    return float(kept) * setting.recipe.federation.participation


def _retrained(setting: Setting, journal: Journal, *, data: str, seed: int) -> Oracle:
    recipe = setting.recipe
    model = new_model(recipe, setting.splits.train, seed=seed)
    cache = RetrainedCache.of(recipe, setting.forget, data, seed)
    if cache is not None and not journal.steps("retrain"):
        kept = cache.restore(model)
        if kept is not None:
            return Oracle(model, kept, True)
    steps = retrain(
        model,
        setting.engine,
        training=recipe.training(),
        rounds=recipe.train.rounds,
        forget=setting.forget,
        clients=setting.holders(),
        participation=recipe.federation.participation,
        validate=recipe.train.validate_every if recipe.data.validation else 0,
        seed=seed,
        journal=journal,
    )
    if cache is not None:
        cache.store(model, steps)
    return Oracle(model, steps, False)
