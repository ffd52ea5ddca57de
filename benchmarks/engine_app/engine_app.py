"""The Flower app of ``python -m benchmarks.engines``: times rounds where the grid is."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from fedunlearn.channels.groups import prunable_layers
from fedunlearn.channels.taps import find_taps
from fedunlearn.federation.ask import Answers
from fedunlearn.federation.jobs import Engine, Evaluate, Measure, Train
from fedunlearn.flower.app import recipe_images, recipe_model, recipe_of
from fedunlearn.flower.client import client_app
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.messages import Context, Grid, ServerApp
from fedunlearn.run.experiment import new_model, read_data
from fedunlearn.run.recipe import Recipe

client = client_app(recipe_model, recipe_images)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Write the seconds of each kind of round."""
    recipe = recipe_of(context)
    names = recipe.federation.clients
    engine = FlowerEngine(grid, clients=names, deadline=300, patience=300)
    times = time_rounds(engine, recipe, int(str(context.run_config["repeats"])))
    Path(str(context.run_config["out"])).write_text(json.dumps(times))


def time_rounds(engine: Engine, recipe: Recipe, repeats: int) -> dict[str, dict[str, list[Any]]]:
    """Return the seconds of empty rounds, of statistics, and of training, and which clients gave no answer in each.

    The first round of each kind is not counted.
    """
    images = read_data(recipe).train
    model = new_model(recipe, images, seed=0)
    example = torch.zeros((2, *images.shape))
    classes = len(images.classes)
    taps = find_taps(model, prunable_layers(model, example), example, hook="activation")
    training = recipe.training()
    jobs = {
        "empty": Evaluate(phase="empty", model=model),
        "measure": Measure(phase="measure", model=model, taps=taps, classes=classes),
        "train": Train(phase="train", model=model, training=training, lr=training.lr),
    }
    seconds: dict[str, list[Any]] = {name: [] for name in jobs}
    lost: dict[str, list[Any]] = {name: [] for name in jobs}
    for repeat in range(-1, repeats):
        for name, job in jobs.items():
            began = time.monotonic()
            answers = Answers(engine, job)
            for _ in answers:
                pass
            if repeat >= 0:
                seconds[name].append(time.monotonic() - began)
                lost[name].append(len(answers.entry.refused))
    return {"seconds": seconds, "lost": lost}
