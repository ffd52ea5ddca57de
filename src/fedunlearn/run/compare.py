"""``fedunlearn compare``: methods on the same clients, each audited by the same bands, cell by cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

from fedunlearn.audits.audit import ORIGINAL, Calibrated, calibration
from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier
from fedunlearn.errors import FedUnlearnError, RecipeError
from fedunlearn.evidence.comparison import COMPARISON, write_comparison
from fedunlearn.evidence.folder import BEFORE, SCHEMA, check_folder
from fedunlearn.federation.jobs import Engine
from fedunlearn.files import write_text
from fedunlearn.methods.base import Method, settings_by
from fedunlearn.methods.head_only import HEAD_ONLY
from fedunlearn.methods.table import COMPARED
from fedunlearn.run.cells import Cells, figures_of
from fedunlearn.run.experiment import Experiment, holds_validation, original_model, prepare, save_model
from fedunlearn.run.kept import validation_unseen
from fedunlearn.run.machine import settled
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.references import Oracle, check_kept, retrained_models
from fedunlearn.run.result import earlier_block, evaluate, whole_cost
from fedunlearn.run.tables import PRUNE
from fedunlearn.run.tuning import count, made, score, tried
from fedunlearn.run.work import Observe, Work, opened
from fedunlearn.tabular import percent
from fedunlearn.version import __version__

_TUNED = "tuned"
_MINUTES = 120.0  # seconds above which the time left is told in minutes
_READ = 0.2  # seconds: what takes less was read back


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        methods: names of ``COMPARED``; all of them where empty.
        seeds: how many seeds each method is done with.
        tune: settings that are tried for each method that has any, on validation images, with the first seed; none at
            0. The first of them are those that were published.

    Raises:
        RecipeError: there is no such method, or a number is too small.
    """

    methods: tuple[str, ...] = ()
    seeds: int = 3
    tune: int = 0

    def __post_init__(self) -> None:
        for name in self.methods:
            if name == PRUNE:
                raise RecipeError("compare takes pruning by the name of its ranking: tf_idf or contrast (or erase)")
            if name not in COMPARED:
                raise RecipeError(f"there is no method {name!r}; known are {', '.join(COMPARED)}, or all")
        if self.seeds < 1:
            raise RecipeError(f"--seeds must be at least 1, got {self.seeds}")
        if self.tune < 0:
            raise RecipeError(f"--tune must be at least 0, got {self.tune}")

    @property
    def chosen(self) -> list[Method]:
        """The methods, in the order of the table."""
        return [method for name, method in COMPARED.items() if name in self.methods or not self.methods]


