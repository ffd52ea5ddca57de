"""The audit of a model on disk, unlearned by this tool or another, by the server or by one client."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedunlearn.audits.audit import CANDIDATE, audit
from fedunlearn.audits.images import AuditImages, audit_images
from fedunlearn.audits.subject import Subject, without_rows
from fedunlearn.checkpoint import Weights, load_weights, read_weights
from fedunlearn.errors import EvidenceError, ModelError
from fedunlearn.evidence.events import EVENTS, EventLog
from fedunlearn.evidence.folder import RESULT
from fedunlearn.evidence.words import MODELS
from fedunlearn.files import write_text
from fedunlearn.groups import head_layer
from fedunlearn.journal import Journal
from fedunlearn.machine import settled
from fedunlearn.oracles import retrained_models
from fedunlearn.plan import plan_without_rows
from fedunlearn.prune import prune
from fedunlearn.recipe import Recipe
from fedunlearn.result import engine_block, judged
from fedunlearn.runfiles import SCHEMA, check_folder, portable_recipe, run_header, sha256, versions
from fedunlearn.setting import Setting, fingerprint, new_model, normalised_for, read_data, set_up
from fedunlearn.version import __version__


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
        result = _audited(setting, out, candidate, named, images, journal, observe, data=data) | {
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
