"""What a recipe sets up before any training: images, clients, model.

Then the phases of a run as its recipe sets them, and how its clients compute on this machine: as the recipe says, as
the run began, or as a probe found.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from fedunlearn.audits.subject import AuditImages, audit_images
from fedunlearn.channels.groups import find_groups, head_layer
from fedunlearn.channels.plan import PruningPlan
from fedunlearn.channels.scores import CRITERIA, Criterion, forget_classes
from fedunlearn.checkpoint import Weights, load_weights, read_weights, save_checkpoint
from fedunlearn.data.images import LabelledImages, joined
from fedunlearn.data.partition import class_table, hold_out, partition
from fedunlearn.data.readers import READERS, Splits
from fedunlearn.errors import ModelError, PlanError, RecipeError
from fedunlearn.federation.jobs import ClientData, Engine
from fedunlearn.federation.journal import Journal, header_of
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.files import cache_folder, write_text
from fedunlearn.models import build_model
from fedunlearn.run.recipe import ON_FLOWER, ComputeTable, Recipe
from fedunlearn.seeding import generator
from fedunlearn.training.compute import Compute, cores, own_device, workers_on
from fedunlearn.training.sgd import one_cycle
from fedunlearn.training.speed import probe
from fedunlearn.unlearn import Unlearned, unlearn
from fedunlearn.version import __version__


@dataclass(frozen=True, eq=False)
class Setting:
    """What a recipe sets up before any training.

    Attributes:
        recipe: the recipe.
        splits: training and test images; the weights' own normalisation where they have one.
        engine: the clients.
        model: the original architecture; fresh weights, or those of ``weights``.
        weights: what ``model.weights`` names.
        forget: classes to forget.
        table: training images per client and class, int64, shape ``(clients, classes)``.
        clients: training images of each client.
        validation: validation images of each client that has some.
    """

    recipe: Recipe
    splits: Splits
    engine: Engine
    model: nn.Module
    weights: Weights | None
    forget: tuple[int, ...]
    table: torch.Tensor
    clients: Mapping[str, LabelledImages]
    validation: Mapping[str, LabelledImages]

    def holders(self) -> tuple[str, ...]:
        """Return the clients that hold images of the kept classes."""
        kept = [label for label in range(len(self.splits.train.classes)) if label not in self.forget]
        return tuple(name for name, row in zip(self.clients, self.table) if int(row[kept].sum()) > 0)

    def audit_images(self) -> AuditImages:
        """Return the images to audit with: all clients' training images, and the test images."""
        return audit_images(
            joined(self.clients.values()),
            self.splits.test,
            forget=self.forget,
            per_class=self.recipe.audit.images,
            seed=self.recipe.federation.seed,
        )


def prepare(recipe: Recipe) -> Setting:
    """Read data and weights, share the images out and build the model; refuse what cannot work before that.

    Raises:
        FedUnlearnError: the recipe, the data, the weights or the model cannot be used.
    """
    weights = read_weights(Path(recipe.model.weights)) if recipe.model.weights else None
    splits = read_data(recipe)
    if weights is not None:
        splits = normalised_for(splits, weights, recipe)
    return set_up(recipe, splits, weights)


def set_up(recipe: Recipe, splits: Splits, weights: Weights | None) -> Setting:
    """Share ``splits`` out and build the model, with fresh weights where ``weights`` is None; refuse what cannot work.

    Raises:
        FedUnlearnError: the recipe, the data, the weights or the model cannot be used.
    """
    train = splits.train
    forget = forget_classes(class_numbers(recipe.unlearn.forget, train.classes), len(train.classes))
    model = new_model(recipe, train, seed=recipe.federation.seed)
    if weights is not None:
        _check_rows(weights, len(train.classes), forget)
        model = load_weights(model, weights)
    example = torch.randn((2, *train.shape), generator=generator(0, "example"))
    head_layer(model, example)
    find_groups(model, example)
    clients, validation = share_out(recipe, train)
    engine = _local_engine(recipe, clients, validation)
    table = class_table(clients)
    for label in forget:
        if int(table[:, label].sum()) == 0:
            raise PlanError(f"no client holds an image of class {label} ({train.classes[label]}): nothing to forget")
    return Setting(recipe, splits, engine, model, weights, forget, table, clients, validation)


def computing(setting: Setting, table: ComputeTable) -> Setting:
    """Return ``setting`` with a recipe and clients that compute as ``table`` says."""
    recipe = setting.recipe.model_copy(update={"compute": table})
    return replace(setting, recipe=recipe, engine=_local_engine(recipe, setting.clients, setting.validation))


def _local_engine(
    recipe: Recipe, clients: Mapping[str, LabelledImages], validation: Mapping[str, LabelledImages]
) -> LocalEngine:
    table = recipe.compute
    precision = "float32" if table.precision == "auto" else table.precision
    compute = Compute(precision, table.memory_format, table.workers or workers_on(own_device()))
    return LocalEngine(clients, validation=validation, rules=recipe.rules(), compute=compute)


def share_out(recipe: Recipe, train: LabelledImages) -> tuple[dict[str, LabelledImages], dict[str, LabelledImages]]:
    """Return the training images of each client, and the validation images of each that has some."""
    fed = recipe.federation
    shares = partition(
        train, by=fed.partition, clients=fed.clients or None, alpha=fed.alpha, bias=fed.bias, seed=fed.seed
    )
    return hold_out(shares, recipe.data.validation, seed=fed.seed)


