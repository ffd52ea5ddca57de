"""The commands: from a recipe to the files in the folder of a run, going on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fedunlearn.checkpoint import load_weights, read_weights, save_checkpoint
from fedunlearn.compare import compare
from fedunlearn.errors import RunError
from fedunlearn.evaluate import evaluate
from fedunlearn.federation.rounds import train_rounds, validation_accuracy
from fedunlearn.files import write_text
from fedunlearn.journal import Journal
from fedunlearn.plan import PruningPlan
from fedunlearn.recipe import Recipe
from fedunlearn.scores import forget_classes
from fedunlearn.setting import (
    Setting,
    class_numbers,
    criterion_of,
    fingerprint,
    new_model,
    normalised_for,
    prepare,
    read_data,
)
from fedunlearn.training import one_cycle
from fedunlearn.unlearn import Unlearned, unlearn
from fedunlearn.version import __version__

SCHEMA = 1
_RESULT = "result.json"


def run(
    recipe: Recipe,
    out: Path,
    *,
    command: str = "run",
    prepared: Callable[[Setting], None] = lambda setting: None,
    observe: Callable[[str, int, int], None] = lambda phase, done, planned: None,
) -> dict[str, Any]:
    """Do what ``command`` asks and return the content of result.json, which is written last.

    Args:
        recipe: what to do.
        out: folder of the run; created, or gone on with. A finished run is read back.
        command: ``"train"``: the original model only; ``"unlearn"``: also forget; ``"run"``: also compare with
            fine-tuning only and with retraining.
        prepared: called once data, clients and model are there.
        observe: called with phase, steps done and steps planned.

    Raises:
        FedUnlearnError: something cannot be used; what was finished stays in ``out``.
    """
    _check_folder(out)
    setting = prepare(recipe)
    data = fingerprint(setting.splits)
    portable = _portable(recipe, out)
    header = {"command": command, "version": __version__, "recipe": portable, "data": data}
    if setting.weights is not None:
        header["weights"] = hashlib.sha256(setting.weights.path.read_bytes()).hexdigest()
    journal = Journal(out, header=header, observe=observe)
    prepared(setting)
    if (out / _RESULT).exists():
        finished: dict[str, Any] = json.loads((out / _RESULT).read_text("utf-8"))
        return finished

    original, plan = _original(setting, journal)
    _save(out / "original.safetensors", original, setting, plan, range(len(setting.splits.test.classes)))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "recipe": portable,
        "forget": list(setting.forget),
        "classes": list(setting.splits.test.classes),
        "engine": _engine(setting),
        "original": evaluate(original, setting.splits.test, forget=setting.forget),
    }
    if command != "train":
        unlearned = _unlearn(setting, original, plan, journal)
        _save_unlearned(out, setting, unlearned)
        result |= _unlearned_blocks(setting, unlearned)
        if command == "run":
            reached = result["unlearned"]["validation"]["retain"]
            blocks = compare(setting, original, unlearned, journal, data=data, reached=reached)
            result["cost"] |= blocks.pop("cost")
            result |= blocks
    write_text(out / _RESULT, json.dumps(result, indent=2) + "\n")
    journal.close()
    return result


def evaluate_weights(recipe: Recipe) -> dict[str, Any]:
    """Return the accuracy block of the model that ``model.weights`` names, on the test images.

    Raises:
        FedUnlearnError: the recipe, the data or the weights cannot be used.
    """
    weights = read_weights(Path(recipe.model.weights))
    test = normalised_for(read_data(recipe), weights, recipe).test
    model = load_weights(new_model(recipe, test, seed=0), weights)
    forget = forget_classes(class_numbers(recipe.unlearn.forget, test.classes), len(test.classes))
    return evaluate(model, test, forget=forget, labels=weights.labels)


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written before any work is done."""
    there = next(path for path in (out, *out.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{out}: expected a folder that can be written, but {there} is not one: choose another --out")


def _original(setting: Setting, journal: Journal) -> tuple[nn.Module, PruningPlan]:
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


def _unlearn(setting: Setting, original: nn.Module, plan: PruningPlan, journal: Journal) -> Unlearned:
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
        sample=u.sample or None,
        batch_norm=u.repair != "none",
        target=u.target,
        participation=setting.recipe.federation.participation,
        seed=setting.recipe.federation.seed,
        plan=plan,
        journal=journal,
    )


def _unlearned_blocks(setting: Setting, unlearned: Unlearned) -> dict[str, Any]:
    test, forget = setting.splits.test, setting.forget
    shipped = evaluate(unlearned.model, test, forget=forget, labels=unlearned.labels, row_kept=unlearned.repaired) | {
        "validation": _validation(setting, unlearned)
    }
    return {
        "pruned": evaluate(unlearned.pruned, test, forget=forget),
        "unlearned": shipped,
        "cost": {"unlearn": asdict(unlearned.cost)},
    }


def _validation(setting: Setting, unlearned: Unlearned) -> dict[str, float | None]:
    """Return U, its row in place, and R on the clients' validation images: what settings are chosen by."""
    engine, forget, labels = setting.engine, unlearned.forget, unlearned.labels
    u, _ = validation_accuracy(unlearned.repaired, engine, phase="compare", exclude=labels, plan=unlearned.plan)
    r, _ = validation_accuracy(
        unlearned.model, engine, phase="compare", exclude=forget, labels=labels, plan=unlearned.plan
    )
    return {"forget_row_kept": u, "retain": r}


def _engine(setting: Setting) -> dict[str, Any]:
    return {
        "name": setting.recipe.federation.engine,
        "clients": len(setting.engine.clients),
        "images": int(setting.table.sum()),
        "clients_per_class": [int(n) for n in (setting.table > 0).sum(0)],
    }


def _save_unlearned(out: Path, setting: Setting, unlearned: Unlearned) -> None:
    unlearned.stats.save(out / "stats.safetensors")
    write_text(out / "plan.json", unlearned.plan.to_json() + "\n")
    _save(out / "model.safetensors", unlearned.model, setting, unlearned.plan, unlearned.labels)


def _save(path: Path, model: nn.Module, setting: Setting, plan: PruningPlan, labels: Sequence[int]) -> None:
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


def _portable(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Return the recipe as JSON values, its paths relative to ``out``."""
    value: dict[str, Any] = recipe.model_dump(mode="json")
    for table, key in (("data", "path"), ("model", "weights")):
        if value[table][key]:
            value[table][key] = os.path.relpath(value[table][key], out)
    return value
