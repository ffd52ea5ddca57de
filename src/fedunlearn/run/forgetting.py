"""What a recipe makes of the original: by pruning, or by the method that it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.ledger import Cost
from fedunlearn.methods.base import Method, resolved, settings_by
from fedunlearn.methods.table import METHODS
from fedunlearn.run.experiment import Experiment
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.references import request
from fedunlearn.run.tables import PRUNE
from fedunlearn.smallest import unlearn_smallest
from fedunlearn.unlearn import Forgotten, Unlearned, unlearn


def forgotten_model(experiment: Experiment, original: Classifier, fed: Federation) -> Forgotten:
    """Return what the recipe's method makes of ``original``."""
    u = experiment.recipe.unlearn
    if u.method == PRUNE:
        return unlearned_model(experiment, original, fed)
    method, part = METHODS[u.method], fed.part("method")  # a control may have phases of the same names
    settings = _settings(experiment.recipe, method)
    asked = request(experiment, part, cut=experiment.cut(), clients=experiment.keepers())
    outcome = method.run(original, part, asked, settings)
    subject = outcome.subject
    assert subject.row_kept is not None  # controls alone lack the rows
    return Forgotten(
        forget=experiment.forget,
        repaired=subject.row_kept,
        model=subject.model,
        clients=experiment.keepers(),
        cost=outcome.cost or Cost(),
    )


def method_block(experiment: Experiment, fed: Federation) -> dict[str, Any]:
    """Return the block ``method``: by what the recipe forgets, where that is not the method of this project."""
    u = experiment.recipe.unlearn
    if u.method == PRUNE:
        return {}
    method = METHODS[u.method]
    asked = request(experiment, fed, cut=experiment.cut(), clients=experiment.keepers())
    used = resolved(_settings(experiment.recipe, method), asked, fed)
    about = {"name": method.name, "label": method.label, "needs": method.needs, "source": method.source}
    return {"method": about | {"settings": used}}


def _settings(recipe: Recipe, method: Method) -> Any:
    return replace(settings_by(method, recipe.erase.erasing()), **recipe.unlearn.settings)


def unlearned_model(experiment: Experiment, original: Classifier, fed: Federation) -> Unlearned:
    """Return what the recipe makes of ``original``."""
    u = experiment.recipe.unlearn
    repair, rank = experiment.repair(), experiment.ranking()
    if u.fraction == "auto":
        return unlearn_smallest(
            original, fed, forget=experiment.forget, repair=repair, rank=rank, jointly=u.jointly, scope=u.scope
        )
    return unlearn(
        original, fed, forget=experiment.forget, cut=experiment.cut(), repair=repair, rank=rank, jointly=u.jointly
    )
