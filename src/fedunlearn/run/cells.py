"""The cells of a comparison: a method with its settings and a seed.

A cell has a folder of its own in ``cells``, from which it goes on after a kill, and a file that says what came of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fedunlearn.audits.audit import FOLDER, ORIGINAL, Calibrated
from fedunlearn.audits.base import Found
from fedunlearn.audits.table import FIGURES
from fedunlearn.audits.verdict import speaking_against
from fedunlearn.channels.plan import Classifier
from fedunlearn.errors import RecipeError
from fedunlearn.evidence.folder import MODEL
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import STATE, Journal, header_of
from fedunlearn.federation.ledger import Cost
from fedunlearn.files import write_text
from fedunlearn.methods.base import Method, Outcome, Request, resolved
from fedunlearn.methods.prune import CONTRAST, TF_IDF
from fedunlearn.methods.table import COMPARED
from fedunlearn.run.experiment import save_model
from fedunlearn.run.references import Oracle, request
from fedunlearn.run.result import cost_until, evaluate, judged, training_curve, validation_block, whole_cost
from fedunlearn.run.work import Work


class Cells:
    """Does cells and trials of methods on one original, in folders of their own, and reads back what is done.

    Args:
        work: the comparison.
        original: the model that is to forget.
        oracles: the retrained models.
        bands: of the retrained models.
        chosen: names of the methods compared.
    """

    def __init__(
        self,
        work: Work,
        original: Classifier,
        oracles: Mapping[str, Oracle],
        bands: Calibrated,
        *,
        chosen: Sequence[str],
    ) -> None:
        self._work = work
        self._original = original
        self._oracles = oracles
        self._bands = bands
        self._chosen = chosen

    def done(self, method: Method, cell: str, settings: Any, seed: int) -> dict[str, Any]:
        """Return what came of a cell, which is done where it is not yet, or was done with other settings."""
        return self._kept(cell, method, settings, seed) or self._measured(method, cell, settings, seed)

    def _measured(self, method: Method, cell: str, settings: Any, seed: int) -> dict[str, Any]:
        experiment, forget = self._work.experiment, self._work.experiment.forget
        with self._federation(method, cell, settings, seed) as fed:
            outcome = self._outcome(method, fed, settings, seed)
            subject = outcome.subject
            save_model(self._folder(cell) / MODEL, subject.model, experiment)
            block = evaluate(subject.model, experiment.splits.test, forget=forget, row_kept=subject.row_kept)
            found = self._bands.measured(cell, subject.checked(cell, len(experiment.splits.test.classes), forget))
            judgement = self._bands.judged_beside(cell)
            validation = validation_block(experiment, subject.model, subject.row_kept)
            value = {
                "method": method.name,
                "seed": seed,
                **self._about(method, settings, seed),
                "used": resolved(settings, self._request(method, fed, seed), fed),
                **block,
                "validation": validation,
                "figures": figures_of(found),
                **judged(judgement),
                "outside": speaking_against(judgement),
                **({} if outcome.gone is None else {"gone": outcome.gone}),
                **self._costs(outcome, validation["retain"]),
            }
            write_text(self._file(cell), json.dumps(value, indent=1) + "\n")
            fed.journal.close()
        return value

    def _costs(self, outcome: Outcome, reached: float | None) -> dict[str, Any]:
        """Return what the method cost, and how many times that retraining costs; seconds differ from run to run.

        To equal R: mean, lowest and highest over the retrained models, and whether all of them got there. Where the
        original never knew the class, nothing was forgotten, however fast; where nobody looked how good a retrained
        model was on its way, nothing tells when it was as good.
        """
        cost = asdict(outcome.cost or Cost())
        del cost["client_seconds"]
        original = self._bands.models[ORIGINAL].figures
        knew = "forget" in original and original["forget"].value > 1 / len(self._work.experiment.splits.test.classes)
        if not self._oracles or not cost["client_flops"] or reached is None or not knew:
            return {"cost": cost}
        steps = [oracle.steps for oracle in self._oracles.values()]
        if not all(map(training_curve, steps)):
            return {"cost": cost}
        until = [cost_until(trained, reached) for trained in steps]
        ratios = [spent["client_flops"] / cost["client_flops"] for spent in until]
        return {
            "cost": cost,
            "speedup": fmean(ratios),
            "speedup_range": [min(ratios), max(ratios)],
            "speedup_reached": all(spent["reached"] for spent in until),
            "speedup_whole": whole_cost(steps[0])["client_flops"] / cost["client_flops"],
        }

    def _outcome(self, method: Method, fed: Federation, settings: Any, seed: int) -> Outcome:
        return method.run(self._original, fed, self._request(method, fed, seed), settings)

    def _request(self, method: Method, fed: Federation, seed: int) -> Request:
        """Return what a method is asked for; the erase step of the recipe is a setting of those that take one."""
        experiment = self._work.experiment
        cut, spent = experiment.cut(), None
        if method.matched and (pruned := self._pruned(seed)) is not None:
            cut, spent = replace(cut, fraction=pruned.get("gone", cut.fraction)), Cost(**pruned["cost"])
        asked = request(experiment, fed, cut=cut, clients=experiment.keepers(), spent=spent)
        return replace(asked, repair=replace(asked.repair, training=replace(asked.repair.training, objective=None)))

    def _pruned(self, seed: int) -> dict[str, Any] | None:
        """Return the cell of the recipe's own pruning with this seed, where it is among the cells."""
        name = self._work.experiment.recipe.unlearn.criterion
        if name not in self._chosen or COMPARED[name] not in (TF_IDF, CONTRAST):  # random is a control, done later
            return None
        return self._kept(f"{name}-seed{seed}", COMPARED[name], COMPARED[name].settings, seed)

    def _about(self, method: Method, settings: Any, seed: int) -> dict[str, Any]:
        """Return what else a cell depends on: its settings, and operations and channels of the pruning beside it."""
        pruned = self._pruned(seed) if method.matched else None
        return {
            "settings": None if settings is None else asdict(settings),
            "stops_at": None if pruned is None else pruned["cost"]["client_flops"],
            "prunes": None if pruned is None else pruned.get("gone"),
        }

    def tried(self, method: Method, name: str, settings: Any, seed: int) -> tuple[float, float]:
        """Return U and R on validation images of a trial, which is not audited.

        Raises:
            RecipeError: clients count no validation images of the class, or of the others.
        """
        kept = self._kept(name, method, settings, seed)
        if kept is None:
            with self._federation(method, name, settings, seed) as fed:
                subject = self._outcome(method, fed, settings, seed).subject
                kept = self._about(method, settings, seed)
                kept |= validation_block(self._work.experiment, subject.model, subject.row_kept)
                write_text(self._file(name), json.dumps(kept, indent=1) + "\n")
                fed.journal.close()
        if kept["forget_row_kept"] is None or kept["retain"] is None:
            raise RecipeError("clients count no validation images of the class, or of the others, by their min_images")
        return kept["forget_row_kept"], kept["retain"]

    @contextmanager
    def _federation(self, method: Method, cell: str, settings: Any, seed: int) -> Iterator[Federation]:
        """Give the clients with the journal of a cell, which is left however the cell ends."""

        def report(phase: str, done: int, planned: int) -> None:
            self._work.fed.journal.report(f"{cell}.{phase}", done, planned)

        header = {"cell": cell, "seed": seed, **self._about(method, settings, seed)}
        folder = self._folder(cell)
        # Of an earlier call with other settings under this name, of none, or of a cell that was done and lost its file.
        if header_of(folder) != header or not (folder / STATE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            (self._work.out / FOLDER / f"{cell}.json").unlink(missing_ok=True)
        journal = Journal(folder, header=header, observe=report)
        try:
            yield replace(self._work.fed, journal=journal, seed=seed)
        finally:
            journal.leave()

    def _folder(self, cell: str) -> Path:
        return self._work.out / "cells" / cell

    def _file(self, cell: str) -> Path:
        return self._work.out / "cells" / f"{cell}.json"

    def _kept(self, cell: str, method: Method, settings: Any, seed: int) -> dict[str, Any] | None:
        """Return what came of a finished cell with the same settings; it is done again where they changed."""
        if not self._file(cell).exists():
            return None
        value: dict[str, Any] = json.loads(self._file(cell).read_text("utf-8"))
        about = self._about(method, settings, seed)
        return value if {key: value.get(key) for key in about} == about else None


def figures_of(found: Found) -> dict[str, float]:
    """Return the figures in the order of their table, whether they were measured now or read back."""
    return {name: found.figures[name].value for name in FIGURES if name in found.figures}
