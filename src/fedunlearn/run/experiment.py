"""What a recipe sets up before any training, and the phases of a run as the recipe sets them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedunlearn.audits.images import AuditImages, audit_images
from fedunlearn.channels.fit import without_addresses
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.plan import Classifier, Cut
from fedunlearn.channels.scores import CRITERIA, Criterion, Ranking
from fedunlearn.channels.stats import Pooling, capped, mean_of_clients, pooled
from fedunlearn.checkpoint import Weights, load_weights, read_weights, save_checkpoint
from fedunlearn.data.images import LabelledImages, joined
from fedunlearn.data.partition import class_table
from fedunlearn.data.splits import Splits
from fedunlearn.errors import ModelError, PlanError, RecipeError
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import Engine
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.privacy import DEFAULT_RULES
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.models import build_model
from fedunlearn.run.inputs import (
    check_numbers,
    class_numbers,
    fingerprint,
    normalised_for,
    numbered,
    read_data,
    share_out,
)
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.tables import ComputeTable
from fedunlearn.training.compute import Compute, own_device, workers_on
from fedunlearn.training.sgd import SCHEDULES, one_cycle

_MOST_GONE = 10_000  # classes that a model knew and the data has no more


@dataclass(frozen=True, eq=False)
class Experiment:
    """What a recipe sets up before any training.

    Attributes:
        recipe: the recipe.
        splits: training and test images; the weights' own normalisation where they have one, and no image or number
            of a class that they forgot before.
        engine: the clients.
        model: the original architecture; fresh weights, or those of ``weights``.
        weights: what ``model.weights`` names.
        forget: classes to forget.
        table: training images per client and class, int64, shape ``(clients, classes)``.
        clients: training images of each client.
        validation: validation images of each client that has some.
        earlier: numbers, among all classes of the data, of those that ``weights`` forgot before.
        all_classes: names of all classes of the data.
    """

    recipe: Recipe
    splits: Splits
    engine: Engine
    model: Classifier
    weights: Weights | None
    forget: tuple[int, ...]
    table: torch.Tensor
    clients: Mapping[str, LabelledImages]
    validation: Mapping[str, LabelledImages]
    earlier: tuple[int, ...]
    all_classes: tuple[str, ...]

    def keepers(self) -> tuple[str, ...]:
        """Return the clients that hold as many images of the kept classes as their rules ask for, and train on them."""
        kept = [label for label in range(len(self.splits.train.classes)) if label not in self.forget]
        least = max(1, self.recipe.rules().min_images)
        return tuple(name for name, row in zip(self.clients, self.table) if int(row[kept].sum()) >= least)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all images, and of who holds which where others that are gone decided that."""
        images = fingerprint(self.splits)
        if not self.earlier:
            return images
        digest = hashlib.sha256(images.encode())
        for part in (self.clients, self.validation):
            for name, data in part.items():
                digest.update(json.dumps([name, *data.images.shape]).encode())
                digest.update(data.images.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def audit_images(self) -> AuditImages:
        """Return the images to audit with: all clients' training images, and the test images."""
        return audit_images(
            joined(self.clients.values()),
            self.splits.test,
            forget=self.forget,
            per_class=self.recipe.audit.images,
            seed=self.recipe.federation.seed,
            lr=self.recipe.audit.lr,
        )

    def federation(self, journal: Journal) -> Federation:
        """Return the clients with ``journal`` as their record."""
        fed = self.recipe.federation
        return Federation(self.engine, journal, seed=fed.seed, participation=fed.participation)

    def unlearning(self, fed: Federation) -> Federation:
        """Return ``fed`` with the seed of unlearning, where the recipe gives it one of its own."""
        seed = self.recipe.unlearn.seed
        return fed if seed is None else replace(fed, seed=seed)

    def server(self) -> Server:
        """Return what the server does while the original and the retrained models are trained."""
        return Server(one_cycle, self.recipe.train.server_momentum)

    def ranking(self) -> Ranking:
        """Return how the recipe measures and ranks channels."""
        u = self.recipe.unlearn
        pooling: Pooling = mean_of_clients if u.mean_of_clients else pooled
        if u.influence is not None:
            pooling = capped(u.influence, pooling)
        return Ranking(_criterion(self.recipe), u.hook, pooling, u.sample or None)

    def cut(self) -> Cut:
        """Return how many channels the recipe removes, and which end of the ranking.

        Raises:
            RecipeError: the recipe leaves the fraction to ``unlearn_smallest``.
        """
        u = self.recipe.unlearn
        if u.fraction == "auto":
            raise RecipeError(
                'unlearn.fraction = "auto" is chosen by unlearn and run only: give a number here, such as '
                "--set unlearn.fraction=0.3"
            )
        return Cut(u.fraction, u.end, u.scope)

    def repair(self) -> Repair:
        """Return what the recipe does after pruning."""
        u = self.recipe.unlearn
        rounds = u.rounds if u.repair == "finetune" else 0
        server = Server(SCHEDULES[u.schedule], u.server_momentum)
        return Repair(self.recipe.repair(), rounds, u.repair != "none", u.target, server)


def prepare(recipe: Recipe) -> Experiment:
    """Read data and weights, share the images out and build the model; refuse what cannot work before that.

    Raises:
        FedUnlearnError: the recipe, the data, the weights or the model cannot be used.
    """
    weights = read_weights(Path(recipe.model.weights)) if recipe.model.weights else None
    splits = read_data(recipe)
    earlier: tuple[int, ...] = ()
    if weights is not None:
        splits = normalised_for(splits, weights, recipe)
        check_numbers(recipe.unlearn.forget, splits.train.classes, weights)
        weights, earlier = numbered(weights, splits.train.classes)
        again = sorted(set(class_numbers(recipe.unlearn.forget, splits.train.classes)) & set(earlier))
        if again:
            raise PlanError(
                f"{weights.path} has no output row for class {again[0]} ({splits.train.classes[again[0]]}), which was "
                "forgotten before: give unlearn.forget another class, or model.weights a model that knows this one"
            )
    return set_up(recipe, splits, weights, earlier)


def set_up(recipe: Recipe, splits: Splits, weights: Weights | None, earlier: Sequence[int] = ()) -> Experiment:
    """Share ``splits`` out and build the model, with fresh weights where ``weights`` is None; refuse what cannot work.

    Args:
        recipe: the recipe.
        splits: all images.
        weights: of the original, its rows numbered as the classes of ``splits``.
        earlier: classes that were forgotten before: the original has no row for them, and nobody an image.

    Raises:
        FedUnlearnError: the recipe, the data, the weights or the model cannot be used.
    """
    everything, wanted = splits.train, class_numbers(recipe.unlearn.forget, splits.train.classes)
    splits = Splits(*(images.narrowed(earlier) for images in splits)) if earlier else splits
    train = splits.train
    if len(wanted) == len(train.classes):
        names = ", ".join(everything.classes[label] for label in wanted)
        raise PlanError(f"{names}: no other class is left, and at least one must stay; check unlearn.forget")
    forget = tuple(train.classes.index(everything.classes[label]) for label in wanted)
    seed = recipe.federation.seed
    if weights is None:
        model = new_model(recipe, train, seed=seed, earlier=earlier)
    else:
        model = load_weights(architecture_of(weights, recipe, everything), weights)
        model = replace(model, labels=None) if earlier else model
    head_layer(model.module, model.example)  # refused here, not after hours of training
    find_channels(model.module, model.example)
    clients, validation = share_out(recipe, everything, earlier)
    if earlier:  # who held nothing else has nothing to train or measure on
        clients = {name: images for name, images in clients.items() if len(images)}
        validation = {name: images for name, images in validation.items() if name in clients}
    engine = _local_engine(recipe, clients, validation)
    table = class_table(clients)
    for label in forget:
        if int(table[:, label].sum()) == 0:
            raise PlanError(f"no client holds an image of class {label} ({train.classes[label]}): nothing to forget")
    about = tuple(earlier), everything.classes
    return Experiment(recipe, splits, engine, model, weights, forget, table, clients, validation, *about)


def network_of(experiment: Experiment) -> dict[str, Any]:
    """Return what tells a network of the user's own from one that its file held before; empty of a shipped one.

    A digest of its layers and of the file of its function, not of what that imports.
    """
    name = experiment.recipe.model.name
    if ":" not in name:
        return {}
    digest = hashlib.sha256(without_addresses(experiment.model.module).encode())
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    if file is not None:
        digest.update(Path(file).read_bytes())
    return {"network": {name: digest.hexdigest()}}


def holds_validation(experiment: Experiment) -> bool:
    """Return whether some client holds out a validation image of each of the classes to forget."""
    held = [images.counts()[list(experiment.forget)] for images in experiment.validation.values()]
    return bool(held) and bool((torch.stack(held).sum(0) > 0).all())


def check_choice(experiment: Experiment) -> None:
    """Refuse to leave the fraction to validation images that no client has.

    Raises:
        PlanError: ``unlearn.fraction`` is ``"auto"``, and no client holds one of the classes to forget.
    """
    recipe, forget = experiment.recipe, list(experiment.forget)
    if recipe.unlearn.fraction != "auto" or recipe.federation.engine == "flower":  # sites hold out what they like
        return
    if not any(int(images.counts()[forget].sum()) for images in experiment.validation.values()):
        raise PlanError(
            'unlearn.fraction = "auto" is chosen by validation images of the classes to forget, and the clients hold '
            f"none of them (data.validation is {recipe.data.validation:g}): raise it, take fewer clients, or give a "
            "fraction"
        )


def architecture_of(weights: Weights, recipe: Recipe, images: LabelledImages) -> Classifier:
    """Return the recipe's architecture as ``weights`` were cut from it, with fresh weights.

    It has a row for each class of ``images``, and for each that the weights forgot and the data has no more.
    """
    model = new_model(recipe, images, seed=recipe.federation.seed)
    rows = weights.plan.shapes.get(f"{head_layer(model.module, model.example)}.weight", (model.rows,))[0]
    gone = rows - len(images.classes)
    if gone <= 0:
        return model
    if gone > _MOST_GONE:  # a file of a few bytes would ask for any amount of memory
        raise ModelError(
            f"{weights.path}: its plan tells of {rows} output rows, the data has {len(images.classes)} classes: the "
            "file was changed, or is of another data set"
        )
    names = (*images.classes, *(f"gone {number}" for number in range(gone)))
    return new_model(recipe, replace(images, classes=names), seed=recipe.federation.seed)


def missing_rows(weights: Weights, whole: Classifier) -> int:
    """Return how many rows of ``whole`` weights without a label map lack: another tool may have taken them off."""
    head = weights.state.get(f"{head_layer(whole.module, whole.example)}.weight")
    return 0 if weights.labels is not None or head is None else whole.rows - len(head)


def computing(experiment: Experiment, table: ComputeTable) -> Experiment:
    """Return ``experiment`` with a recipe and clients that compute as ``table`` says."""
    recipe = experiment.recipe.model_copy(update={"compute": table})
    return replace(experiment, recipe=recipe, engine=_local_engine(recipe, experiment.clients, experiment.validation))


def _local_engine(
    recipe: Recipe, clients: Mapping[str, LabelledImages], validation: Mapping[str, LabelledImages]
) -> LocalEngine:
    table = recipe.compute
    precision = "float32" if table.precision == "auto" else table.precision
    compute = Compute(precision, table.memory_format, table.workers or workers_on(own_device()))
    # Clients elsewhere have rules of their own, and this process draws no noise for them.
    rules = recipe.rules() if recipe.federation.engine == "local" else DEFAULT_RULES
    return LocalEngine(clients, validation=validation, rules=rules, compute=compute)


def new_model(recipe: Recipe, images: LabelledImages, *, seed: int, earlier: Sequence[int] = ()) -> Classifier:
    """Return the recipe's architecture with fresh weights, which depend on ``seed`` alone.

    Args:
        recipe: the recipe.
        images: of the kind the model takes.
        seed: of the weights.
        earlier: numbers, among all classes of the data, of those that ``images`` lack: the model has no rows for them.
    """
    classes, colours = len(images.classes) + len(earlier), images.colours
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_model(recipe.model.name, classes=classes, colours=colours, shortcut=recipe.model.shortcut)
    model = Classifier(module, images.shape)
    return replace(model.without_rows(earlier), labels=None) if earlier else model


def _criterion(recipe: Recipe) -> Criterion:
    """Return the criterion with the options the recipe gives it."""
    name = recipe.unlearn.criterion
    if name == "tf_idf":
        return partial(CRITERIA[name], reference=recipe.unlearn.reference, smoothing=recipe.unlearn.smoothing)
    return CRITERIA[name]


def original_model(experiment: Experiment, fed: Federation) -> Classifier:
    """Return the original, trained or loaded."""
    if experiment.weights is not None:
        return experiment.model
    train = experiment.recipe.train
    training, server = experiment.recipe.training(), experiment.server()
    return train_rounds(experiment.model, fed, training, rounds=train.rounds, server=server)


def save_model(path: Path, model: Classifier, experiment: Experiment) -> None:
    """Write a model of the run."""
    test, about = experiment.splits.test, experiment.recipe.model
    if experiment.earlier:  # the labels are the numbers that the data has for its classes, whatever was forgotten
        kept = [label for label in range(len(experiment.all_classes)) if label not in experiment.earlier]
        rows = range(len(kept)) if model.labels is None else model.labels
        model = replace(model, labels=tuple(kept[label] for label in rows))
        test = replace(test.take(slice(0, 0)), classes=experiment.all_classes)
    save_checkpoint(path, model, images=test, architecture={"name": about.name, "shortcut": about.shortcut})
