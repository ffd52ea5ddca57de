"""The recipe: one TOML file that says everything about a run.

``run_header`` and ``portable_recipe`` say it of a run in its journal and its files.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedunlearn.errors import RecipeError
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy
from fedunlearn.methods.table import METHODS
from fedunlearn.models import RESNETS, VGGS
from fedunlearn.run.tables import (
    ON_FLOWER,
    PRUNE,
    AuditTable,
    ComputeTable,
    DataTable,
    EraseTable,
    EvidenceTable,
    FederationTable,
    ModelTable,
    PrivacyTable,
    Table,
    TrainTable,
    UnlearnTable,
)
from fedunlearn.training.sgd import Training
from fedunlearn.version import __version__

PATHS = (("data", "path"), ("model", "weights"), ("audit", "models"))  # keys that name places on disk
# name -> (file in recipes/, model.name where the file leaves it open)
SHIPPED: dict[str, tuple[str, str | None]] = {
    "digits": ("digits", None),
    "mnist-writers": ("mnist-writers", None),
    **{
        f"{data}-{model}": (f"{data}-{family}", model)
        for data in ("cifar10", "cifar100")
        for family, models in (("resnet", RESNETS), ("vgg", VGGS))
        for model in models
    },
}


class Recipe(Table):
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
        """Return the local settings of the repair: those of training, but for what the recipe says of its own."""
        u = self.unlearn
        decay = self.train.weight_decay if u.weight_decay is None else u.weight_decay
        local = self._local(u.lr, u.local_epochs)
        return replace(local, weight_decay=decay, objective=self.erase.erasing())

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
        """Return what clients do to their statistics before they leave.

        Sites of a deployment have a ``min_images`` of their own, of which none is known but the default.
        """
        fewest = DEFAULT_RULES.min_images if self.federation.engine == "flower" else 1
        return Privacy(self.privacy.min_count, self.privacy.clip, self.privacy.noise, min_images=fewest)

    def digest(self, *tables: str) -> str:
        """Return the SHA-256 of these tables (all where none is named), for a cache.

        Left out is what does not change the result: path, engine, deadline, workers.
        """
        value = self.model_dump(mode="json")
        value["data"].pop("path")
        for name in ("engine", "deadline"):  # who runs the clients does not change what they do, but for their rules
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
    for table, key in PATHS:
        of_table = value.get(table)
        if isinstance(of_table, dict) and str(of_table.get(key)).startswith("~/"):
            of_table[key] = str(Path(of_table[key]).expanduser())  # no shell sees what stands in a recipe
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
    if recipe.data.source == "digits" and recipe.data.path:
        raise RecipeError(
            f"the digits come with scikit-learn, and data.path is {recipe.data.path}: leave it out, or give a recipe "
            "of your images (fedunlearn init writes one)"
        )
    if recipe.data.size and recipe.data.source != "folder":
        raise RecipeError(f"data.size resizes the pictures of a folder, and data.source is {recipe.data.source}")
    if recipe.unlearn.target is not None and recipe.data.validation == 0:
        raise RecipeError("unlearn.target is measured on validation images: set data.validation above 0")
    if recipe.unlearn.target is not None and recipe.unlearn.repair != "finetune":
        raise RecipeError(
            f'unlearn.target ends the rounds of training, and unlearn.repair = "{recipe.unlearn.repair}" has none: '
            "leave one of them out"
        )
    if recipe.unlearn.fraction == "auto":
        _check_auto(recipe)
    if recipe.erase.erasing() is None and recipe.erase != EraseTable():
        erases = recipe.unlearn.method != PRUNE and METHODS[recipe.unlearn.method].erases
        raise RecipeError(
            "[erase] has no weight, so that nothing is erased: set erase.complement or erase.separation"
            + (f", or what {recipe.unlearn.method} has of its own by unlearn.settings={{every = 2}}" if erases else "")
        )
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
            f'unlearn.fraction = "auto" is for the method {PRUNE}, and unlearn.method is {table.method}: give a '
            "number, such as --set unlearn.fraction=0.3; the control that prunes random channels takes it"
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
    known = [] if table.method == PRUNE else [field.name for field in fields(METHODS[table.method].settings)]
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
    if table.criterion != "tf_idf" and (table.reference, table.smoothing) != ("class", 1.0):
        raise RecipeError(
            f"unlearn.reference and unlearn.smoothing are of the criterion tf_idf, and unlearn.criterion is "
            f'{table.criterion}: leave them out, or set unlearn.criterion = "tf_idf"'
        )
    erases = recipe.erase.erasing() is not None or (table.method != PRUNE and METHODS[table.method].erases)
    if erases and table.repair != "finetune":
        raise RecipeError('the erase step is a part of the repair\'s rounds: set unlearn.repair to "finetune"')
    if erases and table.target is not None:
        raise RecipeError(
            "unlearn.target would end the rounds before those of the erase step are done: leave one of them out"
        )
    if table.method != PRUNE:
        method = METHODS[table.method]
        replace(method.settings, **table.settings)  # refuses what is out of range
        if recipe.erase.erasing() is not None and not method.erases:
            raise RecipeError(f"[erase] is no part of the method {table.method}: leave it out")
        if not method.measures and (table.target is not None or table.repair != "finetune"):
            raise RecipeError(
                f"unlearn.target and unlearn.repair are of what is pruned, and not of the method {table.method}: leave "
                "them out"
            )
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
        return tomllib.loads(path.read_text("utf-8-sig"))  # some editors begin a file with a byte order mark
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
    if name == "forget" and not isinstance(parsed, list):  # true, 3.0 and dates are names here
        parsed = [parsed if isinstance(parsed, str) or type(parsed) is int else text.strip()]
    keys = value.setdefault(table, {})
    if not isinstance(keys, dict):
        raise RecipeError(
            f"{table} must be a table of keys, [{table}], got {keys!r}: {key.strip()} cannot be set in it"
        )
    keys[name] = parsed


def _explain(error: ValidationError) -> str:
    found = error.errors()
    # A misspelt table is unknown, and the one that was meant is missing: the first of these says more.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        table = Recipe.model_fields.get(str(first["loc"][0]))
        keys = (
            list(Recipe.model_fields) if table is None or len(first["loc"]) == 1 else list(_keys(str(first["loc"][0])))
        )
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, 1)
        hint = f", did you mean {near[0]!r}?" if near else f"; known here: {', '.join(keys)}"
        return f"unknown recipe key {where}{hint}"
    got = "" if first["type"] == "missing" else f", got {first['input']!r}"
    return f"recipe key {where}: {first['msg'].removeprefix('Value error, ')}{got}"


def _keys(table: str) -> Sequence[str]:
    annotation = Recipe.model_fields[table].annotation
    assert annotation is not None  # pydantic requires one
    return list(annotation.model_fields)
