"""The audit of a model on disk, unlearned by this tool or another, by the server or by one client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedunlearn.audits.audit import ORIGINAL, audit
from fedunlearn.audits.base import Subject
from fedunlearn.audits.findings import CANDIDATE
from fedunlearn.audits.images import AuditImages, audit_images
from fedunlearn.checkpoint import Weights, load_weights, named_for, read_weights
from fedunlearn.errors import EvidenceError, ModelError, listed
from fedunlearn.evidence.folder import RESULT, check_folder, sha256
from fedunlearn.evidence.keys import read_private_key
from fedunlearn.evidence.words import MODELS
from fedunlearn.federation.about import weights_digest
from fedunlearn.run.experiment import Experiment, architecture_of, missing_rows, set_up
from fedunlearn.run.inputs import check_numbers, class_numbers, normalised_for, read_data
from fedunlearn.run.kept import KNOWS, most_named
from fedunlearn.run.machine import settled
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.references import check_kept, retrained_models, save_retrained
from fedunlearn.run.result import earlier_block, engine_block, evaluate, judged
from fedunlearn.run.work import Observe, Work, concluded, finished, opened


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What to audit, and beside what.

    Attributes:
        model: weights of the recipe's architecture, pruned with a plan of ours or whole, with all output rows or
            without those of the forgotten classes.
        oracles: weights of models retrained without the classes; where there are none, they are retrained by the
            recipe, or read from the cache.
        original: weights of the model before, audited as it is and without the rows of the classes: two controls that
            must fail, without which no model passes.
        client: audit with the images of this client alone: its training images, and its validation images as test.
    """

    model: Path
    oracles: Sequence[Path] = ()
    original: Path | None = None
    client: str | None = None


def audit_model(
    recipe: Recipe,
    out: Path,
    candidate: Candidate,
    *,
    key: Path | None = None,
    prepared: Callable[[Experiment], None] = lambda experiment: None,
    observe: Observe = lambda phase, done, planned: None,
) -> dict[str, Any]:
    """Audit a model and return the content of result.json.

    Args:
        recipe: data, federation, architecture, and the classes that were forgotten.
        out: folder for thresholds, figures and report; created, or gone on with.
        candidate: the model, and the retrained models to hold it against.
        key: the operator's private key, which signs a dossier of what was found.
        prepared: called once data and clients are there.
        observe: called with phase, steps done and steps planned.

    Raises:
        FedUnlearnError: something cannot be used.
    """
    check_folder(out)
    signer = None if key is None else read_private_key(key, outside=out)
    model, oracles, client = candidate.model, candidate.oracles, candidate.client
    weights = read_weights(model)
    splits = normalised_for(read_data(recipe), weights, recipe)
    check_numbers(recipe.unlearn.forget, splits.train.classes, weights)
    experiment = set_up(recipe, splits, None, _earlier(weights, splits.train.classes, recipe))
    images = experiment.audit_images() if client is None else _of_client(experiment, client)
    if client is not None and not oracles:
        raise EvidenceError(f"{client} alone cannot retrain: give retrained models with --oracle")
    subject = _subject(weights, experiment)
    # Before models are retrained for it.
    subject.checked(model.name, len(experiment.splits.test.classes), experiment.forget)
    named = _retrained(oracles, experiment, besides=[model, *([candidate.original] if candidate.original else [])])
    controls = {} if candidate.original is None else _controls(candidate.original, experiment)
    _check_retrained(named, experiment)
    if not oracles and not (out / RESULT).exists():
        check_kept(experiment)
    about = {"client": client, "model": sha256(model), "oracles": {path.stem: sha256(path) for path in oracles}}
    if candidate.original is not None:
        about["original"] = sha256(candidate.original)
    rates: Mapping[str, float] = {}
    if not oracles:
        experiment, rates = settled(experiment, out)
    work = opened("audit", experiment, out, rates=rates, observe=observe, about=about)
    work.probed()
    prepared(work.experiment)
    finished(work, lambda: _blocks(work, _Audited(model, subject, named, controls, images)) | {"client": client})
    return concluded(work, signer, pages=_page)


def _page(out: Path) -> None:
    from fedunlearn.evidence.report import write_report  # slow to import

    write_report(out)


@dataclass(frozen=True)
class _Audited:
    """What is audited: the model and its file, beside those retrained without the classes and those that must fail."""

    path: Path
    subject: Subject
    oracles: Mapping[str, Subject]
    controls: Mapping[str, Subject]
    images: AuditImages


def _blocks(work: Work, given: _Audited) -> dict[str, Any]:
    """Retrain where no retrained model was given, audit, and return the blocks of result.json."""
    experiment, named = work.experiment, given.oracles
    if not named:
        count = experiment.recipe.audit.oracles
        retrained = retrained_models(experiment, work.fed, data=work.data, count=count)
        save_retrained(work.out, experiment, retrained)  # for another audit
        named = {name: Subject.without_rows(oracle.model, experiment.forget) for name, oracle in retrained.items()}

    findings = audit(given.subject, given.images, oracles=named, controls=given.controls, record=work.record())
    work.events.once("audited", verdict=findings.verdict)
    judgement = findings.judgements[CANDIDATE]

    def figures(subject: Subject) -> dict[str, Any]:
        return evaluate(subject.model, given.images.test, forget=experiment.forget, row_kept=subject.row_kept)

    return {
        "forget": list(experiment.forget),
        "classes": list(experiment.splits.test.classes),
        "engine": engine_block(experiment),
        **earlier_block(experiment),
        "model": {"file": given.path.name, "sha256": sha256(given.path)} | figures(given.subject),
        "oracles": {name: figures(subject) for name, subject in named.items()},
        "controls": {
            name: figures(subject) | judged(findings.judgements[name]) for name, subject in given.controls.items()
        },
        "audits": judgement["audits"],
        "calibration": findings.held_out,
    } | judged(judgement)


