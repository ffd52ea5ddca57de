"""The Flower app of a recipe: where a client finds its recipe, its images and its model; and the simulation's start."""

import os
import subprocess
import sys

import pytest
import torch
from flwr.app import Context, RecordDict

from fedunlearn.errors import RecipeError
from fedunlearn.federation.privacy import Privacy
from fedunlearn.flower_app import recipe_images, recipe_model, recipe_of, recipe_rules
from fedunlearn.recipe import PrivacyTable, load_recipe
from fedunlearn.setting import prepare


def context(number=1, node=(), **config):
    return Context(1, 7, {"partition-id": number, **dict(node)}, RecordDict(), {"recipe": "digits"} | config)


def test_a_client_holds_what_the_recipe_gives_it():
    setting = prepare(load_recipe("digits", ("federation.clients=3",)))
    for number, name in enumerate(setting.clients):
        held = recipe_images(context(number, set="federation.clients=3"))
        assert held.client == name
        assert torch.equal(held.train.images, setting.clients[name].images)
        assert torch.equal(held.validation.labels, setting.validation[name].labels)


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


START = """
from fedunlearn import simulation
from fedunlearn.errors import FederationError
from fedunlearn.federation.flower import FlowerEngine
from fedunlearn.recipe import load_recipe
simulation._START = {patience}
try:
    with simulation.simulation(load_recipe("digits", ("federation.clients=2",))) as grid:
        FlowerEngine(grid, clients=2, patience=10)
except FederationError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("patience", "environment", "text"),
    [
        (0.0, {}, "Flower's simulation did not start within 0 s"),
        (120.0, {"RAY_TMPDIR": "/proc/nowhere"}, "Flower's simulation failed: FileNotFoundError: "),
    ],
)
def test_a_simulation_that_does_not_start_is_an_error(patience, environment, text):
    code = START.format(patience=patience)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=200
    )
    assert text in done.stdout, done.stderr
