"""The commands: from a recipe to the files in the folder of a run, going on where a killed run stopped.

``audit_model`` audits a model on disk, unlearned by this tool or another, by the server or by one client.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from fedunlearn.audits.artefacts import artefacts
from fedunlearn.audits.audit import CANDIDATE, Findings, audit
from fedunlearn.audits.subject import AuditImages, Subject, audit_images, without_rows
from fedunlearn.channels.groups import head_layer
from fedunlearn.channels.plan import PruningPlan, plan_without_rows, prune
from fedunlearn.channels.scores import forget_classes
from fedunlearn.checkpoint import Weights, load_weights, read_weights
from fedunlearn.errors import EvidenceError, ModelError
from fedunlearn.evidence.dossier import write_dossier
from fedunlearn.evidence.events import EVENTS, EventLog
from fedunlearn.evidence.folder import REPORT, RESULT, SCHEMA, check_folder, sha256, versions
from fedunlearn.evidence.keys import read_private_key
from fedunlearn.evidence.maps import save_feature_maps
from fedunlearn.evidence.words import MODELS
from fedunlearn.federation.jobs import Engine
from fedunlearn.federation.journal import Journal
from fedunlearn.files import write_tensors, write_text
from fedunlearn.run.compare import Control, Oracle, controls, retrained_models
from fedunlearn.run.experiment import (
    Setting,
    class_numbers,
    fingerprint,
    new_model,
    normalised_for,
    original_model,
    prepare,
    read_data,
    save_model,
    set_up,
    settled,
    unlearned_model,
)
from fedunlearn.run.recipe import Recipe, portable_recipe, run_header
from fedunlearn.run.result import (
    audit_blocks,
    cost_blocks,
    engine_block,
    evaluate,
    judged,
    privacy_block,
    unlearned_blocks,
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
        from fedunlearn.evidence.report import (
            write_card,  # slow to import
            write_report,
        )

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


def audit_model(
    recipe: Recipe,
    out: Path,
    *,
    model: Path,
    oracles: Sequence[Path] = (),
    client: str | None = None,
    prepared: Callable[[Setting], None] = lambda setting: None,
    observe: Callable[[str, int, int], None] = lambda phase, done, planned: None,
) -> dict[str, Any]:
    """Audit a model and return the content of result.json.

    Args:
        recipe: data, federation, architecture, and the classes that were forgotten.
        out: folder for thresholds, figures and report; created, or gone on with.
        model: weights of the recipe's architecture, pruned with a plan of ours or whole, with all output rows or
            without those of the forgotten classes.
        oracles: weights of models retrained without the classes; where there are none, they are retrained by the
            recipe, or read from the cache.
        client: audit with the images of this client alone: its training images, and its validation images as test.
        prepared: called once data and clients are there.
        observe: called with phase, steps done and steps planned.

    Raises:
        FedUnlearnError: something cannot be used.
    """
    from fedunlearn.evidence.report import write_report  # slow to import

    check_folder(out)
    weights = read_weights(model)
    setting = set_up(recipe, normalised_for(read_data(recipe), weights, recipe), None)
    images = setting.audit_images() if client is None else _of_client(setting, client)
    if client is not None and not oracles:
        raise EvidenceError(f"{client} alone cannot retrain: give retrained models with --oracle")
    candidate = _subject(weights, setting)
    named = _retrained(oracles, setting, besides=model)
    rates: dict[str, float] = {}
    if not oracles:
        setting, rates = settled(setting, out)
    data, portable = fingerprint(setting.splits), portable_recipe(setting.recipe, out)
    about = {"client": client, "model": sha256(model), "oracles": {path.stem: sha256(path) for path in oracles}}
    journal = Journal(out, header=run_header("audit", portable, data) | about, observe=observe)
    if rates:
        EventLog(out / EVENTS).once("machine probed", images_per_second=rates)
    prepared(setting)
    if not (out / RESULT).exists():
        result = _audited_file(setting, out, candidate, named, images, journal, observe, data=data) | {
            "recipe": portable,
            "model": {"file": model.name, "sha256": sha256(model)},
            "client": client,
        }
        write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
    journal.close()
    write_report(out)
    finished: dict[str, Any] = json.loads((out / RESULT).read_text("utf-8"))
    return finished


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


def _audited_file(
    setting: Setting,
    out: Path,
    candidate: Subject,
    named: Mapping[str, Subject],
    images: AuditImages,
    journal: Journal,
    observe: Callable[[str, int, int], None],
    *,
    data: str,
) -> dict[str, Any]:
    """Retrain where no retrained model was given, audit, and return the blocks of result.json."""
    recipe = setting.recipe
    events = EventLog(out / EVENTS)
    if not named:
        retrained = retrained_models(setting, journal, data=data, count=recipe.audit.oracles)
        named = {name: _delivered(oracle.model, setting) for name, oracle in retrained.items()}
    findings = audit(
        candidate,
        oracles=named,
        controls={},
        images=images,
        lr=recipe.audit.lr,
        folder=out,
        fixed=lambda digest: events.once("thresholds fixed", sha256=digest),
        observe=observe,
    )
    events.once("audited", verdict=findings.verdict)
    judgement = findings.judgements[CANDIDATE]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "versions": versions(),
        "forget": list(setting.forget),
        "classes": list(setting.splits.test.classes),
        "engine": engine_block(setting),
        "oracles": {name: {} for name in named},
        "controls": {},
        "audits": judgement["audits"],
        "calibration": findings.held_out,
    } | judged(judgement)


def _retrained(paths: Sequence[Path], setting: Setting, *, besides: Path) -> dict[str, Subject]:
    """Return the retrained models in files; refuse what would let one model stand for several."""
    hashes = {sha256(besides): besides}
    named: dict[str, Subject] = {}
    images = setting.splits.train
    for path in paths:
        weights = read_weights(path)
        if weights.mean not in (None, images.mean) or weights.std not in (None, images.std):
            raise EvidenceError(
                f"{path} was trained on images normalised by {weights.mean} and {weights.std}, the audited model by "
                f"{images.mean} and {images.std}: models that see images differently cannot be compared"
            )
        same = hashes.setdefault(sha256(path), path)
        if same != path:
            raise EvidenceError(f"{path} and {same} are the same model: give retrained models of different seeds")
        if path.stem in named or path.stem in MODELS:
            raise EvidenceError(f"{path}: the name {path.stem!r} is taken by another model: rename the file")
        named[path.stem] = _without_forgotten(_subject(weights, setting), setting)
    return named


def _of_client(setting: Setting, client: str) -> AuditImages:
    if client not in setting.clients:
        known = ", ".join(list(setting.clients)[:5])
        raise EvidenceError(f"there is no client {client!r}; there are {len(setting.clients)}: {known}, ...")
    if client not in setting.validation:
        raise EvidenceError(f"{client} holds no validation images to test with: set data.validation above 0")
    return audit_images(
        setting.clients[client],
        setting.validation[client],
        forget=setting.forget,
        per_class=setting.recipe.audit.images,
        seed=setting.recipe.federation.seed,
    )


def _subject(weights: Weights, setting: Setting) -> Subject:
    """Return the model in a file; one without a label map has a row for every class, or for every class but these."""
    train, forget = setting.splits.train, setting.forget
    empty = new_model(setting.recipe, train, seed=0)
    everything = tuple(range(len(train.classes)))
    head = head_layer(empty, torch.zeros((1, *train.shape)))
    rows = weights.state.get(f"{head}.weight")
    labels = weights.labels
    if labels is None:
        labels = everything
        if rows is not None and len(rows) == len(everything) - len(forget):
            labels = tuple(label for label in everything if label not in forget)
            empty = prune(empty, plan_without_rows(empty, head, forget))
    kept = set(everything) - set(forget)
    if not kept <= set(labels) <= set(everything):
        raise ModelError(
            f"{weights.path} has output rows for the classes {sorted(labels)}, without {list(forget)} it needs "
            f"{sorted(kept)}: check unlearn.forget"
        )
    model = load_weights(empty, weights)
    return Subject(model, labels, model if labels == everything else None)


def _without_forgotten(subject: Subject, setting: Setting) -> Subject:
    return subject if subject.row_kept is None else _delivered(subject.row_kept, setting)


def _delivered(model: nn.Module, setting: Setting) -> Subject:
    test = setting.splits.test
    return without_rows(model, setting.forget, classes=len(test.classes), shape=test.shape)
