"""What unlearning is held against: retrained models and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedunlearn.channels.plan import Classifier, Cut
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import ModelError, RunError
from fedunlearn.evidence.folder import retrained_file
from fedunlearn.federation.about import weights_digest
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.rounds import Watch, train_rounds
from fedunlearn.methods.base import Outcome, Request, as_many, settings_by
from fedunlearn.methods.table import CONTROLS
from fedunlearn.run.experiment import Experiment, new_model, save_model
from fedunlearn.run.kept import KNOWS, cached, check_folder_of_models, fill_kept, most_named, restore, store
from fedunlearn.unlearn import Forgotten, Unlearned


@dataclass(frozen=True, eq=False)
class Oracle:
    """A model retrained without the forgotten classes.

    Attributes:
        model: with a row for every class; those of the forgotten ones never saw an image of theirs.
        steps: its rounds.
        cached: whether it was kept from an earlier run.
    """

    model: Classifier
    steps: list[Step]
    cached: bool


def controls(experiment: Experiment, original: Classifier, unlearned: Forgotten, fed: Federation) -> dict[str, Outcome]:
    """Return what each control makes of ``original``, by name.

    Args:
        experiment: the run.
        original: the model before unlearning.
        unlearned: what the controls stand beside.
        fed: the clients and the record of the run.
    """
    cut = replace(unlearned.cut, fraction=as_many(unlearned)) if isinstance(unlearned, Unlearned) else experiment.cut()
    asked = request(experiment, fed, cut=cut, clients=unlearned.clients, spent=unlearned.cost)
    asked = replace(asked, unlearned=unlearned)
    erasing = experiment.recipe.erase.erasing()
    return {
        control.name: control.run(original, fed, asked, settings_by(control, erasing))
        for control in CONTROLS
        if control.applies(asked)
    }


def request(
    experiment: Experiment, fed: Federation, *, cut: Cut, clients: Sequence[str], spent: Cost | None = None
) -> Request:
    """Return what methods are asked for.

    Args:
        experiment: the run.
        fed: its clients.
        cut: how many channels go.
        clients: those that take part in training.
        spent: what pruning and repair cost, for a method of equal cost.
    """
    forget = list(experiment.forget)
    rows = [list(experiment.clients).index(name) for name in clients]
    stay = [label for label in range(len(experiment.splits.train.classes)) if label not in forget]
    kept = experiment.table[rows][:, stay].sum()
    # Those that hold fewer images than their rules let an answer stand for would only refuse.
    least = experiment.recipe.rules().min_images
    holds = (experiment.table[:, forget].sum(1) >= max(1, least)).tolist()
    return Request(
        experiment.forget,
        experiment.ranking(),
        cut,
        experiment.repair(),
        experiment.recipe.unlearn.jointly,
        tuple(clients),
        tuple(name for name, held in zip(experiment.clients, holds) if held),
        float(kept) * fed.keeping(exclude=forget, clients=clients).share(),
        spent,
    )


def retrained_models(experiment: Experiment, fed: Federation, *, data: str, count: int) -> dict[str, Oracle]:
    """Return ``count`` retrained models by name, ``retrained-SEED``.

    Their seeds follow the recipe's, so they share neither initial weights nor draws with the original or each other.

    Args:
        experiment: the run.
        fed: the clients and the record of the run.
        data: fingerprint of the images.
        count: how many.

    Raises:
        RunError: models that the recipe names are no answer to this request, or two of them are one.
    """
    if experiment.recipe.audit.models:
        check_folder_of_models(experiment, data=data)
    found: dict[str, Oracle] = {}
    weights: dict[str, str] = {}
    for seed in range(fed.seed + 1, fed.seed + 1 + count):
        name = f"retrained-{seed}"
        found[name] = _retrained(experiment, replace(fed.part(name), seed=seed), data)
        same = weights.setdefault(weights_digest(found[name].model.module.state_dict()), name)
        if same != name:  # copies would set bands that no retrained model lies in
            raise RunError(
                f"{same} and {name} are one model to the last weight, expected models of other draws: give others "
                "(audit.models), or leave audit.models out to retrain"
            )
    return found


def save_retrained(out: Path, experiment: Experiment, oracles: Mapping[str, Oracle]) -> None:
    """Write retrained models into the folder of a run."""
    for name, oracle in oracles.items():
        path = retrained_file(out, name)
        path.parent.mkdir(exist_ok=True)
        save_model(path, oracle.model, experiment)


def check_kept(experiment: Experiment) -> None:
    """Refuse retrained models that cannot be used, before any work: those of ``audit.models``, or those to be made.

    Raises:
        RunError: see ``retrained_models``.
        ModelError: a network of the user's own has other rows than the data has classes, or makes no fresh weights.
    """
    if experiment.recipe.audit.oracles and ":" in experiment.recipe.model.name:
        _check_fresh(experiment)
    if experiment.recipe.audit.models:
        unused, data = experiment.federation(Journal()), experiment.fingerprint()
        retrained_models(experiment, unused, data=data, count=experiment.recipe.audit.oracles)


def _check_fresh(experiment: Experiment) -> None:
    """Refuse a network of the user's own by which nothing can be retrained: of other rows, not fresh, or always one."""
    recipe, train = experiment.recipe, experiment.splits.train
    name, earlier, seed = recipe.model.name, experiment.earlier, recipe.federation.seed
    one, other = (new_model(recipe, train, seed=seed + k, earlier=earlier) for k in (1, 2))
    if one.rows != len(train.classes):
        raise ModelError(
            f"model.name {name!r} makes a network of {one.rows + len(earlier)} output rows where "
            f"{len(train.classes) + len(earlier)} were asked for: make as many as its argument classes says"
        )
    if recipe.audit.models:  # their weights are those of the files
        return
    if weights_digest(one.module.state_dict()) == weights_digest(other.module.state_dict()):
        raise ModelError(
            f"model.name {name!r} gives the same weights for every seed, so that retrained models would begin as one: "
            "let it neither load weights nor set a seed"
        )
    # One that has learnt nothing names a class or two, whatever it sees; of two, neither names each.
    if all(_knows_all(fresh, experiment.splits.test) for fresh in (one, other)):
        raise ModelError(
            f"model.name {name!r} makes networks that name most images of every class before they are trained, "
            "those to forget too: retrained models have to begin with fresh weights, let it load none"
        )