def client_data(recipe: Recipe, number: int) -> ClientData:
    """Return what client ``number`` of the recipe holds, for clients that are processes of their own.

    Raises:
        FedUnlearnError: the recipe or the data cannot be used, or it has no such client.
    """
    splits = read_data(recipe)
    if recipe.model.weights:
        splits = normalised_for(splits, read_weights(Path(recipe.model.weights)), recipe)
    clients, validation = share_out(recipe, splits.train)
    if not 0 <= number < len(clients):
        raise RecipeError(f"the recipe has clients 0 .. {len(clients) - 1}, this one is to be {number}")
    name = list(clients)[number]
    return ClientData(name, clients[name], validation.get(name))


def class_numbers(forget: Sequence[int | str], classes: Sequence[str]) -> list[int]:
    """Return the number of each class in ``forget``, which may hold names.

    Raises:
        PlanError: no class has such a name.
    """
    unknown = [name for name in forget if isinstance(name, str) and name not in classes]
    if unknown:
        raise PlanError(f"no class is named {unknown[0]!r}; the classes are {', '.join(classes)}: check unlearn.forget")
    return [classes.index(name) if isinstance(name, str) else name for name in forget]


def _check_rows(weights: Weights, classes: int, forget: tuple[int, ...]) -> None:
    """Refuse weights whose output rows are not those of classes ``0 .. classes - 1``, in this order."""
    if weights.labels is None or weights.labels == tuple(range(classes)):
        return
    gone = sorted(set(range(classes)) - set(weights.labels))
    raise ModelError(
        f"{weights.path} has output rows for the classes {list(weights.labels)}, not for all of 0 .. {classes - 1}: "
        f"start from the model before they were forgotten, with unlearn.forget={sorted({*gone, *forget})}"
    )


def normalised_for(splits: Splits, weights: Weights, recipe: Recipe) -> Splits:
    """Return the images normalised as ``weights`` were trained, where the file says how.

    Raises:
        RecipeError: the file says that the weights are of another shortcut.
        ModelError: the normalisation has another number of colours than the images.
    """
    if weights.shortcut not in (None, recipe.model.shortcut):
        raise RecipeError(
            f"{weights.path} was trained with shortcut {weights.shortcut}, the recipe has {recipe.model.shortcut}: "
            f"use --set model.shortcut={weights.shortcut}"
        )
    if weights.mean is None or weights.std is None:
        return splits
    if len(weights.mean) != splits.train.colours:
        raise ModelError(
            f"{weights.path} was trained on images of {len(weights.mean)} colours, the data has {splits.train.colours}"
        )
    return Splits(*(replace(images, mean=weights.mean, std=weights.std) for images in splits))


def read_data(recipe: Recipe) -> Splits:
    """Return the images that the recipe names.

    Raises:
        RecipeError: the recipe does not say where they are.
        DataError: they cannot be read.
    """
    if recipe.data.source != "digits" and not recipe.data.path:
        raise RecipeError(f"the source {recipe.data.source} is read from disk: give its place with --data")
    return READERS[recipe.data.source](Path(recipe.data.path), official=recipe.data.official, size=recipe.data.size)


def new_model(recipe: Recipe, images: LabelledImages, *, seed: int) -> nn.Module:
    """Return the recipe's architecture with fresh weights, which depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(
            recipe.model.name, classes=len(images.classes), colours=images.colours, shortcut=recipe.model.shortcut
        )


def criterion_of(recipe: Recipe) -> Criterion:
    """Return the criterion with the options the recipe gives it."""
    name = recipe.unlearn.criterion
    if name == "tf_idf":
        return partial(CRITERIA[name], reference=recipe.unlearn.reference, smoothing=recipe.unlearn.smoothing)
    if name == "random":
        return partial(CRITERIA[name], seed=recipe.federation.seed)
    return CRITERIA[name]


def fingerprint(splits: Splits) -> str:
    """Return the SHA-256 of all images, labels and groups, and of the names and the normalisation that go with them."""
    digest = hashlib.sha256()
    for images in splits:
        about = [list(images.images.shape), images.classes, images.mean, images.std, images.groups is not None]
        digest.update(json.dumps(about).encode())
        for tensor in (images.images, images.labels, images.groups):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def original_model(setting: Setting, journal: Journal) -> tuple[nn.Module, PruningPlan]:
    """Return the original, trained or loaded, and how its shapes follow from its architecture."""
    if setting.weights is not None:
        return setting.model, setting.weights.plan
    fed = setting.recipe.federation
    train_rounds(
        setting.model,
        setting.engine,
        phase="train",
        training=setting.recipe.training(),
        rounds=setting.recipe.train.rounds,
        journal=journal,
        schedule=one_cycle,
        participation=fed.participation,
        seed=fed.seed,
    )
    return setting.model, PruningPlan()


def unlearned_model(setting: Setting, original: nn.Module, plan: PruningPlan, journal: Journal) -> Unlearned:
    """Return what the recipe makes of ``original``."""
    u = setting.recipe.unlearn
    return unlearn(
        original,
        setting.engine,
        forget=setting.forget,
        fraction=u.fraction,
        training=setting.recipe.repair(),
        rounds=u.rounds if u.repair == "finetune" else 0,
        criterion=criterion_of(setting.recipe),
        hook=u.hook,
        end=u.end,
        scope=u.scope,
        jointly=u.jointly,
        mean_of_clients=u.mean_of_clients,
        influence=u.influence,
        sample=u.sample or None,
        batch_norm=u.repair != "none",
        target=u.target,
        participation=setting.recipe.federation.participation,
        seed=setting.recipe.federation.seed,
        plan=plan,
        journal=journal,
    )


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


def processor() -> str:
    """Return the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


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
