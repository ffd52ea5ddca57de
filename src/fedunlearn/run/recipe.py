"""The recipe: one TOML file that says everything about a run.

``run_header`` and ``portable_recipe`` say it of a run in its journal and its files.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from fedunlearn.arguments import is_number
from fedunlearn.channels.scores import CRITERIA
from fedunlearn.data.batches import AUGMENTATIONS
from fedunlearn.data.readers import READERS
from fedunlearn.errors import RecipeError
from fedunlearn.federation.privacy import Privacy
from fedunlearn.methods.table import METHODS
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.sgd import SCHEDULES, Training
from fedunlearn.version import __version__

_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56")
_VGGS = ("vgg11", "vgg13", "vgg16", "vgg19")
PATHS = (("data", "path"), ("model", "weights"), ("audit", "models"))  # keys that name places on disk
PRUNE = "prune"  # the method of this project, by all keys of [unlearn] and [erase]
# name -> (file in recipes/, model.name where the file leaves it open)
SHIPPED: dict[str, tuple[str, str | None]] = {
    "digits": ("digits", None),
    "mnist-writers": ("mnist-writers", None),
    **{
        f"{data}-{model}": (f"{data}-{family}", model)
        for data in ("cifar10", "cifar100")
        for family, models in (("resnet", _RESNETS), ("vgg", _VGGS))
        for model in models
    },
}


def _among(table: Collection[str]) -> AfterValidator:
    """Return a check that a value is a name of ``table``: who adds a row there has nothing to add here."""

    def known(name: str) -> str:
        if name not in table:
            near = difflib.get_close_matches(name, table, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"Input should be one of {', '.join(table)}{hint}")  # pydantic says which key it is
        return name

    return AfterValidator(known)


def _fraction(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError('Input should be at least 0 and below 1, or "auto"')
    return float(value)


Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataTable(_Table):
    """Where the images come from."""

    source: Annotated[str, _among(READERS)]
    path: str = ""
    validation: Share = 0.1
    official: bool = True
    size: Annotated[int, Field(ge=0)] = 0


class FederationTable(_Table):
    """Who holds them, and who runs the clients. ``clients = 0``: one per group."""

    clients: Annotated[int, Field(ge=0)] = 10
    partition: Literal["iid", "dirichlet", "bias", "group"] = "iid"
    alpha: Positive | None = None
    bias: Annotated[float, Field(ge=0, le=1)] | None = None
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    engine: str = "local"  # engines.py knows them
    deadline: Positive = 600.0
    seed: Annotated[int, Field(ge=0)] = 0


class ModelTable(_Table):
    """The architecture, and weights to start from."""

    name: str
    weights: str = ""
    shortcut: Literal["A", "B"] = "A"


class TrainTable(_Table):
    """Training from fresh weights: the original and the retrained model."""

    rounds: Count
    local_epochs: Positive = 1.0
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Positive = 0.1
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    label_smoothing: Share = 0.0
    server_momentum: Share = 0.0
    validate_every: Count = 1
    augment: tuple[Annotated[str, _among(AUGMENTATIONS)], ...] = ()


class UnlearnTable(_Table):
    """Forgetting: what, by which ranking, and the repair after it."""

    forget: tuple[int | str, ...]
    method: Annotated[str, _among((PRUNE, *METHODS))] = PRUNE
    settings: dict[str, float] = Field(default_factory=dict)  # of the method
    criterion: Annotated[str, _among(CRITERIA)] = "tf_idf"
    reference: Literal["class", "channel"] = "class"
    smoothing: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    hook: Literal["activation", "convolution"] = "activation"
    end: Literal["highest", "lowest"] = "highest"
    scope: Literal["layer", "global"] = "layer"
    fraction: Annotated[float | Literal["auto"], PlainValidator(_fraction)]
    jointly: bool = False
    mean_of_clients: bool = False
    influence: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    sample: Annotated[int, Field(ge=0)] = 0
    repair: Literal["none", "reestimate", "finetune"] = "finetune"
    rounds: Count = 1
    local_epochs: Positive = 1.0
    lr: Positive = 0.05
    schedule: Annotated[str, _among(SCHEDULES)] = "constant"
    server_momentum: Share = 0.0
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None  # that of the federation where None


class EraseTable(_Table):
    """What clients do with images of the forgotten classes in the repair, see ``Erasing``; nothing by default."""

    complement: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    separation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    every: Annotated[int, Field(ge=1)] = 1

    def erasing(self) -> Erasing | None:
        """Return the settings of the erase step, None where both weights are 0."""
        return Erasing(**self.model_dump()) if self.complement or self.separation else None


class PrivacyTable(_Table):
    """What leaves the clients when they are measured, see ``Privacy``; ``secure``: only the sum over all of them."""

    min_count: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    secure: bool = False


class ComputeTable(_Table):
    """How clients of this process compute, see ``Compute``; ``auto``: all three as a probe of the machine finds best.

    ``workers = 0``: one per core.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    workers: Annotated[int, Field(ge=0)] = 0


