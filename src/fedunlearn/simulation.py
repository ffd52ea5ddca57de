"""Flower's simulation: the clients of a recipe as workers of Ray on this machine."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fedunlearn.errors import FederationError
from fedunlearn.federation.flower_client import client_app
from fedunlearn.federation.grid import Context, Grid, Message, ServerApp
from fedunlearn.flower_app import built_by, held_by
from fedunlearn.recipe import Recipe
from fedunlearn.setting import read_data, share_out
from fedunlearn.threads import cores

START = 300.0  # seconds for Ray to start, which takes a minute on a busy machine
_STOP = 60.0


@contextmanager
def simulation(recipe: Recipe, *, start: float = START) -> Iterator[Grid]:
    """Give the grid of a simulation of the recipe's clients, one worker per core, while the context lasts.

    The simulation runs in a thread of its own, so that work on the grid stays in the caller's and Ctrl-C ends it.
    Whatever is asked of the grid after the simulation failed raises. Ray may still be starting when the grid is there.
    Neither Flower nor Ray sends usage statistics from here, unless the environment asks for it.

    Args:
        recipe: names data and clients.
        start: seconds to wait for the grid.

    Raises:
        FederationError: the simulation did not start, or failed in the middle.
    """
    for name, value in {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice of Ray
    logging.getLogger("flwr").setLevel(logging.ERROR)
    grids: queue.Queue[Grid | None] = queue.Queue()
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
        try:
            from flwr.simulation import run_simulation  # slow to import, and only needed here

            run_simulation(server, app, number, backend_config=options)
        except BaseException as error:
            failures.append(error)
        finally:
            grids.put(None)  # for who waits for a grid that does not come

    thread = threading.Thread(target=simulate, name="flower-simulation", daemon=True)
    thread.start()
    try:
        grid = grids.get(timeout=start)
        if grid is None:
            raise FederationError(f"Flower's simulation failed{_reason(failures)}")
        yield _Watched(grid, thread, failures)
    except queue.Empty:
        raise FederationError(f"Flower's simulation did not start within {start:g} s") from None
    finally:
        finished.set()
        thread.join(_STOP)


class _Watched(Grid):
    """The grid of a simulation, which would keep silent if that failed."""

    def __init__(self, grid: Grid, thread: threading.Thread, failures: list[BaseException]) -> None:
        self._grid = grid
        self._thread = thread
        self._failures = failures

    def _alive(self) -> Grid:
        if not self._thread.is_alive():
            raise FederationError(f"Flower's simulation failed{_reason(self._failures)}")
        return self._grid

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients' nodes."""
        return self._alive().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and return their ids."""
        return self._alive().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there."""
        return self._alive().pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their answers."""
        return self._alive().send_and_receive(messages, timeout=timeout)

    def create_message(self, *args: Any, **options: Any) -> Message:
        """Return a message."""
        return self._grid.create_message(*args, **options)

    def set_run(self, run: Any) -> None:
        """Set the run that messages are of."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run that messages are of."""
        return self._grid.run


def _reason(failures: list[BaseException]) -> str:
    """Return the first cause of what went wrong, if something did."""
    cause: BaseException | None = failures[0] if failures else None
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    return "" if cause is None else f": {type(cause).__name__}: {cause}"
