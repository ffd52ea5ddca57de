"""The Flower app of a recipe: what a client finds by it, and what fails at the start or later."""

import json
import logging
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from typer.testing import CliRunner

from conftest import job
from fedunlearn import cli
from fedunlearn.errors import FederationError, RecipeError
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy
from fedunlearn.federation.tasks import Evaluate
from fedunlearn.flower.app import engine_on, recipe_images, recipe_model, recipe_of, recipe_rules, server_app
from fedunlearn.flower.client import client_app
from fedunlearn.flower.launch import SuperLink, _result, run_on, simulation
from fedunlearn.run.experiment import prepare
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.tables import PrivacyTable
from loopback import Loopback, nodes


def context(number=1, node=(), **config):
    return Context(1, 7, {"partition-id": number, **dict(node)}, RecordDict(), {"recipe": "digits"} | config)


def test_a_client_holds_what_the_recipe_gives_it():
    experiment = prepare(load_recipe("digits", ("federation.clients=3",)))
    for number, name in enumerate(experiment.clients):
        held = recipe_images(context(number, set="federation.clients=3"))
        assert held.client == name
        assert torch.equal(held.train.images, experiment.clients[name].images)
        assert torch.equal(held.validation.labels, experiment.validation[name].labels)


def test_a_recipe_travels_by_name_and_overrides_or_whole():
    recipe = load_recipe("digits", ("federation.clients=3", "privacy.min_count=4"))
    by_name = context(set="federation.clients=3 privacy.min_count=4")
    whole = context(recipe=recipe.model_dump_json())
    assert recipe_of(by_name) == recipe_of(whole) == recipe
    assert recipe_rules(whole) == Privacy(min_count=4)
    elsewhere = context(recipe=recipe.model_dump_json(), node={"data": "/its/own"})
    assert recipe_of(elsewhere).data.path == "/its/own"
    strict = context(recipe=recipe.model_dump_json(), node={"min-count": 9, "clip": 2.0, "noise": 1.0})
    assert recipe_rules(strict) == Privacy(min_count=9, clip=2.0, noise=1.0)
    states = [recipe_model(own).state_dict() for own in (by_name, whole)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


CONTRADICTION = (
    load_recipe("digits").model_copy(update={"privacy": PrivacyTable(clip=1.0, noise=1.0)}).model_dump_json()
)


@pytest.mark.parametrize(
    ("find", "own", "text"),
    [
        (recipe_of, context(recipe='{"data": 7}'), "the run configuration holds no valid recipe: Input should be"),
        (recipe_of, context(recipe=CONTRADICTION), "privacy.noise needs unlearn.sample = 0"),
        (recipe_images, context(10), "the recipe has clients 0 .. 9, this one is to be 10"),
        (recipe_images, context("first"), "the node configuration must say which client this is: partition-id=0, 1"),
        (recipe_model, context(set="model.name=os:system"), "the app of a recipe builds shipped models only"),
    ],
)
def test_what_a_client_cannot_use_is_refused(find, own, text):
    with pytest.raises(RecipeError) as error:
        find(own)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"out": "runs/x"}, "out of the run configuration must be an absolute path on the server, got 'runs/x'"),
        (
            {"out": "/nowhere", "command": "forget"},
            "command of the run configuration must be one of train, unlearn, run",
        ),
        ({"out": "/nowhere", "recipe": "digit"}, "there is no shipped recipe 'digit', did you mean 'digits'?"),
    ],
)
def test_a_run_configuration_that_makes_no_sense_is_refused(config, text):
    own = Context(1, 0, {}, RecordDict(), {"recipe": "digits", "command": "train"} | config)
    with pytest.raises(RecipeError) as error:
        server_app()(None, own)
    assert text in str(error.value)


@pytest.mark.parametrize(("command", "sharp"), [("run", True), ("unlearn", False)])
def test_a_run_over_sites_says_how_sharp_its_verdict_will_be_before_a_site_is_asked(tmp_path, capsys, command, sharp):
    before = logging.getLogger("fedunlearn").handlers
    own = Context(1, 0, {}, RecordDict(), {"recipe": "digits", "command": command, "out": str(tmp_path), "patience": 0})
    with pytest.raises(FederationError, match="only 0 of 10 clients"):
        server_app()(Loopback({}), own)
    assert logging.getLogger("fedunlearn").handlers is before  # the server had its own until it ended
    said = capsys.readouterr().out
    assert "to forget: class 9" in said
    assert ("the verdict holds the model against 5 retrained ones" in said) is sharp


@pytest.mark.parametrize("options", [("--engine", "flower"), ("--superlink", "127.0.0.1:1")])
def test_engine_and_superlink_go_together(options, tmp_path):
    done = CliRunner().invoke(cli.app, ["train", "--recipe", "digits", "--out", str(tmp_path / "run"), *options])
    assert done.exit_code == 2
    assert "the engine flower needs --superlink ADDRESS:PORT, and no other engine takes it" in done.stderr


def test_a_certificate_that_is_not_there_is_named(tmp_path):
    recipe = load_recipe("digits", ("federation.engine=flower",))
    with pytest.raises(FederationError, match=r"nobody.crt: there is no such certificate; give the one of the SuperL"):
        run_on(SuperLink("127.0.0.1:1", tmp_path / "nobody.crt"), recipe, tmp_path / "run", command="train")


TWO = load_recipe("digits", ("federation.clients=2",))


