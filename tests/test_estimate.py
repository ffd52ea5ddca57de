"""How long a run will train, told before it starts."""

import re
from dataclasses import replace

import pytest

from conftest import write_set
from fedunlearn.audits.base import share
from fedunlearn.audits.table import FIGURES
from fedunlearn.audits.verdict import calibrate, unseen
from fedunlearn.console import expected, sharpness
from fedunlearn.run import estimate
from fedunlearn.run.estimate import images_to_train, seconds_to_train
from fedunlearn.run.experiment import prepare
from fedunlearn.run.recipe import load_recipe


def test_what_a_run_trains_on_is_counted_before_it_starts(monkeypatch):
    recipe = load_recipe("digits", ["audit.oracles=3", "compute.precision=float32", "unlearn.rounds=2"])
    experiment = prepare(recipe)
    held, nines = int(experiment.table.sum()), int(experiment.table[:, 9].sum())
    whole = recipe.train.rounds * recipe.train.local_epochs * held * recipe.federation.participation
    assert images_to_train(experiment, "train") == whole
    sampled = 10 * 32  # of each client
    once = 2 * recipe.unlearn.local_epochs * (held - nines) + 2 / 3 * sampled  # measured and re-estimated
    assert images_to_train(experiment, "unlearn") == pytest.approx(whole + once)
    kept = 1 - nines / held
    assert images_to_train(experiment, "run") == pytest.approx(whole + 3 * once + 3 * whole * kept)
    more = prepare(load_recipe("digits", ["unlearn.fraction=auto", "erase.complement=1.0", "unlearn.rounds=2"]))
    assert images_to_train(more, "unlearn") == pytest.approx(whole + 3 * once)  # three attempts, by halves
    assert images_to_train(more, "run") == pytest.approx(whole + 8 * once + 5 * whole * kept)
    assert images_to_train(experiment, "audit") == pytest.approx(3 * whole * kept)
    assert seconds_to_train(experiment, "train") > 0  # by the rate of this machine
    monkeypatch.setattr(estimate, "rate", lambda *about, **settings: 250.0)  # no two timings are the same
    for phase in ("train", "unlearn", "run"):
        assert seconds_to_train(experiment, phase) == images_to_train(experiment, phase) / 250
    turns = prepare(load_recipe("digits", ["unlearn.forget=[8, 9]", "unlearn.rounds=2", "audit.oracles=3"]))
    one, both = images_to_train(turns, "train"), images_to_train(turns, "unlearn")
    stay = 1 - int(turns.table[:, [8, 9]].sum()) / int(turns.table.sum())
    assert both == pytest.approx(one + 2 * held * stay + 3 / 3 * sampled)  # two measurements, one repair
    elsewhere = replace(experiment, recipe=load_recipe("digits", ["federation.engine=flower-simulation"]))
    assert seconds_to_train(elsewhere, "run") is None


def test_a_network_that_joins_axes_by_view_is_timed_as_it_is_trained(tmp_path):
    experiment = prepare(load_recipe(str(write_set(tmp_path, model="nets:viewing")), ["compute.precision=float32"]))
    assert seconds_to_train(experiment, "train") > 0


def test_what_a_verdict_cannot_see_is_told_before_anything_is_trained():
    alike = {name: share(50, 100) for name, figure in FIGURES.items() if figure.fixed is None}
    band = calibrate([alike] * 3)["probe"]
    deviations, accuracy = unseen(3, [100])
    assert accuracy == pytest.approx((band.high - band.low) / 2)
    assert deviations == pytest.approx((band.high - band.low) / 2 / band.sd)

    said = sharpness(prepare(load_recipe("digits", ["audit.oracles=3"])))
    assert "against 3 retrained ones (audit.oracles): a figure fails 19.3 of their standard deviations" in said
    assert "(6.7 with 5, 4.1 with 10), an accuracy near 50 % on the 36 test images to forget 27 points from it" in said
    both = sharpness(prepare(load_recipe("digits", ["unlearn.forget=[8, 9]"])))
    assert re.search(r"on the 7\d test images to forget 18 points", both)
    assert sharpness(prepare(load_recipe("digits", ["audit.oracles=2"]))).startswith("no verdict: it takes at least 3")
    some = prepare(load_recipe("digits"))
    untested = replace(some, splits=some.splits._replace(test=some.splits.test.without([9])))
    assert sharpness(untested) == "no verdict: there are no test images of a class to forget"
    given = sharpness(some, given=5, client="client-0")
    images = int(some.validation["client-0"].counts()[9])
    assert "against 5 retrained ones: a figure fails 6.7 of their" in given
    assert f"50 % on the {images} test images to forget" in given
    few = sharpness(some, given=1)
    assert few == "no verdict: it takes at least 3 retrained models, here are 1"


def test_the_time_to_train_is_told_in_words():
    for seconds, words in (
        (20, "less than a minute"),
        (70, "about 1 minute"),
        (600, "about 10 minutes"),
        (9000, "about 2.5 hours"),
    ):
        said = expected(seconds, load_recipe("digits"), "run")
        assert said.startswith(f"training takes {words} from the start on this machine")
        assert said.endswith("retrained models from the cache take none")
    own = load_recipe("digits", ["model.name=mine:net"])
    assert expected(600, own, "run").endswith("audits are not counted")  # by its name, its code is not known
    assert expected(600, own, "unlearn").endswith("if nothing else runs there")
