"""The commands: from a recipe to the files in the folder of a run, going on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from fedunlearn.audits.artefacts import artefacts
from fedunlearn.audits.audit import CANDIDATE, Findings, audit
from fedunlearn.audits.subject import Subject, without_rows
from fedunlearn.checkpoint import load_weights, read_weights
from fedunlearn.controls import Control, controls
from fedunlearn.evaluate import evaluate
from fedunlearn.evidence.dossier import write_dossier
from fedunlearn.evidence.events import EVENTS, EventLog
from fedunlearn.evidence.folder import REPORT, RESULT
from fedunlearn.evidence.keys import read_private_key
from fedunlearn.evidence.maps import save_feature_maps
from fedunlearn.federation.jobs import Engine
from fedunlearn.files import write_tensors, write_text
from fedunlearn.journal import Journal
from fedunlearn.machine import settled
from fedunlearn.oracles import Oracle, retrained_models
from fedunlearn.phases import original_model, unlearned_model
from fedunlearn.plan import PruningPlan
from fedunlearn.recipe import Recipe
from fedunlearn.result import audit_blocks, cost_blocks, engine_block, privacy_block, unlearned_blocks
from fedunlearn.runfiles import SCHEMA, check_folder, portable_recipe, run_header, save_model, sha256, versions
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


def run(
    recipe: Recipe,
    out: Path,
    *,
    command: str = "run",
    key: Path | None = None,
    engine: Callable[[Setting], Engine] | None = None,
    prepared: Callable[[Setting], None] = lambda setting: None,
    observe: Callable[[str, int, int], None] = lambda phase, done, planned: None,
) -> dict[str, Any]:
    """Do what ``command`` asks and return the content of result.json, which is there when the figures are.

    Args:
        recipe: what to do.
        out: folder of the run; created, or gone on with. A finished run is read back.
        command: ``"train"``: the original model only; ``"unlearn"``: also forget; ``"run"``: also audit it,
            with retrained models and controls.
        engine: makes the engine that runs the clients; those of this process where None.
        key: the operator's private key, which signs a dossier of what ``"run"`` found.
        prepared: called once data, clients and model are there.
        observe: called with phase, steps done and steps planned.

    Raises:
        FedUnlearnError: something cannot be used; what was finished stays in ``out``.
    """
    check_folder(out)
    signer = None if key is None else read_private_key(key, outside=out)
    setting, rates = settled(prepare(recipe), out, elsewhere=engine is not None)
    data = fingerprint(setting.splits)
    portable = portable_recipe(setting.recipe, out)
    header = run_header(command, portable, data)
    if setting.weights is not None:
        header["weights"] = hashlib.sha256(setting.weights.path.read_bytes()).hexdigest()
    journal = Journal(out, header=header, observe=observe)
    events = EventLog(out / EVENTS)
    privacy_block(setting)  # what cannot be accounted for is not measured
    prepared(setting)
    if command == "run":
        setting.audit_images()  # an audit that cannot be done is refused before any work
    if not (out / RESULT).exists():
        if engine is not None:
            setting = replace(setting, engine=engine(setting))
        events.once("run started", version=__version__, recipe=setting.recipe.digest(), data=data)
        if rates:
            events.once("machine probed", images_per_second=rates)
        about = {"schema": SCHEMA, "version": __version__, "versions": versions(), "recipe": portable}
        result = about | _work(out, setting, journal, events, command=command, data=data, observe=observe)
        write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
    events.once("result written", sha256=sha256(out / RESULT))
    journal.close()
    finished: dict[str, Any] = json.loads((out / RESULT).read_text("utf-8"))
    if command == "run":
        _show(out, signer)
    return finished


def _work(
    out: Path,
    setting: Setting,
    journal: Journal,
    events: EventLog,
    *,
    command: str,
    data: str,
    observe: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Do what ``command`` asks, write all files but result.json, and return its blocks."""
    classes = setting.splits.test.classes
    original, plan = original_model(setting, journal)
    save_model(out / "original.safetensors", original, setting, plan, range(len(classes)))
    events.once("original ready", sha256=sha256(out / "original.safetensors"))
    result = {"forget": list(setting.forget), "classes": list(classes), "engine": engine_block(setting)}
    if command == "train":
        return result | {"original": evaluate(original, setting.splits.test, forget=setting.forget)}
    unlearned = unlearned_model(setting, original, plan, journal)
    _save_unlearned(out, setting, original, unlearned)
    events.once("unlearned", sha256=sha256(out / "model.safetensors"), plan=sha256(out / "plan.json"))
    if command == "unlearn":
        return result | unlearned_blocks(setting, original, unlearned)
    oracles = retrained_models(setting, journal, data=data, count=setting.recipe.audit.oracles)
    beside = controls(setting, original, plan, unlearned, journal)
    findings = _audited(out, setting, original, unlearned, oracles, beside, events, observe)
    # Not before the thresholds are fixed: no test image has met the unlearned model until then.
    result |= unlearned_blocks(setting, original, unlearned) | audit_blocks(setting, oracles, beside, findings)
    return result | cost_blocks(setting, oracles, result)


