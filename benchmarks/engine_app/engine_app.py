"""The Flower app of ``python -m benchmarks.engines``: times rounds where the grid is."""

import json
import time
from pathlib import Path
from typing import Any

from fedunlearn.federation.ask import ask
from fedunlearn.federation.jobs import Engine, Job, Task
from fedunlearn.federation.tasks import Evaluate, Measure, Train
from fedunlearn.flower.app import recipe_images, recipe_model, recipe_of
from fedunlearn.flower.client import client_app
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.messages import Context, Grid, ServerApp
from fedunlearn.run.experiment import new_model
from fedunlearn.run.inputs import read_data
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
    training = recipe.training()
    tasks: dict[str, Task] = {
        "empty": Evaluate(),
        "measure": Measure(classes=len(images.classes)),
        "train": Train(training=training, lr=training.lr),
    }
    seconds: dict[str, list[Any]] = {name: [] for name in tasks}
    lost: dict[str, list[Any]] = {name: [] for name in tasks}
    for repeat in range(-1, repeats):
        for name, task in tasks.items():
            began = time.monotonic()
            _, entry = ask(engine, Job(task=task, model=model, phase=name), lambda replies: None)
            if repeat >= 0:
                seconds[name].append(time.monotonic() - began)
                lost[name].append(len(entry.refused))
    return {"seconds": seconds, "lost": lost}
