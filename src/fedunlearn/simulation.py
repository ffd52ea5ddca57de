"""Flower's simulation: the clients of a recipe as workers of Ray on this machine."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedunlearn.errors import FederationError
from fedunlearn.federation.flower_client import client_app
from fedunlearn.federation.grid import Context, Grid, ServerApp
from fedunlearn.flower_app import built_by, held_by
from fedunlearn.recipe import Recipe
from fedunlearn.setting import read_data, share_out
from fedunlearn.threads import cores

_STOP = 60.0
_START = 300.0  # seconds for Ray to start, which takes a minute on a busy machine


@contextmanager
def simulation(recipe: Recipe) -> Iterator[Grid]:
    """Give the grid of a simulation of the recipe's clients, one worker per core, while the context lasts.

    The simulation runs in a thread of its own, so that work on the grid stays in the caller's and Ctrl-C ends it.
    Neither Flower nor Ray sends usage statistics from here, unless the environment asks for it.

    Raises:
        FederationError: the simulation did not start, or failed in the middle.
    """
    for name, value in {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice of Ray
    logging.getLogger("flwr").setLevel(logging.ERROR)
    grids: queue.Queue[Grid] = queue.Queue()
    failures: list[BaseException] = []
    finished = threading.Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        finished.wait()

    number = len(share_out(recipe, read_data(recipe).train)[0])
    options: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
        "init_args": {
            "address": "local",
            "num_cpus": min(cores(), number),
            "include_dashboard": False,
            "logging_level": logging.ERROR,
            "log_to_driver": False,
        },
    }
    app = client_app(
        lambda context: built_by(recipe, context),
        lambda context: held_by(recipe, context),
        rules=lambda context: recipe.rules(),
        secure=recipe.privacy.secure,
    )

    def simulate() -> None:
        from flwr.simulation import run_simulation  # slow to import, and only needed here

        try:
            run_simulation(server, app, number, backend_config=options)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=simulate, name="flower-simulation", daemon=True)
    thread.start()
    try:
        yield grids.get(timeout=_START)
    except queue.Empty:
        raise FederationError(f"Flower's simulation did not start within {_START:g} s{_reason(failures)}") from None
    except FederationError as error:
        if failures:  # which is why nobody answers
            raise FederationError(f"Flower's simulation failed{_reason(failures)}") from error
        raise
    finally:
        finished.set()
        thread.join(_STOP)


def _reason(failures: list[BaseException]) -> str:
    """Return the first cause of what went wrong, if something did."""
    cause: BaseException | None = failures[0] if failures else None
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    return "" if cause is None else f": {type(cause).__name__}: {cause}"
