"""Errors of the verdict on digits: ``python -m benchmarks.verdict`` writes benchmarks/verdict.json, in half an hour.

Forty retrained models: ``n`` of them set the bands, one more is judged, many times; among those with odd seeds, and
among those with even ones. Models that must fail are judged by ``n`` of all: the controls of a
run, fine-tuning of rising length, and near misses, trained with 1, 4, 16 or 64 images of the class among the clients'
images; three seeds of each.
"""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import special

from benchmarks.verdict_tables import saw
from fedunlearn.audits import membership, neighbours, representation
from fedunlearn.audits.audit import measure
from fedunlearn.audits.base import Figure, Subject, View
from fedunlearn.audits.table import AUDITS, FIGURES
from fedunlearn.audits.verdict import INDISTINGUISHABLE, calibrate, judge
from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.run.experiment import Experiment, new_model, prepare
from fedunlearn.run.forgetting import unlearned_model
from fedunlearn.run.inputs import fingerprint
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.references import controls, retrained_models
from fedunlearn.training.compute import one_torch_thread

OUT = Path(__file__).parent / "verdict.json"
RETRAINED = 40
ORACLES = (3, 5, 10)
SEEDS = (0, 1, 2)
FINETUNED = (1, 4, 16)  # rounds of one epoch
LEFT = (1, 4, 16, 64)  # images of the class
DRAWS = 400  # of retrained models, for each half and number
_CONTROL_DRAWS = 50  # for each model that must fail
_BESIDE = (membership.AUDIT, neighbours.AUDIT)  # they compare with retrained models
_ALONE = tuple(audit for audit in AUDITS if audit not in (*_BESIDE, representation.AUDIT))

Figures = Mapping[str, Figure]


def main() -> None:
    """Train, draw and count."""
    with one_torch_thread():
        experiment = prepare(load_recipe("digits", ["compute.workers=1"]))
        retrained = _views(experiment, _retrained(experiment))
        must_fail = _views(experiment, _must_fail(experiment))
        value = {
            str(n): {
                "odd_seeds": _held_out(retrained[0::2], n),
                "even_seeds": _held_out(retrained[1::2], n),
                "must_fail": {name: _failing(views, retrained, n) for name, views in _by_name(must_fail).items()},
            }
            for n in ORACLES
        }
    OUT.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _figures(view: View, references: Sequence[View]) -> Figures:
    """Return all figures of a model beside retrained ones."""
    pairs = [_pair(view, other) for other in references]
    cka, distance = (sum(values) / len(pairs) for values in zip(*pairs))
    beside = measure(_BESIDE, view, references).figures
    return {**_figures_alone(view), **beside, "cka": Figure(cka), "procrustes": Figure(distance)}


@functools.cache
def _figures_alone(view: View) -> Figures:
    return measure(_ALONE, view).figures


@functools.cache
def _pair(view: View, other: View) -> tuple[float, float]:
    x, y = view.layers["features"], other.layers["features"]
    return representation.linear_cka(x, y), representation.procrustes(x, y)


def _retrained(experiment: Experiment) -> Iterator[tuple[str, Subject]]:
    fed, data = experiment.federation(Journal()), fingerprint(experiment.splits)
    for name, oracle in retrained_models(experiment, fed, data=data, count=RETRAINED).items():
        yield name, Subject.without_rows(oracle.model, experiment.forget)


def _must_fail(experiment: Experiment) -> Iterator[tuple[str, Subject]]:
    forget = experiment.forget
    for seed in SEEDS:
        fed = Federation(experiment.engine, Journal(), seed=1000 + seed)
        original = _trained(experiment, fed)
        unlearned = unlearned_model(experiment, original, fed)
        yield "contrast, repaired", Subject(unlearned.model, unlearned.repaired)
        for name, outcome in controls(experiment, original, unlearned, fed).items():
            yield name, outcome.subject
        for rounds in FINETUNED:
            kept = replace(fed, journal=Journal()).keeping(exclude=forget)
            training = replace(experiment.recipe.repair(), local_epochs=1)
            tuned = train_rounds(original, kept, training, rounds=rounds, phase="finetune")
            yield f"fine-tuned, {rounds} epoch{'s' * (rounds > 1)}", Subject.without_rows(tuned, forget)
    for left in LEFT:
        for seed in SEEDS:
            clients = _with_few(experiment.clients, forget, left)
            fed = Federation(LocalEngine(clients), Journal(), seed=2000 + seed)
            yield saw(left), Subject.without_rows(_trained(experiment, fed), forget)