def _show(out: Path, signer: Ed25519PrivateKey | None) -> None:
    """Write what is missing of report, model card and, with a key, dossier."""
    if not (out / REPORT).exists():
        from fedunlearn.evidence.card import write_card  # slow to import
        from fedunlearn.evidence.report import write_report

        write_card(out)
        write_report(out)
    if signer is not None:  # again where it is signed already: with another key, or for longer
        write_dossier(out, signer)


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


def _audited(
    out: Path,
    setting: Setting,
    original: nn.Module,
    unlearned: Unlearned,
    oracles: Mapping[str, Oracle],
    beside: Mapping[str, Control],
    events: EventLog,
    observe: Callable[[str, int, int], None],
) -> Findings:
    """Write the retrained models, fix the thresholds by them, and judge."""
    (out / "oracles").mkdir(exist_ok=True)
    test, everything = setting.splits.test, range(len(setting.splits.test.classes))
    for name, oracle in oracles.items():
        save_model(out / "oracles" / f"{name}.safetensors", oracle.model, setting, PruningPlan(), everything)
    files = {name: sha256(out / "oracles" / f"{name}.safetensors") for name in oracles}
    events.once("retrained models ready", sha256=files)
    # The plan starts from the architecture: of an original that was pruned before, it lists filters long gone.
    known = setting.weights is None or not setting.weights.plan.kept
    shipped = out / "model.safetensors"
    left = {CANDIDATE: artefacts(shipped, state=original.state_dict(), forget=setting.forget)} if known else {}
    findings = audit(
        Subject(unlearned.model, unlearned.labels, unlearned.repaired),
        oracles={
            name: without_rows(oracle.model, setting.forget, classes=len(everything), shape=test.shape)
            for name, oracle in oracles.items()
        },
        controls={name: control.subject for name, control in beside.items()},
        images=setting.audit_images(),
        lr=setting.recipe.audit.lr,
        artefacts=left,
        folder=out,
        fixed=lambda digest: events.once("thresholds fixed", sha256=digest),
        observe=observe,
    )
    events.once("audited", verdict=findings.verdict)
    return findings


def _save_unlearned(out: Path, setting: Setting, original: nn.Module, unlearned: Unlearned) -> None:
    unlearned.stats.save(out / "stats.safetensors")
    write_text(out / "plan.json", unlearned.plan.to_json() + "\n")
    if len(setting.forget) == 1 or setting.recipe.unlearn.jointly:  # otherwise the scores are those of the last class
        write_tensors(out / "scores.safetensors", unlearned.scores, {})
        if setting.recipe.evidence.feature_maps:
            maps = out / "maps.safetensors"
            save_feature_maps(maps, original, setting.splits.test, unlearned.scores, forget=setting.forget)
    save_model(out / "model.safetensors", unlearned.model, setting, unlearned.plan, unlearned.labels)
