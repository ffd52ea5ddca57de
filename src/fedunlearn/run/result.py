"""The blocks of result.json.

``evaluate`` gives accuracy on test images, and the size of a model: the figures of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import nn

from fedunlearn.arguments import must_be
from fedunlearn.audits.findings import CANDIDATE, Findings
from fedunlearn.channels.checks import check_evaluation, placed
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.scores import Classes, forget_classes
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import DataError, ModelError
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Cost, flops_per_image
from fedunlearn.federation.privacy import epsilon
from fedunlearn.federation.rounds import validation_accuracy
from fedunlearn.methods.base import Outcome
from fedunlearn.run.experiment import Experiment
from fedunlearn.run.kept import validation_unseen
from fedunlearn.run.references import Oracle
from fedunlearn.smallest import Smallest
from fedunlearn.training.evaluation import count_correct, in_parts
from fedunlearn.unlearn import Forgotten, Unlearned

# A model, and the same with the rows of the forgotten classes in place.
Shown = tuple[Classifier, Classifier | None]


def unlearned_models(original: Classifier, unlearned: Forgotten) -> dict[str, Shown]:
    """Return the models before and after, by the names of their blocks."""
    models: dict[str, Shown] = {"original": (original, None), CANDIDATE: (unlearned.model, unlearned.repaired)}
    if isinstance(unlearned, Unlearned):
        models["pruned"] = (unlearned.pruned, None)
    return models


def audited_models(
    oracles: Mapping[str, Oracle], controls: Mapping[str, Outcome], forget: Sequence[int]
) -> dict[str, Shown]:
    """Return the retrained models, and the controls as they would be delivered: ``pruned`` without its row."""
    models: dict[str, Shown] = {
        f"controls.{name}": (control.subject.model, control.subject.row_kept) for name, control in controls.items()
    }
    return models | {name: (oracle.model.without_rows(forget), oracle.model) for name, oracle in oracles.items()}


def evaluated(
    experiment: Experiment, models: Mapping[str, Shown], observe: Callable[[str, int, int], None]
) -> dict[str, dict[str, Any]]:
    """Return the figures of each model on test images, see ``evaluate``, telling ``observe`` of each."""
    figures: dict[str, dict[str, Any]] = {}
    for name, (model, row_kept) in models.items():
        observe("evaluate", len(figures), len(models))
        figures[name] = evaluate(model, experiment.splits.test, forget=experiment.forget, row_kept=row_kept)
    observe("evaluate", len(models), len(models))
    return figures


def unlearned_blocks(
    experiment: Experiment, unlearned: Forgotten, figures: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the blocks ``original``, ``unlearned``, ``cost``, ``privacy``, and ``pruned``, ``fraction`` if any."""
    blocks: dict[str, Any] = {name: figures[name] for name in ("original", "pruned") if name in figures}
    if isinstance(unlearned, Smallest):
        blocks["fraction"] = {
            "chosen": unlearned.cut.fraction,
            "removed": unlearned.removed(),
            "passed": unlearned.passed,
            "attempts": [asdict(attempt) for attempt in unlearned.attempts],
        }
    return blocks | {
        CANDIDATE: {
            **figures[CANDIDATE],
            "validation": validation_block(experiment, unlearned.model, unlearned.repaired),
        },
        "cost": {"unlearn": asdict(unlearned.cost)},
        "privacy": privacy_block(experiment),
    }


def privacy_block(experiment: Experiment) -> dict[str, Any]:
    """Return the block ``privacy``: the clients' rules for their statistics, and the epsilon of their noise."""
    rules, unlearning = experiment.recipe.privacy, experiment.recipe.unlearn
    # Of several classes in turn, the random control measures models of its own from the second on.
    measures = 1 if unlearning.jointly or len(experiment.forget) == 1 else 2 * len(experiment.forget)
    spent = epsilon(rules.noise, rules.delta, measures=measures) if rules.noise else None
    return rules.model_dump(mode="json") | {"epsilon": spent}