ON_FLOWER = ComputeTable(precision="float32")


class AuditTable(_Table):
    """How forgetting is judged: retrained models, images of each class for probes, rate of relearning.

    ``models``: a folder with retrained models that this recipe gave before, and its original.
    """

    oracles: Annotated[int, Field(ge=0)] = 3
    models: str = ""
    images: Annotated[int, Field(ge=10)] = 500
    lr: Positive = 0.05


class EvidenceTable(_Table):
    """What the record says: the request it answers, who answers for it, and for how long it holds.

    ``feature_maps``: show test images, some of the forgotten class, in a report that may be passed on.
    """

    request: str = ""
    operator: str = ""
    valid_days: Annotated[int, Field(ge=1, le=36500)] = 365
    feature_maps: bool = False


class Recipe(_Table):
    """All of a run."""

    data: DataTable
    federation: FederationTable = FederationTable()
    model: ModelTable
    train: TrainTable
    unlearn: UnlearnTable
    erase: EraseTable = EraseTable()
    privacy: PrivacyTable = PrivacyTable()
    compute: ComputeTable = ComputeTable()
    audit: AuditTable = AuditTable()
    evidence: EvidenceTable = EvidenceTable()

    def training(self) -> Training:
        """Return the local settings of training from fresh weights."""
        t = self.train
        return self._local(t.lr, t.local_epochs)

    def repair(self) -> Training:
        """Return the local settings of the repair: those of training, with a learning rate and epochs of its own."""
        return replace(self._local(self.unlearn.lr, self.unlearn.local_epochs), objective=self.erase.erasing())

    def _local(self, lr: float, local_epochs: float) -> Training:
        t = self.train
        return Training(
            lr,
            t.batch_size,
            local_epochs,
            t.momentum,
            t.weight_decay,
            label_smoothing=t.label_smoothing,
            augment=t.augment,
        )

    def rules(self) -> Privacy:
        """Return what clients do to their statistics before they leave."""
        return Privacy(self.privacy.min_count, self.privacy.clip, self.privacy.noise, min_images=1)

    def digest(self, *tables: str) -> str:
        """Return the SHA-256 of these tables (all where none is named), for a cache.

        Left out is what does not change the result: path, engine, deadline, workers.
        """
        value = self.model_dump(mode="json")
        value["data"].pop("path")
        for name in ("engine", "deadline"):  # who runs the clients does not change what they do
            value["federation"].pop(name)
        value["compute"].pop("workers")  # nor does how many work at the same time
        chosen = {table: value[table] for table in tables or value}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a shipped recipe by name, or the one in a TOML file, with ``table.key=value`` overrides.

    Raises:
        RecipeError: there is no such recipe, or a key or value is not valid.
    """
    value = _read(name)
    for override in overrides:
        _override(value, override)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Refuse keys that contradict each other.

    Raises:
        RecipeError: a key or value is not valid beside the others.
    """
    if recipe.unlearn.target is not None and recipe.data.validation == 0:
        raise RecipeError("unlearn.target is measured on validation images: set data.validation above 0")
    if recipe.unlearn.fraction == "auto":
        _check_auto(recipe)
    if recipe.erase.erasing() is None and recipe.erase != EraseTable():
        raise RecipeError("[erase] has no weight, so that nothing is erased: set erase.complement or erase.separation")
    if recipe.erase.erasing() is not None and recipe.unlearn.repair != "finetune":
        raise RecipeError('[erase] is a part of the repair\'s rounds: set unlearn.repair to "finetune"')
    _check_method(recipe)
    recipe.rules()
    compute = recipe.compute
    if compute.precision == "auto" and compute != ComputeTable():
        raise RecipeError("compute.memory_format and compute.workers need a compute.precision that is not auto")
    if recipe.federation.engine != "local" and compute not in (ComputeTable(), ON_FLOWER):
        raise RecipeError(
            "compute holds for the engine local: clients on Flower compute in float32, so leave it out, or set "
            "compute.precision = float32 and nothing else there"
        )
    if recipe.privacy.secure and not recipe.federation.engine.startswith("flower"):
        raise RecipeError(
            "privacy.secure needs --engine flower or flower-simulation: clients of one process hide nothing"
        )
    if recipe.privacy.secure and (recipe.unlearn.mean_of_clients or recipe.unlearn.influence is not None):
        raise RecipeError("privacy.secure hides what unlearn.mean_of_clients and unlearn.influence need")
    if recipe.privacy.noise and recipe.unlearn.sample:
        raise RecipeError("privacy.noise needs unlearn.sample = 0: clients measure all their images under noise")


