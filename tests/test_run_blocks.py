"""What a run asks of clients, and tells of them, beside its models: privacy, who holds what, controls, kept models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from conftest import write_set
from fedunlearn.channels.plan import Cut
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.privacy import epsilon
from fedunlearn.federation.rounds import Repair
from fedunlearn.run import references
from fedunlearn.run.experiment import prepare
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.references import request
from fedunlearn.run.result import engine_block, privacy_block, validation_block
from fedunlearn.training.sgd import Training
from fedunlearn.unlearn import unlearn

REPAIR = Repair(Training(lr=0.05, batch_size=8), rounds=1)


def test_classes_forgotten_in_turn_spend_each_time():
    noise = ["privacy.clip=2.0", "privacy.noise=4.0", "unlearn.sample=0", "unlearn.forget=[1, 2]"]
    for jointly, measures in ((False, 4), (True, 1)):
        read = load_recipe("digits", [*noise, f"unlearn.jointly={str(jointly).lower()}"])
        found = privacy_block(SimpleNamespace(recipe=read, forget=(1, 2)))
        assert found["epsilon"] == pytest.approx(epsilon(4.0, 1e-5, measures=measures))


def test_nothing_tells_who_holds_what_where_counts_are_hidden(tmp_path):
    experiment = prepare(load_recipe(str(write_set(tmp_path)), ["privacy.min_count=5"]))
    assert set(engine_block(experiment)) == {"name", "clients", "images"}


def test_classes_are_asked_about_together_where_counts_are_hidden(tmp_path):
    said = ["unlearn.forget=[2, 3]", "data.validation=0.2", "privacy.min_count=1"]
    experiment = prepare(load_recipe(str(write_set(tmp_path)), said))
    asked = []

    class Told(LocalEngine):
        def run(self, job):
            asked.append(job.task.exclude)
            return super().run(job)

    engine = Told(experiment.clients, validation=experiment.validation, rules=experiment.recipe.rules())
    validation_block(replace(experiment, engine=engine), experiment.model, experiment.model)
    assert asked == [(2, 3), (0, 1)]  # not of each class alone


def test_holders_hold_as_many_images_as_their_rules_ask_for(tmp_path):
    experiment = prepare(load_recipe(str(write_set(tmp_path)), ["federation.engine=flower"]))
    table = experiment.table.clone()
    table[0, 2] = 4  # of which no answer of its own is given
    assert experiment.recipe.rules().min_images == 5
    asked = request(
        replace(experiment, table=table),
        experiment.federation(Journal()),
        cut=experiment.cut(),
        clients=experiment.keepers(),
    )
    assert asked.holders == ("client-1", "client-2")


def test_controls_lose_as_many_channels_and_train_as_many_clients(tmp_path, monkeypatch):
    experiment, given = prepare(load_recipe(str(write_set(tmp_path)))), []
    control = SimpleNamespace(
        name="told",
        applies=lambda asked: True,
        settings=None,
        erases=False,
        run=lambda model, fed, asked, settings: given.append(asked),
    )
    monkeypatch.setattr(references, "CONTROLS", [control])
    monkeypatch.setattr(references, "settings_by", lambda control, erasing: None)
    fed = experiment.federation(Journal())
    done = unlearn(experiment.model, fed, forget=2, cut=Cut(0.8), repair=REPAIR, rank=experiment.ranking())
    references.controls(experiment, experiment.model, replace(done, clients=("client-1",)), fed)
    (asked,) = given
    assert asked.cut.fraction == references.as_many(done) < 0.8
    assert asked.clients == ("client-1",)
    assert asked.spent == done.cost


def test_a_kept_model_is_of_the_classes_that_went_before_it(tmp_path, monkeypatch):
    given = []
    experiment = prepare(load_recipe(str(write_set(tmp_path)), ["data.validation=0"]))
    monkeypatch.setattr(
        references, "train_rounds", lambda model, fed, training, **how: given.append(how["watch"].every) or model
    )
    monkeypatch.setattr(references, "cached", lambda recipe, forget, place, seed: given.append(place))
    references.retrained_models(experiment, experiment.federation(Journal()), data="d", count=1)
    references.retrained_models(replace(experiment, earlier=(1,)), experiment.federation(Journal()), data="d", count=1)
    one, watched, other, _ = given
    assert watched == 0
    assert one == "d" != other