def compare(
    recipe: Recipe,
    out: Path,
    plan: Plan,
    *,
    engine: Callable[[Experiment], Engine] | None = None,
    prepared: Callable[[Experiment], None] = lambda experiment: None,
    observe: Observe = lambda phase, done, planned: None,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Do every method of ``plan`` on the clients of ``recipe``; write compare.json and its page, and return the former.

    Args:
        recipe: the clients, the original, the retrained models, and the settings that methods share.
        out: folder; the same recipe goes on with it, and methods and seeds may be added.
        plan: what is compared.
        engine: makes the engine that runs the clients; those of this process where None.
        prepared: called once data, clients and model are there.
        observe: called with phase, steps done and steps planned.
        tell: shown a line for each finished cell.

    Raises:
        FedUnlearnError: something cannot be used. A method that fails costs its cell, which is named in the result.
    """
    check_folder(out)
    experiment, rates = settled(prepare(recipe), out, elsewhere=engine is not None)
    _check(experiment, plan)  # as what follows, before the folder is that of this comparison
    if not (out / COMPARISON).exists():
        check_kept(experiment)
    work = opened("compare", experiment, out, rates=rates, observe=observe)
    prepared(work.experiment)
    bench = _Bench(work.on(engine), plan, tell)
    value = bench.value()
    write_text(out / COMPARISON, json.dumps(value, indent=1) + "\n")
    write_comparison(out)
    done = {path.stem for path in (out / "cells").glob("*-seed*.json")} - set(value["cells"])
    if done:
        tell(f"done before and not asked for now, so not on the page: {', '.join(sorted(done))}")
    work.fed.journal.leave()
    return value


def _check(experiment: Experiment, plan: Plan) -> None:
    """Refuse before any work what the cells would be worth nothing without.

    Raises:
        RecipeError: settings are to be tried without validation images or without retrained models to reach; clients
            add noise, which each of the many measurements would spend anew; or they aggregate securely and a method
            asks for other numbers.
        DataError: there are no test images of a class to forget, or none of the others.
    """
    recipe = experiment.recipe
    experiment.audit_images()
    experiment.cut()  # one for all methods
    if recipe.unlearn.settings:
        raise RecipeError(
            "unlearn.settings is of unlearn.method, and a comparison takes the settings of each method: leave it out"
        )
    if plan.tune and recipe.data.validation == 0:
        raise RecipeError("--tune needs validation images: set data.validation above 0")
    if plan.tune and not holds_validation(experiment):
        raise RecipeError(
            "--tune chooses by validation images of the classes to forget, and the clients hold none of one of them "
            f"(data.validation is {recipe.data.validation:g}): raise it, or take fewer clients"
        )
    if plan.tune and recipe.audit.oracles == 0:
        raise RecipeError("--tune needs retrained models, whose R it is to reach: set audit.oracles above 0")
    erase = [method.name for method in plan.chosen if method.erases]
    if erase and (recipe.unlearn.target is not None or recipe.unlearn.repair != "finetune"):
        raise RecipeError(
            f"the erase step of {', '.join(erase)} is a part of the repair's rounds: leave unlearn.target out and "
            'unlearn.repair at "finetune", or name other --methods'
        )
    if recipe.privacy.noise:
        raise RecipeError(
            "privacy.noise protects one request, and a comparison measures the clients for each method, seed and "
            "trial, which no epsilon here accounts for: compare without it, and set it for the run"
        )
    bare = [method.name for method in plan.chosen if method.other_sums]
    if bare and recipe.privacy.secure:
        raise RecipeError(
            "privacy.secure protects what clients measure, and other numbers are asked for by "
            f"{', '.join(bare)}: leave it out, or name other --methods"
        )


class _Bench:
    """The original, the retrained models and the bands, and the cells that are measured by them."""

    def __init__(self, work: Work, plan: Plan, tell: Callable[[str], object]) -> None:
        self._work = work
        self._plan = plan
        self._tell = tell
        self._done = 0
        self._planned = len(plan.chosen) * plan.seeds + sum(
            min(plan.tune, count(method)) + plan.seeds for method in plan.chosen if plan.tune and method.space
        )
        self._took: list[float] = []  # seconds of the cells that were done now
        self._last = monotonic()
        self._failed: dict[str, str] = {}

    @cached_property
    def original(self) -> Classifier:
        """The original, trained or loaded."""
        model = original_model(self._work.experiment, self._work.fed)
        save_model(self._work.out / BEFORE, model, self._work.experiment)
        return model

    @cached_property
    def oracles(self) -> Mapping[str, Oracle]:
        """The retrained models."""
        work = self._work
        return retrained_models(work.experiment, work.fed, data=work.data, count=work.experiment.recipe.audit.oracles)

    @cached_property
    def bands(self) -> Calibrated:
        """The bands, fixed before the first candidate is there."""
        forget = self._work.experiment.forget
        subjects = {name: Subject.without_rows(oracle.model, forget) for name, oracle in self.oracles.items()}
        images, record = self._work.experiment.audit_images(), self._work.record()
        return calibration(images, subjects, record, planned=len(subjects))

    @cached_property
    def _one(self) -> Cells:
        """What does one cell."""
        chosen = [method.name for method in self._plan.chosen]
        return Cells(self._work, self.original, self.oracles, self.bands, chosen=chosen)

    def value(self) -> dict[str, Any]:
        """Do all cells and return the content of compare.json: no time, no date, nothing of this machine."""
        work, experiment = self._work, self._work.experiment
        original, forget, test = self.original, experiment.forget, experiment.splits.test
        self._check_looked_at()
        for name, subject in {
            ORIGINAL: Subject(original, original),
            HEAD_ONLY.name: Subject(original.without_rows(forget)),
        }.items():
            self.bands.measured(name, subject.checked(name, self._classes, forget))
        cells: dict[str, Any] = {}
        methods: dict[str, Any] = {}
        self._last = monotonic()
        erasing = experiment.recipe.erase.erasing()
        for method in [replace(chosen, settings=settings_by(chosen, erasing)) for chosen in self._plan.chosen]:
            methods[method.name] = _about(method)
            cells |= self._cells(method, method.name, method.settings)
            if self._plan.tune and method.space:
                best, trials = self._tuned(method)
                methods[method.name] |= {"trials": trials, "tuned": best}
                if best is None or best == asdict(method.settings):  # those are done already
                    self._planned -= self._plan.seeds
                    self._tell(f"{method.name}: {'no trial ended' if best is None else 'its own settings stand'}")
                else:
                    cells |= self._cells(method, f"{method.name}-{_TUNED}", made(method, best))
        portable = {key: value for key, value in work.recipe.items() if key != "compute"}
        return {
            "schema": SCHEMA,
            "version": __version__,
            "recipe": json.loads(json.dumps(portable)) | {"compute": experiment.recipe.compute.precision},
            "forget": list(forget),
            "classes": list(test.classes),
            **earlier_block(experiment),
            "seeds": self._seeds,
            "validation_unseen": validation_unseen(experiment),
            "original": evaluate(original, test, forget=forget)["accuracy"]
            | {"figures": figures_of(self.bands.models[ORIGINAL])},
            "retrained": {name: self._of_oracle(name, oracle) for name, oracle in self.oracles.items()},
            "bands": {name: [band.low, band.high] for name, band in self.bands.bands.items()},
            "controls": {name: self.bands.judged(name)["verdict"] for name in (ORIGINAL, HEAD_ONLY.name)},
            "calibration": self.bands.held_out((ORIGINAL, HEAD_ONLY.name)),
            "methods": methods,
            "cells": cells,
            "failed": self._failed,
        }

    def _check_looked_at(self) -> None:
        """Refuse to tune towards an accuracy that no retrained model was measured for."""
        blank = [
            name for name, oracle in self.oracles.items() if not oracle.steps or oracle.steps[-1].validation is None
        ]
        if self._plan.tune and blank:
            raise RecipeError(
                f"--tune needs the R of retrained models on validation images, and that of {blank[0]} was not "
                "measured: leave audit.models out to retrain, or compare without --tune"
            )

    @property
    def _classes(self) -> int:
        return len(self._work.experiment.splits.test.classes)

    @property
    def _seeds(self) -> list[int]:
        recipe = self._work.experiment.recipe
        first = recipe.federation.seed if recipe.unlearn.seed is None else recipe.unlearn.seed
        return [first + k for k in range(self._plan.seeds)]

    def _of_oracle(self, name: str, oracle: Oracle) -> dict[str, Any]:
        experiment = self._work.experiment
        delivered = oracle.model.without_rows(experiment.forget)
        accuracy = evaluate(delivered, experiment.splits.test, forget=experiment.forget, row_kept=oracle.model)
        figures = figures_of(self.bands.models[name])
        cost = {key: value for key, value in whole_cost(oracle.steps).items() if key != "client_seconds"}
        block: dict[str, Any] = accuracy["accuracy"] | {"figures": figures, "cost": cost}
        return block

    def _cells(self, method: Method, name: str, settings: Any) -> dict[str, Any]:
        """Do a method with each seed; what fails is named, and is tried again by the next call."""
        cells = {}
        for seed in self._seeds:
            cell = f"{name}-seed{seed}"
            try:
                value = self._one.done(method, cell, settings, seed)
                cells[cell] = value
                said = f"U {percent(value['accuracy']['forget_row_kept'])}, R {percent(value['accuracy']['retain'])}"
                self._step(f"{cell}: {said}, {value['verdict']}")
            except Exception as error:  # of one method, which may be the user's own: the others go on
                self._failed[cell] = _why(error)
                self._step(f"{cell} failed: {_why(error)}")
        return cells

    def _tuned(self, method: Method) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Return the best of the tried settings, and all trials: settings, U and R on validation images, their score.

        None is the best where no trial came to an end.
        """
        wanted = mean(oracle.steps[-1].validation or 0.0 for oracle in self.oracles.values())
        trials: list[dict[str, Any]] = []
        for number, settings in enumerate(tried(method, self._plan.tune)):
            name = f"{method.name}-trial{number}"
            values = asdict(made(method, settings))
            try:
                u, r = self._one.tried(method, name, made(method, settings), self._seeds[0])
                trials.append({"settings": values, "u": u, "r": r, "score": score(u, r, wanted)})
                changed = {key: value for key, value in values.items() if value != trials[0]["settings"][key]}
                shown = ", ".join(f"{key} {value}" for key, value in changed.items()) or "its own settings"
                self._step(f"{name} ({shown}): U {percent(u)}, R {percent(r)} on validation images")
            except Exception as error:  # as in a cell
                trials.append({"settings": values, "failed": _why(error)})
                self._step(f"{name} failed: {_why(error)}")
        ended = [trial for trial in trials if "score" in trial]
        best: dict[str, Any] | None = min(ended, key=lambda trial: trial["score"])["settings"] if ended else None
        return best, trials

    def _step(self, line: str) -> None:
        self._done += 1
        now = monotonic()
        if now - self._last > _READ:
            self._took.append(now - self._last)
        self._last = now
        seconds = mean(self._took) * (self._planned - self._done) if self._took else 0.0
        left = f"{seconds / 60:.0f} min" if seconds > _MINUTES else f"{seconds:.0f} s"
        self._tell(f"{line} ({self._done} of {self._planned}{f', about {left} left' if self._took else ''})")


def _why(error: Exception) -> str:
    """Return why a cell failed, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedUnlearnError) else f"{type(error).__name__}: {text}"


def _about(method: Method) -> dict[str, Any]:
    """Return what the table of methods says of one."""
    settings = None if method.settings is None else asdict(method.settings)
    about = {"label": method.label, "needs": method.needs, "sums": method.sums, "source": method.source}
    return about | {"settings": settings}