def _knows_all(model: Classifier, test: LabelledImages) -> bool:
    return all(most_named(model, test, [label]) > KNOWS for label in range(len(test.classes)))


def _retrained(experiment: Experiment, fed: Federation, data: str) -> Oracle:
    recipe = experiment.recipe
    earlier = experiment.earlier
    fresh = new_model(recipe, experiment.splits.train, seed=fed.seed, earlier=earlier)
    if recipe.audit.models:
        return Oracle(fresh, fill_kept(fresh, experiment, seed=fed.seed), True)
    # The shares of clients depend on the images of all classes.
    place = f"{data} of {experiment.all_classes} without {earlier}" if earlier else data
    cache = cached(recipe, experiment.forget, place, fed.seed)
    if cache is not None and not fed.journal.steps("retrain"):
        restored = restore(cache, fresh.module)
        if restored is not None:
            return Oracle(fresh, restored, True)
    kept = fed.keeping(exclude=experiment.forget, clients=experiment.keepers())
    model = train_rounds(
        fresh,
        kept,
        recipe.training(),
        rounds=recipe.train.rounds,
        phase="retrain",
        server=experiment.server(),
        watch=Watch(every=recipe.train.validate_every if recipe.data.validation else 0),
    )
    steps = fed.journal.steps("retrain")
    # One that some clients had no part in, as they failed, is not what the next run would train.
    if cache is not None and not any(entry.refused for step in steps for entry in step.entries):
        store(cache, model.module, steps)
    return Oracle(model, steps, False)
