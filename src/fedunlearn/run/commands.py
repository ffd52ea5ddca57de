"""The commands: from a recipe to the files in the folder of a run, going on where a killed run stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedunlearn.audits.audit import audit
from fedunlearn.audits.base import Shipped, Subject
from fedunlearn.audits.findings import Findings
from fedunlearn.channels.plan import Classifier
from fedunlearn.checkpoint import load_weights, named_for, read_weights
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import RecipeError, RunError
from fedunlearn.evidence.folder import (
    BEFORE,
    MAPS,
    MODEL,
    PLAN,
    RESULT,
    SCORES,
    STATS,
    check_folder,
    retrained_file,
    sha256,
)
from fedunlearn.evidence.keys import read_private_key
from fedunlearn.evidence.maps import save_feature_maps
from fedunlearn.evidence.verify import DOSSIER
from fedunlearn.export import export_onnx
from fedunlearn.federation.jobs import Engine
from fedunlearn.files import write_tensors, write_text
from fedunlearn.methods.base import Outcome
from fedunlearn.run.experiment import (
    Experiment,
    architecture_of,
    check_choice,
    missing_rows,
    original_model,
    prepare,
    save_model,
)
from fedunlearn.run.forgetting import forgotten_model, method_block
from fedunlearn.run.inputs import check_numbers, class_numbers, normalised_by, normalised_for, read_data
from fedunlearn.run.kept import write_rounds
from fedunlearn.run.machine import settled
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.references import Oracle, check_kept, controls, retrained_models, save_retrained
from fedunlearn.run.result import (
    audit_blocks,
    audited_models,
    cost_blocks,
    earlier_block,
    engine_block,
    evaluate,
    evaluated,
    measured,
    privacy_block,
    unlearned_blocks,
    unlearned_models,
)
from fedunlearn.run.work import Observe, Work, concluded, finished, opened
from fedunlearn.unlearn import Forgotten, Unlearned
from fedunlearn.version import __version__


def run(
    recipe: Recipe,
    out: Path,
    *,
    command: str = "run",
    key: Path | None = None,
    engine: Callable[[Experiment], Engine] | None = None,
    prepared: Callable[[Experiment], None] = lambda experiment: None,
    observe: Observe = lambda phase, done, planned: None,
) -> dict[str, Any]:
    """Do what ``command`` asks and return the content of result.json, which is there when the figures are.

    Args:
        recipe: what to do.
        out: folder of the run; created, or gone on with. A finished run is read back.
        command: ``"train"``: the original model only; ``"unlearn"``: also forget; ``"run"``: also audit it,
            with retrained models and controls.
        engine: makes the engine that runs the clients; those of this process where None.
        key: the operator's private key, which signs a dossier of what ``"run"`` or ``"unlearn"`` did.
        prepared: called once data, clients and model are there.
        observe: called with phase, steps done and steps planned.

    Raises:
        FedUnlearnError: something cannot be used; what was finished stays in ``out``.
    """
    if engine is None and recipe.federation.engine != "local":
        raise RecipeError(
            f"federation.engine is {recipe.federation.engine!r}: give run() the engine, or use carry_out() of "
            "fedunlearn.engines, which makes it"
        )
    if command == "train" and recipe.model.weights:
        raise RecipeError(
            f"train begins with fresh weights, and model.weights names {recipe.model.weights}: leave it out, or look "
            "at that model with evaluate"
        )
    check_folder(out)
    signer = None if key is None else read_private_key(key, outside=out)
    experiment, rates = settled(prepare(recipe), out, elsewhere=engine is not None)
    if command != "train":
        check_choice(experiment)
    if command == "run" and not (out / RESULT).exists():
        check_kept(experiment)  # before the folder is that of this request
    work = opened(command, experiment, out, rates=rates, observe=observe)
    privacy_block(work.experiment)  # what cannot be accounted for is not measured
    prepared(work.experiment)
    if command == "run":
        work.experiment.audit_images()  # an audit that cannot be done is refused before any work
    finished(work, lambda: _blocks(command, work, engine))
    if command == "train":  # nothing is shown that could be signed
        signer = None
    return concluded(work, signer, pages=_pages if command == "run" else None)


def _pages(out: Path) -> None:
    from fedunlearn.evidence.report import write_card, write_report  # slow to import

    write_card(out)
    write_report(out)


def _blocks(command: str, work: Work, engine: Callable[[Experiment], Engine] | None) -> dict[str, Any]:
    """Do what ``command`` asks, write all files but result.json, and return its blocks."""
    work = work.on(engine)
    experiment, out, events = work.experiment, work.out, work.events
    events.once("run started", version=__version__, recipe=experiment.recipe.digest(), data=work.data)
    work.probed()
    original = original_model(experiment, work.fed)
    save_model(out / BEFORE, original, experiment)
    events.once("original ready", sha256=sha256(out / BEFORE))
    test = experiment.splits.test
    result = {"forget": list(experiment.forget), "classes": list(test.classes), "engine": engine_block(experiment)}
    result |= earlier_block(experiment)
    if command == "train":
        return result | {"original": evaluate(original, test, forget=experiment.forget)}
    result |= method_block(experiment, work.fed)
    unlearned = forgotten_model(experiment, original, experiment.unlearning(work.fed))
    _save_unlearned(out, experiment, original, unlearned)
    events.once("unlearned", sha256=sha256(out / MODEL), plan=sha256(out / PLAN))
    shown, report = unlearned_models(original, unlearned), work.fed.journal.report
    if command == "unlearn":
        return result | unlearned_blocks(experiment, unlearned, evaluated(experiment, shown, report))
    oracles = retrained_models(experiment, work.fed, data=work.data, count=experiment.recipe.audit.oracles)
    beside = controls(experiment, original, unlearned, experiment.unlearning(work.fed))
    findings = _audited(work, original, unlearned, oracles, beside)
    # Not before the thresholds are fixed: no test image has met the unlearned model until then.
    figures = evaluated(experiment, shown | audited_models(oracles, beside, experiment.forget), report)
    result |= unlearned_blocks(experiment, unlearned, figures) | audit_blocks(oracles, beside, findings, figures)
    return result | cost_blocks(experiment, oracles, result)


def evaluate_weights(recipe: Recipe, *, tell: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Return the accuracy block of the model that ``model.weights`` names, on the test images.

    Args:
        recipe: the recipe.
        tell: shown what the images are normalised by.

    Raises:
        FedUnlearnError: the recipe, the data or the weights cannot be used.
    """
    model, test, forget = _loaded(recipe, recipe.unlearn.forget, tell)
    return measured(model, test, forget)