def _check_auto(recipe: Recipe) -> None:
    table = recipe.unlearn
    if recipe.data.validation == 0:
        raise RecipeError('unlearn.fraction = "auto" is chosen by validation images: set data.validation above 0')
    if table.method != PRUNE:
        raise RecipeError(
            f'unlearn.fraction = "auto" is for the method {PRUNE}, and unlearn.method is {table.method}: give a number'
        )
    if len(table.forget) > 1 and not table.jointly:
        raise RecipeError(
            'unlearn.fraction = "auto" with several classes needs unlearn.jointly = true: one ranking, one fraction'
        )
    if recipe.privacy.noise:
        raise RecipeError('unlearn.fraction = "auto" asks for sums that privacy.noise does not hide: give a number')
    if table.end == "lowest":
        raise RecipeError('unlearn.fraction = "auto" cuts the highest scores: leave unlearn.end out, or give a number')


def _check_method(recipe: Recipe) -> None:
    table = recipe.unlearn
    known = [] if table.method == PRUNE else [own.name for own in fields(METHODS[table.method].settings)]
    for name in table.settings:
        if name not in known:
            has = (
                f"has {', '.join(known)}"
                if known
                else (
                    "is set by the other keys of [unlearn] (name another with --method; compare takes each one's own)"
                )
            )
            raise RecipeError(f"unlearn.settings: there is no {name!r}; the method {table.method} {has}")
    if table.method != PRUNE:
        replace(METHODS[table.method].settings, **table.settings)  # refuses what is out of range
        if (recipe.privacy.noise or recipe.privacy.secure) and not METHODS[table.method].measures:
            raise RecipeError(
                "privacy.noise and privacy.secure protect what clients measure, and the method "
                f"{table.method} asks for other numbers: leave them out, or choose one of "
                f"{', '.join(name for name, method in METHODS.items() if method.measures)}"
            )


def run_header(command: str, recipe: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Return what identifies a run in its journal; how many clients work side by side does not."""
    compute = {key: value for key, value in recipe["compute"].items() if key != "workers"}
    return {"command": command, "version": __version__, "recipe": {**recipe, "compute": compute}, "data": data}


def portable_recipe(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Return the recipe as JSON values, its paths relative to ``out``."""
    value: dict[str, Any] = recipe.model_dump(mode="json")
    for table, key in PATHS:
        if value[table][key]:
            value[table][key] = os.path.relpath(value[table][key], out)
    return value


def _read(name: str) -> dict[str, Any]:
    if name in SHIPPED:
        file, model = SHIPPED[name]
        value = tomllib.loads(resources.files("fedunlearn").joinpath("recipes", f"{file}.toml").read_text("utf-8"))
        if model is not None:
            value.setdefault("model", {})["name"] = model
        return value
    path = Path(name)
    if path.is_dir():
        there = next(iter(sorted(path.glob("*.toml"))), "a file that ends in .toml")
        raise RecipeError(f"{path} is a folder: give a recipe, {there}")
    if path.suffix == ".toml" and not path.exists():
        raise RecipeError(f"{path}: there is no such recipe file")
    if path.suffix != ".toml":
        near = difflib.get_close_matches(name, SHIPPED, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"there is no shipped recipe {name!r}{hint} (fedunlearn recipes lists them; a file ends in .toml)"
        )
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: expected a recipe in TOML, but {error}") from error


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    table, _, name = key.strip().partition(".")
    if not equals or not name:
        raise RecipeError(f"--set expects table.key=value, got {override!r}")
    try:
        parsed = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = text.strip()  # a bare word is a string
    if name == "forget" and isinstance(parsed, int | str):
        parsed = [parsed]
    value.setdefault(table, {})[name] = parsed


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        table = Recipe.model_fields.get(str(first["loc"][0]))
        keys = (
            list(Recipe.model_fields) if table is None or len(first["loc"]) == 1 else list(_keys(str(first["loc"][0])))
        )
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, 1)
        hint = f", did you mean {near[0]!r}?" if near else f"; known here: {', '.join(keys)}"
        return f"unknown recipe key {where}{hint}"
    return f"recipe key {where}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}"


def _keys(table: str) -> Sequence[str]:
    annotation = Recipe.model_fields[table].annotation
    assert annotation is not None  # pydantic requires one
    return list(annotation.model_fields)