def _trained(experiment: Experiment, fed: Federation) -> Classifier:
    recipe = experiment.recipe
    fresh = new_model(recipe, experiment.splits.train, seed=fed.seed)
    return train_rounds(fresh, fed, recipe.training(), rounds=recipe.train.rounds, server=experiment.server())


def _with_few(clients: Mapping[str, LabelledImages], forget: Sequence[int], left: int) -> dict[str, LabelledImages]:
    """Return the clients with the first ``left`` images of the forgotten classes, and none of the others of them."""
    few = {}
    for name, images in clients.items():
        forgotten = torch.isin(images.labels, torch.tensor(forget))
        stays = ~forgotten | (forgotten.cumsum(0) <= left)
        left -= int((stays & forgotten).sum())
        few[name] = images.take(stays.nonzero().flatten())
    return few


def _views(experiment: Experiment, subjects: Iterator[tuple[str, Subject]]) -> list[tuple[str, View]]:
    images = experiment.audit_images()
    classes = len(images.test.classes)
    return [(name, View(subject.checked(name, classes, images.forget), images)) for name, subject in subjects]


def _by_name(views: Sequence[tuple[str, View]]) -> dict[str, list[View]]:
    return {name: [view for other, view in views if other == name] for name, _ in views}


def _held_out(retrained: Sequence[tuple[str, View]], n: int) -> dict[str, Any]:
    """Count the retrained models that fail, by the verdict and where each figure has a band of 95 % of its own."""
    draw = random.Random(n)
    failing, alone, outside = 0, 0, Counter[str]()
    for _ in range(DRAWS):
        held, *oracles = (view for _, view in draw.sample(retrained, n + 1))
        judgement, sds = _judged(held, oracles)
        failing += judgement["verdict"] != INDISTINGUISHABLE
        outside.update(judgement["decided_by"] if judgement["verdict"] != INDISTINGUISHABLE else ())
        alone += _outside_alone(judgement, sds, n)
    return {"draws": DRAWS, "failing": failing, "failing_by_single_bands": alone, "figures": dict(outside)}


def _failing(views: Sequence[View], retrained: Sequence[tuple[str, View]], n: int) -> dict[str, Any]:
    """Count the verdicts on models that must fail which say so, and the figures that lie outside."""
    draw = random.Random(n)
    failing, outside = 0, Counter[str]()
    for view in views:
        for _ in range(_CONTROL_DRAWS):
            oracles = [other for _, other in draw.sample(retrained, n)]
            judgement, _ = _judged(view, oracles)
            failing += judgement["verdict"] != INDISTINGUISHABLE
            outside.update(
                name for name, audit in judgement["audits"].items() if audit["verdict"] not in (None, "inside")
            )
    return {"draws": len(views) * _CONTROL_DRAWS, "failing": failing, "figures": dict(outside)}


def _judged(view: View, oracles: Sequence[View]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the verdict on a model, and per figure the greater of deviation and standard error."""
    theirs = [_figures(oracle, [other for other in oracles if other is not oracle]) for oracle in oracles]
    figures = _figures(view, oracles)
    judgement = judge(figures, calibrate(theirs), oracles=len(oracles), chance=0.1)
    sds = {
        name: max(
            float(torch.tensor([figures[name].value for figures in theirs]).double().std()),
            theirs[0][name].error,
            0.001,
        )
        for name in figures
    }
    return judgement, sds


def _outside_alone(judgement: Mapping[str, Any], sds: Mapping[str, float], n: int) -> bool:
    """Return whether a figure lies outside ``mean +- t sd sqrt(1 + 1/n)`` with the 97.5 % quantile of Student's t."""
    half = float(special.stdtrit(n - 1, 0.975)) * (1 + 1 / n) ** 0.5
    harmless = {("near", True), ("apart", False)}
    for name, audit in judgement["audits"].items():
        if audit["band"] is None:
            continue
        apart = audit["figure"] - sum(audit["band"]) / 2
        if abs(apart) > half * sds[name] and (FIGURES[name].kind, apart > 0) not in harmless:
            return True
    return False


if __name__ == "__main__":
    main()