def export_weights(recipe: Recipe, path: Path, *, tell: Callable[[str], object] = lambda line: None) -> float:
    """Write the model that ``model.weights`` names as ONNX and return how far its logits are from torch's.

    Args:
        recipe: the recipe.
        path: of the file.
        tell: shown what the model takes images to be normalised by.

    Raises:
        FedUnlearnError: the recipe, the data or the weights cannot be used, the model cannot be exported, or the file
            would lie in a folder whose dossier is signed.
    """
    for folder in path.absolute().parents:
        if (folder / DOSSIER).exists():
            raise RunError(
                f"{folder} holds a signed dossier, which one more file would break: write {path.name} elsewhere"
            )
    model, test, _ = _loaded(recipe, (), tell)
    return export_onnx(path, model, images=test)


def _loaded(
    recipe: Recipe, forgotten: Sequence[int | str], tell: Callable[[str], object]
) -> tuple[Classifier, LabelledImages, tuple[int, ...]]:
    """Return the model that ``model.weights`` names, test images and the numbers of the classes ``forgotten``.

    Classes without a row that are not to be forgotten now were forgotten before: their images are left out. Of a model
    that tells its rows, a class to forget may be gone from the data too.
    """
    weights = read_weights(Path(recipe.model.weights))
    test = normalised_for(read_data(recipe), weights, recipe).test
    tell(normalised_by(test, recipe, weights))
    check_numbers(forgotten, test.classes, weights)
    weights = weights.numbered(test.classes)
    whole, tells = architecture_of(weights, recipe, test), weights.labels is not None
    there = [label for label in forgotten if not tells or not isinstance(label, str) or label in test.classes]
    forget = class_numbers(there, test.classes) if there else ()
    if not tells:
        weights = named_for(weights, whole)
        if recipe.unlearn.forget and missing_rows(weights, whole) == len(recipe.unlearn.forget):
            whole = whole.without_rows(class_numbers(recipe.unlearn.forget, test.classes))
        return replace(load_weights(whole, weights), labels=whole.labels), test, forget
    model = load_weights(whole, weights)
    assert model.labels is not None
    earlier = set(range(len(test.classes))) - set(model.labels) - set(forget)
    left = [label for label in range(len(test.classes)) if label not in earlier]
    narrowed = replace(model, labels=tuple(left.index(label) for label in model.labels))
    return narrowed, test.narrowed(earlier), tuple(left.index(label) for label in forget)


def _audited(
    work: Work,
    original: Classifier,
    unlearned: Forgotten,
    oracles: Mapping[str, Oracle],
    beside: Mapping[str, Outcome],
) -> Findings:
    """Write the retrained models, fix the thresholds by them, and judge."""
    experiment, out, events = work.experiment, work.out, work.events
    save_retrained(out, experiment, oracles)
    write_rounds(out, {name: oracle.steps for name, oracle in oracles.items()})
    files = {name: sha256(retrained_file(out, name)) for name in oracles}
    events.once("retrained models ready", sha256=files)
    # The plan starts from the architecture: of an original that was pruned before, it lists filters long gone.
    known = not original.plan.kept
    shipped = Shipped(out / MODEL, original.module.state_dict()) if known else None
    findings = audit(
        Subject(unlearned.model, unlearned.repaired, shipped),
        experiment.audit_images(),
        oracles={name: Subject.without_rows(oracle.model, experiment.forget) for name, oracle in oracles.items()},
        controls={name: control.subject for name, control in beside.items()},
        record=work.record(),
    )
    events.once("audited", verdict=findings.verdict)
    return findings


def _save_unlearned(out: Path, experiment: Experiment, original: Classifier, unlearned: Forgotten) -> None:
    write_text(out / PLAN, unlearned.model.plan.to_json() + "\n")
    if isinstance(unlearned, Unlearned):
        _save_scores(out, experiment, original, unlearned)
    save_model(out / MODEL, unlearned.model, experiment)


def _save_scores(out: Path, experiment: Experiment, original: Classifier, unlearned: Unlearned) -> None:
    unlearned.stats.save(out / STATS)
    if len(experiment.forget) == 1 or experiment.recipe.unlearn.jointly:  # otherwise the scores are of the last class
        write_tensors(out / SCORES, unlearned.scores, {})
        if experiment.recipe.evidence.feature_maps:
            maps, test = out / MAPS, experiment.splits.test
            save_feature_maps(maps, original.module, test, unlearned.scores, forget=experiment.forget)