def test_a_client_app_that_fails_is_told_at_once():
    def unreadable(context):
        raise OSError(28, "No space left on device", "/secret/of/a/client")

    began = time.monotonic()
    broken = client_app(recipe_model, unreadable)
    with pytest.raises(
        FederationError, match=r"only 0 of 2 clients .*its images cannot be read: OSError: No space left on device;"
    ) as error:
        engine_on(Loopback(nodes(broken, 2)), patience=0.0, hello=60.0)(prepare(TWO))
    assert "secret" not in str(error.value)
    assert time.monotonic() - began < 20


def simulated_by(monkeypatch, simulate):
    """Put ``simulate`` in the place of Flower's function of its signature."""
    stand_in = SimpleNamespace(run_simulation=lambda server, app, number, backend_config: simulate(server, app, number))
    monkeypatch.setitem(sys.modules, "flwr.simulation", stand_in)


def test_a_simulation_that_fails_before_its_server_starts_is_told_at_once(monkeypatch):
    def fail(*_):
        raise RuntimeError("crashed") from OSError("no disk")

    simulated_by(monkeypatch, fail)
    began = time.monotonic()
    with pytest.raises(FederationError, match="Flower's simulation failed: OSError: no disk"), simulation(TWO):
        pytest.fail("there is no grid")
    assert time.monotonic() - began < 20


def test_a_simulation_that_fails_in_the_middle_is_told_at_once(monkeypatch):
    crash = threading.Event()

    def fail_later(server, app, number):
        def hang(message, context):
            if "hello" in message.content["fedunlearn"]:
                return app(message, context)
            return crash.set()  # and no answer

        threading.Thread(target=server, args=(Loopback(nodes(hang, number)), context()), daemon=True).start()
        crash.wait(60)
        raise RuntimeError("Ray is gone")

    simulated_by(monkeypatch, fail_later)
    began = time.monotonic()
    asked = job(Evaluate(), recipe_model(context(0)))
    with simulation(TWO) as grid:
        engine = engine_on(grid, patience=0.0, hello=60.0)(prepare(TWO))
        assert engine.clients == ("client-0", "client-1")
        with pytest.raises(FederationError, match="Flower's simulation failed: RuntimeError: Ray is gone"):
            engine.run(asked)
    assert time.monotonic() - began < 20


def test_a_simulation_that_does_not_start_is_an_error(monkeypatch):
    simulated_by(monkeypatch, lambda *_: time.sleep(0.5))
    late = pytest.raises(FederationError, match=r"Flower's simulation did not start within 0\.05 s")
    with late, simulation(TWO, start=0.05):
        pytest.fail("there is no grid")


def test_the_grid_of_a_simulation_is_that_of_flower(monkeypatch):
    def simulate(server, app, number):
        server(Loopback(nodes(app, number)), context())

    simulated_by(monkeypatch, simulate)
    with simulation(TWO) as grid:
        message = Message(RecordDict({"fedunlearn": ConfigRecord({"hello": 1})}), 101, "train")
        (answer,) = grid.send_and_receive([message], timeout=5.0)
        assert answer.content["fedunlearn"]["client"] == "client-1"


class Slow:
    """A SuperLink whose runs stay as they are."""

    status_now = "pending"
    asked: ClassVar[list[str]] = []

    def __init__(self, *given):
        pass

    def start(self, app):
        return "7"

    def call(self, *arguments):
        self.asked.append(arguments[0])

    def status(self, number):
        return self.status_now, ""


def test_a_run_that_never_starts_is_stopped_and_told(monkeypatch, tmp_path):
    monkeypatch.setattr("fedunlearn.flower.launch._Flwr", Slow)
    monkeypatch.setattr("fedunlearn.flower.launch.START", 0.05)
    monkeypatch.setattr("fedunlearn.flower.launch._AGAIN", 0.02)
    with pytest.raises(FederationError, match=r"run 7 on here:1 was still pending after 0.05 s, expected running: see"):
        run_on(SuperLink("here:1"), load_recipe("digits"), tmp_path / "run", command="train", tell=lambda line: None)
    assert Slow.asked == ["stop"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"recipe": 1}', '{"recipe": {"unlearn": {"rounds": -1}}}'])
def test_a_result_that_is_none_of_this_run_is_not_taken_for_its_own(tmp_path, text):
    recipe = load_recipe("digits")
    assert _result(tmp_path / "result.json", recipe) is None
    (tmp_path / "result.json").write_text(text)
    assert _result(tmp_path / "result.json", recipe) is None
    (tmp_path / "result.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    assert _result(tmp_path / "result.json", recipe) is not None


def test_a_superlink_that_keeps_silent_is_told(monkeypatch, tmp_path):
    def silent(*given, timeout, **named):
        raise subprocess.TimeoutExpired("flwr", timeout)

    monkeypatch.setattr("fedunlearn.flower.launch.subprocess.run", silent)
    with pytest.raises(FederationError, match="flwr run on here:1 gave no answer within 120 s: check that"):
        run_on(SuperLink("here:1"), load_recipe("digits"), tmp_path / "run", command="train", tell=lambda line: None)


def test_a_site_has_the_default_rules_whatever_the_recipe_says():
    assert recipe_rules(context()) == DEFAULT_RULES
    assert recipe_rules(context(node={"min-count": 1})).min_count == 1  # the site's own choice