def _controls(path: Path, experiment: Experiment) -> dict[str, Subject]:
    """Return the model before as it is and without the rows of the classes, both of which must fail."""
    subject = _subject(_comparable(path, experiment), experiment)
    if subject.row_kept is None:
        raise EvidenceError(
            f"{path} has no output row for the classes to forget, so it is not the model before: give --original the "
            "weights that were there before unlearning"
        )
    return {ORIGINAL: subject, "head_only": Subject(subject.model.without_rows(experiment.forget))}


def _check_retrained(named: Mapping[str, Subject], experiment: Experiment) -> None:
    """Refuse a model that names most images of a class, as none that was retrained without it does."""
    test = experiment.splits.test
    for name, subject in named.items():
        share = most_named(subject.row_kept or subject.model, test, experiment.forget)
        if share > KNOWS:
            raise EvidenceError(
                f"{name} names a class to forget in {100 * share:.1f} % of its test images, so it was not retrained "
                "without it: give other models with --oracle"
            )


def _retrained(paths: Sequence[Path], experiment: Experiment, *, besides: Sequence[Path]) -> dict[str, Subject]:
    """Return the retrained models in files; refuse what would let one model stand for several."""
    # Of the weights: a file saved again has other bytes.
    hashes = {_digest(_comparable(path, experiment)): path for path in besides}
    named: dict[str, Subject] = {}
    for path in paths:
        weights = _comparable(path, experiment)
        digest = _digest(weights)
        if digest in hashes:
            raise EvidenceError(
                f"{path} and {hashes[digest]} are the same model: give retrained models of different seeds"
            )
        hashes[digest] = path
        if path.stem in named or path.stem in MODELS:
            raise EvidenceError(f"{path}: the name {path.stem!r} is taken by another model: rename the file")
        named[path.stem] = _without_forgotten(_subject(weights, experiment), experiment.forget)
    return named


def _earlier(weights: Weights, classes: Sequence[str], recipe: Recipe) -> tuple[int, ...]:
    """Return the classes that a model forgot before those that the recipe asks for: it has no rows for them."""
    labels, forget = weights.numbered(classes).labels, class_numbers(recipe.unlearn.forget, classes)
    return () if labels is None else tuple(sorted(set(range(len(classes))) - set(labels) - set(forget)))


def _digest(weights: Weights) -> str:
    return weights_digest(dict(sorted(weights.state.items())))


def _comparable(path: Path, experiment: Experiment) -> Weights:
    """Return weights of a model that sees images as the audited one does."""
    weights, images = read_weights(path), experiment.splits.train
    if weights.mean not in (None, images.mean) or weights.std not in (None, images.std):
        raise EvidenceError(
            f"{path} was trained on images normalised by {weights.mean} and {weights.std}, the audited model by "
            f"{images.mean} and {images.std}: models that see images differently cannot be compared"
        )
    return weights


def _of_client(experiment: Experiment, client: str) -> AuditImages:
    if client not in experiment.clients:
        raise EvidenceError(f"there is no client {client!r}; the clients are {listed(experiment.clients)}")
    if client not in experiment.validation:
        raise EvidenceError(f"{client} holds no validation images to test with: set data.validation above 0")
    return audit_images(
        experiment.clients[client],
        experiment.validation[client],
        forget=experiment.forget,
        per_class=experiment.recipe.audit.images,
        seed=experiment.recipe.federation.seed,
        lr=experiment.recipe.audit.lr,
    )


def _subject(weights: Weights, experiment: Experiment) -> Subject:
    """Return the model in a file; one without a label map has a row for every class, or for every class but these."""
    train, forget = experiment.splits.train, experiment.forget
    # The architecture is that of all classes; the plan of a file says which rows went.
    empty = architecture_of(weights, experiment.recipe, replace(train, classes=experiment.all_classes))
    weights = named_for(weights, empty).numbered(train.classes)
    everything = tuple(range(len(train.classes)))
    if forget and missing_rows(weights, empty) == len(forget):
        empty = empty.without_rows(forget)
    labels = weights.labels or empty.labels or everything
    kept = set(everything) - set(forget)
    if not kept <= set(labels) <= set(everything):
        raise ModelError(
            f"{weights.path} has output rows for the classes {sorted(labels)}, without {list(forget)} it needs "
            f"{sorted(kept)}: check unlearn.forget"
        )
    model = replace(load_weights(empty, weights), labels=labels)
    return Subject(model, model if labels == everything else None)


def _without_forgotten(subject: Subject, forget: Sequence[int]) -> Subject:
    return subject if subject.row_kept is None else Subject.without_rows(subject.row_kept, forget)