def audit_blocks(
    oracles: Mapping[str, Oracle],
    controls: Mapping[str, Outcome],
    findings: Findings,
    figures: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the blocks ``controls``, ``oracles``, ``audits``, ``calibration`` and the verdict."""
    blocks: dict[str, Any] = {"controls": {}, "oracles": {}}
    for name, control in controls.items():
        blocks["controls"][name] = {**figures[f"controls.{name}"], **judged(findings.judgements[name])}
        if control.cost is not None:
            blocks["controls"][name]["cost"] = asdict(control.cost)
    for name, oracle in oracles.items():
        blocks["oracles"][name] = {**figures[name], "cached": oracle.cached}
    judgement = findings.judgements[CANDIDATE]
    return blocks | {"audits": judgement["audits"], "calibration": findings.held_out} | judged(judgement)


def judged(judgement: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verdict of a judgement, why, and the figures that decided it."""
    return {key: judgement[key] for key in ("verdict", "reason", "decided_by")}


def cost_blocks(experiment: Experiment, oracles: Mapping[str, Oracle], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``cost``, ``retraining``, ``speedup`` and ``speedup_whole``.

    ``speedup``: the first retrained model, until it was as good as the unlearned one, in each unit. ``retraining``: the
    same of each retrained model, in operations, with the curve that tells when. ``speedup_whole``: all rounds of the
    first, as whoever cannot watch the validation accuracy pays for. None of them where the original never knew the
    class: nothing was forgotten, however fast; nor where nobody looked how good the retrained models were on their way,
    nor where unlearning asked for no operation.
    """
    reached = result["unlearned"]["validation"]["retain"]
    if (
        reached is None
        or not oracles
        or not result["cost"]["unlearn"]["client_flops"]
        or not knew(result["original"]["accuracy"], len(result["classes"]))
    ):
        return {}
    first = next(iter(oracles.values()))
    curves = {name: training_curve(oracle.steps) for name, oracle in oracles.items()}
    if not all(curves.values()):
        return {}
    retraining = cost_until(first.steps, reached) | {"validation_unseen": validation_unseen(experiment)}
    costs = result["cost"] | {"retrain": retraining, "retrain_whole": whole_cost(first.steps)}
    blocks: dict[str, Any] = {"cost": costs, "retraining": {}}
    for name, oracle in oracles.items():
        until = cost_until(oracle.steps, reached)
        blocks["retraining"][name] = {
            "curve": curves[name],
            **{key: until[key] for key in ("client_samples", "client_flops", "reached")},
            "speedup": speedup(costs["unlearn"], until)["client_flops"],
        }
    for name, retrained in (("speedup", "retrain"), ("speedup_whole", "retrain_whole")):
        blocks[name] = speedup(costs["unlearn"], costs[retrained])
        if first.cached:  # seconds of another day, perhaps of another machine
            blocks[name].pop("client_seconds", None)
    return blocks


def validation_block(experiment: Experiment, model: Classifier, row_kept: Classifier | None) -> dict[str, float | None]:
    """Return U, its row in place, and R on the clients' validation images: what settings are chosen by.

    U of several classes is the mean over those that have images, as on test images; where the clients hide how many
    images of a class they hold, that over all images. None of both where they have none by the recipe: nobody is asked.
    """
    if experiment.recipe.data.validation == 0:
        return {"forget_row_kept": None, "retain": None}
    fed = experiment.federation(Journal())
    forget = experiment.forget
    r, _ = validation_accuracy(model, fed.keeping(exclude=forget), phase="compare")
    if row_kept is None:
        return {"forget_row_kept": None, "retain": r}
    privacy = experiment.recipe.privacy
    hidden = privacy.secure or privacy.min_count or privacy.noise or experiment.recipe.federation.engine == "flower"
    others = [sorted({*range(fed.engine.classes)} - {*only}) for only in ([forget] if hidden else zip(forget))]
    shares = [validation_accuracy(row_kept, fed.keeping(exclude=gone), phase="compare")[0] for gone in others]
    known = [share for share in shares if share is not None]
    return {"forget_row_kept": fmean(known) if known else None, "retain": r}


def engine_block(experiment: Experiment) -> dict[str, Any]:
    """Return the block ``engine``: who held what, in counts only."""
    block = {
        "name": experiment.recipe.federation.engine,
        "clients": len(experiment.engine.clients),
        "images": int(experiment.table.sum()),
    }
    privacy = experiment.recipe.privacy
    if privacy.secure or privacy.min_count or privacy.noise:
        return block  # what was kept from the server is not published either
    return block | {
        "images_per_client": dict(zip(experiment.clients, experiment.table.sum(1).tolist())),
        "clients_per_class": [int(n) for n in (experiment.table > 0).sum(0)],
    }


def earlier_block(experiment: Experiment) -> dict[str, Any]:
    """Return the blocks ``earlier``, names of the classes that the model forgot before, and ``numbers`` of the others.

    None where it forgot none: the numbers are those that the data has for ``classes``.
    """
    if not experiment.earlier:
        return {}
    everything = experiment.all_classes
    return {
        "earlier": [everything[label] for label in experiment.earlier],
        "numbers": [everything.index(name) for name in experiment.splits.test.classes],
    }


def speedup(unlearned: Mapping[str, Any], retrained: Mapping[str, Any]) -> dict[str, float]:
    """Return retraining cost over unlearning cost, of two cost blocks of result.json."""
    counted = ("client_flops", "client_samples", "rounds", "client_seconds")
    pairs = {name: (retrained[name], unlearned[name]) for name in counted}
    pairs["bytes"] = (
        retrained["bytes_up"] + retrained["bytes_down"],
        unlearned["bytes_up"] + unlearned["bytes_down"],
    )
    return {name: above / below for name, (above, below) in pairs.items() if below}


def cost_until(steps: Sequence[Step], accuracy: float) -> dict[str, Any]:
    """Return what training cost until its validation accuracy first reached ``accuracy``; all of it if it never did.

    Its evaluations are not counted, which is in favour of retraining.
    """
    looked = [(k, step.validation) for k, step in enumerate(steps, 1) if step.validation is not None]
    first = next((k for k, r in looked if r >= accuracy), None)
    return whole_cost(steps[:first]) | {"reached": first is not None}


def training_curve(steps: Sequence[Step]) -> list[tuple[int, float]]:
    """Return ``(operations of the clients so far, accuracy on validation images)`` at each look at the latter."""
    spent, curve = 0, []
    for step in steps:
        spent += sum(entry.flops for entry in step.entries if entry.job == "train")
        if step.validation is not None:
            curve.append((spent, step.validation))
    return curve


def whole_cost(steps: Sequence[Step]) -> dict[str, Any]:
    """Return what all ``steps`` of training cost; their evaluations are not counted."""
    return asdict(Cost.of([entry for step in steps for entry in step.entries if entry.job == "train"]))


def knew(accuracy: Mapping[str, Any], classes: int) -> bool:
    """Return whether a model, of the block ``accuracy``, names the classes to forget more often than by chance.

    ``U > 1 / classes``; also where there is no test image of them.
    """
    u = accuracy["forget_row_kept"]
    return u is None or bool(u > 1 / classes)


def evaluate(
    model: nn.Module | Classifier,
    images: LabelledImages,
    *,
    forget: Classes,
    row_kept: Classifier | None = None,
) -> dict[str, Any]:
    """Return accuracy, parameters and multiply-adds of ``model`` as they stand in result.json.

    Args:
        model: the CNN; a class that its labels leave out is never named, so its accuracy is 0.
        images: test images.
        forget: forgotten class or classes, by number or name: ``forget`` (U) is the mean of the accuracies on each,
            ``retain`` (R) that on all images of the others.
        row_kept: the same model with the rows of the forgotten classes still in place, for ``forget_row_kept``; where
            None, that is ``forget``, or None if the model has no such rows.

    Raises:
        ModelError: output rows, labels and the classes of the images do not fit together, ``row_kept`` lacks a row,
            or weights are not finite.
        PlanError: the classes to forget are no classes of the images.
        DataError: the images are something else.
    """
    must_be(LabelledImages, images, "evaluate(images)", "LabelledImages, as the readers give", DataError)
    wanted = forget_classes(forget, images.classes)
    return measured(Classifier.of(model, images.shape), images, wanted, row_kept=row_kept)


def measured(
    model: Classifier, images: LabelledImages, wanted: Sequence[int], *, row_kept: Classifier | None = None
) -> dict[str, Any]:
    """Return what ``evaluate`` does, of the classes with the numbers ``wanted``; of none where the data has none."""
    shown = model.checked(len(images.classes))
    correct, counts = _count(shown, images)
    gone = torch.zeros(len(counts), dtype=torch.bool)
    gone[list(wanted)] = True
    accuracy: dict[str, Any] = {
        "forget": _mean_share(correct[gone], counts[gone]),
        "retain": _share(correct[~gone], counts[~gone]),
        "per_class": {name: _share(correct[k], counts[k]) for k, name in enumerate(images.classes)},
    }
    if row_kept is not None:
        must_be(Classifier, row_kept, "evaluate(row_kept=...)", "a Classifier, as unlearn() returns", ModelError)
        row_kept = row_kept.checked(len(images.classes))
        lacking = sorted(set(wanted) - set(row_kept.labels or ()))
        if lacking:
            raise ModelError(
                f"row_kept has no output row for class {lacking[0]}, which was forgotten: give the model as it was "
                "before its rows were removed, the attribute repaired of what unlearn() returns"
            )
        accuracy["forget_row_kept"] = _mean_share(*_count(row_kept, images.only(wanted)))
    else:
        has_rows = set(wanted) <= set(shown.labels or ())
        accuracy["forget_row_kept"] = accuracy["forget"] if has_rows else None
    forward, _ = flops_per_image(shown.module, images.shape)
    parameters = sum(parameter.numel() for parameter in shown.module.parameters())
    return {"accuracy": accuracy, "parameters": parameters, "macs": forward // 2}


def _count(model: Classifier, images: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right answers and images per class."""
    check_evaluation(model.module, placed(model.example, model.module))
    counted = in_parts(model.module, images, lambda net, some: count_correct(net, some, labels=model.labels))
    correct, counts = zip(*((count.correct, count.counts) for count in counted))
    return torch.stack(correct).sum(0), torch.stack(counts).sum(0)


def _share(correct: torch.Tensor, counts: torch.Tensor) -> float | None:
    total = int(counts.sum())
    return int(correct.sum()) / total if total else None


def _mean_share(correct: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Return the mean of the shares of the classes that have images: a rare class is not drowned in the others."""
    shares = [c / n for c, n in zip(correct.tolist(), counts.tolist()) if n]
    return fmean(shares) if shares else None
