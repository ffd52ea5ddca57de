"""A recipe as a Flower app: what its server does, and what each of its clients holds."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

from pydantic import ValidationError
from torch import nn

from fedunlearn.checkpoint import read_weights
from fedunlearn.data.images import LabelledImages, Meaning
from fedunlearn.errors import RecipeError
from fedunlearn.federation.jobs import ClientData
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.messages import Context, Grid, ServerApp
from fedunlearn.run.experiment import Experiment, architecture_of, new_model
from fedunlearn.run.inputs import client_data
from fedunlearn.run.recipe import Recipe, check, load_recipe
from fedunlearn.training.compute import one_torch_thread

PREFIX = "fedunlearn: "  # of what the server says, among the lines of Flower's log
COMMANDS = ("train", "unlearn", "run")
PATIENCE = 60.0  # seconds that a server waits for its clients at the start


def recipe_of(context: Context) -> Recipe:
    """Return the recipe that the run configuration of a Flower app gives.

    ``recipe`` is the name of a shipped recipe, a TOML file, or a recipe as JSON; ``set`` holds overrides,
    ``table.key=value`` between spaces. A client finds its images at ``data`` of its node configuration where it has
    one.

    Raises:
        RecipeError: there is no such recipe, or a key or value is not valid.
    """
    config = context.run_config
    text = str(config.get("recipe", ""))
    if text.startswith("{"):
        try:
            recipe = Recipe.model_validate_json(text)
            check(recipe)
        except ValidationError as error:
            raise RecipeError(f"the run configuration holds no valid recipe: {error.errors()[0]['msg']}") from error
    else:
        recipe = load_recipe(text, str(config.get("set", "")).split())
    if "data" in context.node_config:
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"path": str(context.node_config["data"])})}
        )
    return recipe


def recipe_images(context: Context) -> ClientData:
    """Return what the client of the node's ``partition-id`` holds.

    Raises:
        FedUnlearnError: the recipe or the data cannot be used, or it has no such client.
    """
    return held_by(recipe_of(context), context)


def recipe_model(context: Context) -> nn.Module:
    """Return the recipe's architecture.

    Raises:
        RecipeError: the recipe names code of its own, which is not imported because a message says so.
    """
    recipe = recipe_of(context)
    if ":" in recipe.model.name:
        raise RecipeError(
            f"model.name is {recipe.model.name!r}: the app of a recipe builds shipped models only; "
            "give your own to client_app(build_model, load_images)"
        )
    return built_by(recipe, context)


def recipe_rules(context: Context) -> Privacy:
    """Return what this client does to its statistics before they leave it.

    The recipe comes from whoever submits the run; ``min-count``, ``clip`` and ``noise`` of the node configuration are
    the site's own, and the stricter of both counts. A site that says nothing has ``DEFAULT_RULES``.
    """
    asked, config = recipe_of(context).rules(), context.node_config
    clips = [clip for clip in (asked.clip, float(config.get("clip", 0.0))) if clip]
    return Privacy(
        max(asked.min_count, int(config.get("min-count", DEFAULT_RULES.min_count))),
        min(clips, default=0.0),
        max(asked.noise, float(config.get("noise", 0.0))),
        DEFAULT_RULES.min_images,
    )


def held_by(recipe: Recipe, context: Context) -> ClientData:
    """Return what the client of the node's ``partition-id`` holds by ``recipe``."""
    return _held(recipe.model_dump_json(), _number(context))[0]


def built_by(recipe: Recipe, context: Context) -> nn.Module:
    """Return the architecture of ``recipe`` for the images of this client, or that of the weights it starts from."""
    images = _held(recipe.model_dump_json(), _number(context))[1]
    if not recipe.model.weights:
        return new_model(recipe, images, seed=0).module
    return architecture_of(read_weights(Path(recipe.model.weights)), recipe, images).module


def _number(context: Context) -> int:
    try:
        return int(context.node_config["partition-id"])
    except (KeyError, ValueError) as error:
        raise RecipeError("the node configuration must say which client this is: partition-id=0, 1, ...") from error


@lru_cache(maxsize=2)
def _held(recipe: str, number: int) -> tuple[ClientData, LabelledImages]:
    """Return what a client holds and sees; kept, as a simulation answers many messages in one process."""
    return client_data(Recipe.model_validate_json(recipe), number)


def engine_on(
    grid: Grid, *, patience: float = PATIENCE, hello: float | None = None
) -> Callable[[Experiment], FlowerEngine]:
    """Return what makes the engine of a run whose clients are behind ``grid``.

    Args:
        grid: of the server.
        patience: seconds to wait for clients at the start.
        hello: seconds that a client may take to introduce itself; the recipe's deadline where None.
    """
    return lambda experiment: FlowerEngine(
        grid,
        clients=tuple(experiment.clients),
        deadline=experiment.recipe.federation.deadline,
        patience=patience,
        hello=experiment.recipe.federation.deadline if hello is None else hello,
        secure=experiment.recipe.privacy.secure,
        meaning=Meaning.of(experiment.splits.train),
    )


class _Marked(io.TextIOBase):
    """Standard output with ``PREFIX`` before each line."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            print(f"{PREFIX}{line}", flush=True)
        return len(text)


@contextmanager
def _warnings_to(output: IO[str]) -> Iterator[None]:
    """Write what this program warns of, such as who was refused, to ``output`` alone."""
    log = logging.getLogger("fedunlearn")
    before, log.handlers = log.handlers, [logging.StreamHandler(output)]
    try:
        yield
    finally:
        log.handlers = before


def server_app(recipe: Callable[[Context], Recipe] = recipe_of) -> ServerApp:
    """Return a complete Flower server: it does what ``command`` of the run configuration asks.

    ``command`` is ``train``, ``unlearn`` or ``run``, as for the command line; ``out`` the folder of the run on this
    machine, absolute; the same folder goes on where a run was cut off. ``key`` names the operator's private key;
    ``patience`` is for how many seconds clients are waited for at the start, 60 where it is not given.

    Args:
        recipe: finds the recipe of a run.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # Clients import this file too, in a new process for each message, and need none of these.
        from rich.console import Console

        from fedunlearn.console import RunProgress, describe, sharpness
        from fedunlearn.run.commands import run

        config = context.run_config
        command, out = str(config.get("command", "run")), Path(str(config.get("out", "")))
        if command not in COMMANDS:
            raise RecipeError(f"command of the run configuration must be one of {', '.join(COMMANDS)}, got {command!r}")
        if not out.is_absolute():
            raise RecipeError(f"out of the run configuration must be an absolute path on the server, got {str(out)!r}")
        key = str(config.get("key", ""))
        output = cast(IO[str], _Marked())
        console = Console(file=output, width=200)

        def described(experiment: Experiment) -> None:
            console.print(describe(experiment), highlight=False)
            if command == "run":
                console.print(sharpness(experiment), highlight=False)

        with one_torch_thread(), _warnings_to(output):
            run(
                recipe(context),
                out,
                command=command,
                key=Path(key) if key else None,
                engine=engine_on(grid, patience=float(config.get("patience", PATIENCE))),
                prepared=described,
                observe=RunProgress(console, every=True).observe,
            )

    return app
