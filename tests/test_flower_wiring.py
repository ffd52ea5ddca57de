"""What an engine, a site and its app are told of rules, rounds and secrecy."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from conftest import collected, job, make_net
from fedunlearn.errors import FederationError, RecipeError
from fedunlearn.federation.jobs import ClientData
from fedunlearn.federation.privacy import Privacy
from fedunlearn.federation.tasks import Measure, Train
from fedunlearn.flower import client, launch, secure
from fedunlearn.flower.client import client_app, unlearning_mod
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.run.recipe import load_recipe
from fedunlearn.training.sgd import Training
from loopback import CLIENTS, Loopback, load_images, nodes
from loopback import build_model as build


def engine(grid=None, **options):
    return FlowerEngine(grid or Loopback(nodes()), **({"clients": 4, "deadline": 0.5, "patience": 0.1} | options))


def measure_job():
    return job(Measure(classes=3), make_net(), phase="measure-0")


def refused(app):
    """Return why node 100, whose app this is, is not asked."""
    return engine(Loopback(nodes() | {100: (app, 0)}))._refused[100]


def test_a_client_introduces_itself_in_the_shorter_of_deadline_and_patience():
    assert engine(deadline=9.0, patience=0.1)._hello == 0.1
    assert engine(deadline=0.5, patience=2.0)._hello == 0.5


def test_counts_of_a_secure_sum_are_rounded_and_not_cut(monkeypatch):
    sums = {name: torch.full((3,), 2.99999) for name in ("counts", "held")}
    monkeypatch.setattr(secure, "secure_sum", lambda *about, **how: (dict(sums), {}))
    reply, *_ = engine(secure=True).run(measure_job())
    assert (reply.tensors["counts"].tolist(), reply.tensors["held"].tolist(), reply.images) == ([3] * 3, [3] * 3, 9)


def test_with_half_of_the_clients_there_a_run_begins():
    chosen = engine(Loopback(nodes(count=2)), clients=tuple(CLIENTS))
    assert sorted(chosen._nodes) == ["client-0", "client-1"]


def test_a_client_whose_validation_images_mean_something_else_is_not_asked():
    def own(context):
        data = load_images(context)
        return ClientData(data.client, data.train, replace(data.validation, mean=(0.9,)))

    assert "its validation holds images normalised by mean (0.9,), the others by (0.3,)" in refused(
        client_app(build, own)
    )


def test_noise_that_cannot_be_drawn_is_told_when_a_client_introduces_itself(monkeypatch):
    def cannot(rules):
        if rules.noise:
            raise RecipeError("OpenDP is not here")

    monkeypatch.setattr(client, "check_noise", cannot)
    assert "OpenDP is not here" in refused(
        client_app(build, load_images, rules=lambda context: Privacy(clip=1.0, noise=1.0))
    )


def test_a_client_s_rules_hold_under_secure_aggregation_too(monkeypatch):
    given, rules = [], lambda context: Privacy(min_count=9)
    monkeypatch.setattr(client, "add_secure_measure", lambda *about, **how: given.append(how.get("rules")))
    client_app(build, load_images, rules=rules, secure=True)
    assert given == [rules]


def test_an_app_with_the_mod_under_secure_aggregation_answers_no_plain_measure():
    app = ClientApp(mods=[unlearning_mod(build, load_images, secure=True)])
    app.train()(lambda message, context: None)
    with pytest.raises(FederationError, match="this client reports statistics under secure aggregation only"):
        collected(engine(Loopback(nodes(app))), measure_job())


def test_a_train_function_is_told_which_round_it_is():
    app, rounds = ClientApp(mods=[unlearning_mod(build, load_images)]), set()

    @app.train()
    def _(message, context):
        rounds.add(message.content["config"]["server-round"])
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 20})}
        return Message(RecordDict(content), reply_to=message)

    collected(engine(Loopback(nodes(app))), job(Train(training=Training(0.1, 8), lr=0.1), make_net(), round=4))
    assert rounds == {5}


def test_the_app_that_is_sent_knows_its_secrecy_and_its_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = ["federation.engine=flower", "privacy.secure=true", "model.weights=w.pt"]
    folder = launch._bundle(tmp_path / "app", load_recipe("digits", said), tmp_path / "out", "run", Path("key"), 7.0)
    assert "secure=True" in (folder / "fedunlearn_run.py").read_text("utf-8")
    config = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    assert json.loads(config["recipe"])["model"]["weights"] == str(tmp_path / "w.pt")
    assert (config["key"], config["patience"]) == (str(tmp_path / "key"), 7.0)


def test_flower_s_command_has_a_home_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", "/mine")
    assert launch._Flwr(tmp_path, launch.SuperLink("a:1"))._environment["FLWR_HOME"] == str(tmp_path)


def test_a_result_of_another_recipe_is_not_that_of_a_run(tmp_path):
    other = load_recipe("digits", ["train.lr=0.2"]).model_dump(mode="json")
    (tmp_path / "result.json").write_text(json.dumps({"recipe": other}))
    assert launch._result(tmp_path / "result.json", load_recipe("digits")) is None


def test_clients_of_a_simulation_have_the_rules_and_the_secrecy_of_the_recipe(monkeypatch):
    given = {}

    def told(build_model, load_images, **how):
        given.update(how)
        raise FederationError("enough")

    monkeypatch.setattr(launch, "client_app", told)
    said = ["federation.engine=flower-simulation", "privacy.secure=true", "privacy.min_count=4"]
    recipe = load_recipe("digits", said)
    with pytest.raises(FederationError, match="enough"), launch.simulation(recipe):
        pass
    assert given["rules"](None) == recipe.rules()
    assert given["secure"] is True


@pytest.mark.parametrize("status", ["finished:stopped", "finished:failed", "finished:interrupted"])
def test_a_run_that_was_not_completed_has_no_result(monkeypatch, tmp_path, status):
    ended = SimpleNamespace(start=lambda app: "7", status=lambda number: (status, ""), follow=lambda number, tell: None)
    monkeypatch.setattr(launch, "_Flwr", lambda home, superlink: ended)
    with pytest.raises(FederationError, match=f"run 7 on here:1 ended as {status}: no reason given"):
        launch.run_on(launch.SuperLink("here:1"), load_recipe("digits"), tmp_path, command="train", tell=id)


def test_ctrl_c_stops_the_run_where_it_works(monkeypatch, tmp_path):
    asked = []

    def interrupted(number, tell):
        raise KeyboardInterrupt

    there = SimpleNamespace(
        start=lambda app: "7",
        status=lambda number: ("running", ""),
        follow=interrupted,
        call=lambda *about: asked.append(about[:2]),
    )
    monkeypatch.setattr(launch, "_Flwr", lambda home, superlink: there)
    with pytest.raises(KeyboardInterrupt):
        launch.run_on(launch.SuperLink("here:1"), load_recipe("digits"), tmp_path, command="train", tell=id)
    assert asked == [("stop", "7")]
