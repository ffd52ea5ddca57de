"""The commands: from a recipe to the files in the folder of a run, going on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedunlearn.audits.artefacts import artefacts
from fedunlearn.audits.audit import CANDIDATE, Findings, audit
from fedunlearn.audits.subject import Subject, without_rows
from fedunlearn.checkpoint import load_weights, read_weights, save_checkpoint
from fedunlearn.compare import cost_until, speedup
from fedunlearn.controls import Control, controls
from fedunlearn.errors import RunError
from fedunlearn.evaluate import evaluate
from fedunlearn.evidence.events import EVENTS, EventLog
from fedunlearn.evidence.maps import save_feature_maps
from fedunlearn.federation.rounds import validation_accuracy
from fedunlearn.files import write_tensors, write_text
from fedunlearn.journal import Journal
from fedunlearn.oracles import Oracle, retrained_models
from fedunlearn.phases import original_model, unlearned_model
from fedunlearn.plan import PruningPlan
from fedunlearn.recipe import Recipe
from fedunlearn.scores import forget_classes
from fedunlearn.setting import (
    Setting,
    class_numbers,
    fingerprint,
    new_model,
    normalised_for,
    prepare,
    read_data,
)
from fedunlearn.unlearn import Unlearned
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
        command: ``"train"``: the original model only; ``"unlearn"``: also forget; ``"run"``: also audit it,
            with retrained models and controls.
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

    events = EventLog(out / EVENTS)
    events.once("run started", version=__version__, recipe=recipe.digest(), data=data)
    original, plan = original_model(setting, journal)
    _save(out / "original.safetensors", original, setting, plan, range(len(setting.splits.test.classes)))
    events.once("original ready", sha256=_hash(out / "original.safetensors"))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "recipe": portable,
        "forget": list(setting.forget),
        "classes": list(setting.splits.test.classes),
        "engine": _engine(setting),
    }
    if command == "train":
        result["original"] = evaluate(original, setting.splits.test, forget=setting.forget)
    else:
        unlearned = unlearned_model(setting, original, plan, journal)
        _save_unlearned(out, setting, original, unlearned)
        events.once("unlearned", sha256=_hash(out / "model.safetensors"), plan=_hash(out / "plan.json"))
        if command == "run":
            compared = _compared(setting, original, plan, unlearned, journal, data)
            findings = _audited(out, setting, original, unlearned, compared, events, observe)
            result |= _unlearned_blocks(setting, original, unlearned) | _audit_blocks(setting, compared, findings)
            result |= _cost_blocks(setting, compared, result)
        else:
            result |= _unlearned_blocks(setting, original, unlearned)
    write_text(out / _RESULT, json.dumps(result, indent=2) + "\n")
    events.once("result written", sha256=_hash(out / _RESULT))
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


@dataclass(frozen=True, eq=False)
class _Compared:
    """The models that a run holds its own against, before any of them is measured."""

    oracles: Mapping[str, Oracle]
    controls: Mapping[str, Control]


def _compared(
    setting: Setting, original: nn.Module, plan: PruningPlan, unlearned: Unlearned, journal: Journal, data: str
) -> _Compared:
    oracles = retrained_models(setting, journal, data=data, count=setting.recipe.audit.oracles)
    return _Compared(oracles, controls(setting, original, plan, unlearned, journal))


def _audited(
    out: Path,
    setting: Setting,
    original: nn.Module,
    unlearned: Unlearned,
    compared: _Compared,
    events: EventLog,
    observe: Callable[[str, int, int], None],
) -> Findings:
    """Write the retrained models, fix the thresholds by them, and judge."""
    (out / "oracles").mkdir(exist_ok=True)
    test, everything = setting.splits.test, range(len(setting.splits.test.classes))
    for name, oracle in compared.oracles.items():
        _save(out / "oracles" / f"{name}.safetensors", oracle.model, setting, PruningPlan(), everything)
    files = {name: _hash(out / "oracles" / f"{name}.safetensors") for name in compared.oracles}
    events.once("retrained models ready", sha256=files)
    left = artefacts(out / "model.safetensors", state=original.state_dict(), forget=setting.forget)
    findings = audit(
        Subject(unlearned.model, unlearned.labels, unlearned.repaired),
        oracles={
            name: without_rows(oracle.model, setting.forget, classes=len(everything), shape=test.shape)
            for name, oracle in compared.oracles.items()
        },
        controls={name: control.subject for name, control in compared.controls.items()},
        images=setting.audit_images(),
        lr=setting.recipe.unlearn.lr,
        artefacts={CANDIDATE: left},
        folder=out,
        fixed=lambda digest: events.once("thresholds fixed", sha256=digest),
        observe=observe,
    )
    events.once("audited", verdict=findings.verdict)
    return findings


def _unlearned_blocks(setting: Setting, original: nn.Module, unlearned: Unlearned) -> dict[str, Any]:
    test, forget = setting.splits.test, setting.forget
    shipped = evaluate(unlearned.model, test, forget=forget, labels=unlearned.labels, row_kept=unlearned.repaired) | {
        "validation": _validation(setting, unlearned)
    }
    return {
        "original": evaluate(original, test, forget=forget),
        "pruned": evaluate(unlearned.pruned, test, forget=forget),
        "unlearned": shipped,
        "cost": {"unlearn": asdict(unlearned.cost)},
    }


def _audit_blocks(setting: Setting, compared: _Compared, findings: Findings) -> dict[str, Any]:
    """Return the blocks ``controls``, ``oracles``, ``audits``, ``verdict`` and ``calibration`` of result.json."""
    test, forget = setting.splits.test, setting.forget
    blocks: dict[str, Any] = {"controls": {}, "oracles": {}}
    for name, control in compared.controls.items():
        own = control.subject
        blocks["controls"][name] = evaluate(
            own.model, test, forget=forget, labels=own.labels, row_kept=own.row_kept
        ) | _judged(findings.judgements[name])
        if control.cost is not None:
            blocks["controls"][name]["cost"] = asdict(control.cost)
    for name, oracle in compared.oracles.items():
        own = without_rows(oracle.model, forget, classes=len(test.classes), shape=test.shape)
        blocks["oracles"][name] = evaluate(own.model, test, forget=forget, labels=own.labels, row_kept=own.row_kept) | {
            "cached": oracle.cached
        }
    judgement = findings.judgements[CANDIDATE]
    return blocks | {"audits": judgement["audits"], "calibration": findings.held_out} | _judged(judgement)


def _judged(judgement: Mapping[str, Any]) -> dict[str, Any]:
    return {key: judgement[key] for key in ("verdict", "reason", "decided_by")}


def _cost_blocks(setting: Setting, compared: _Compared, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``cost`` and ``speedup``: against the first retrained model, until it was as good as the unlearned one."""
    reached = result["unlearned"]["validation"]["retain"]
    if reached is None or not compared.oracles:
        return {}
    first = next(iter(compared.oracles.values()))
    # Weights from elsewhere may have been trained on what is validation data here.
    retraining = cost_until(first.steps, reached) | {"validation_unseen": setting.weights is None}
    ratios = speedup(result["cost"]["unlearn"], retraining)
    if first.cached:  # seconds of another day, perhaps of another machine
        ratios.pop("client_seconds", None)
    return {"cost": result["cost"] | {"retrain": retraining}, "speedup": ratios}


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


def _save_unlearned(out: Path, setting: Setting, original: nn.Module, unlearned: Unlearned) -> None:
    unlearned.stats.save(out / "stats.safetensors")
    write_text(out / "plan.json", unlearned.plan.to_json() + "\n")
    if len(setting.forget) == 1 or setting.recipe.unlearn.jointly:  # otherwise the scores are those of the last class
        write_tensors(out / "scores.safetensors", unlearned.scores, {})
        if setting.recipe.evidence.feature_maps:
            maps = out / "maps.safetensors"
            save_feature_maps(maps, original, setting.splits.test, unlearned.scores, forget=setting.forget)
    _save(out / "model.safetensors", unlearned.model, setting, unlearned.plan, unlearned.labels)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
