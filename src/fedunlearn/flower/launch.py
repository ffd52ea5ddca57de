"""Start a run on a Flower deployment, follow it, and say how it ended.

``simulation`` runs the clients of a recipe as workers of Ray on this machine.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedunlearn.errors import FederationError
from fedunlearn.evidence.folder import RESULT
from fedunlearn.flower.app import PATIENCE, PREFIX, built_by, held_by
from fedunlearn.flower.client import client_app
from fedunlearn.flower.messages import Context, Grid, ServerApp
from fedunlearn.run.inputs import read_data, share_out
from fedunlearn.run.recipe import PATHS, Recipe
from fedunlearn.run.tables import ON_FLOWER
from fedunlearn.training.compute import cores

_NAME = "fedunlearn"
_AGAIN = 3.0

_APP = """\
from fedunlearn.flower.client import client_app
from fedunlearn.flower.app import recipe_images, recipe_model, recipe_rules, server_app

client = client_app(recipe_model, recipe_images, rules=recipe_rules, secure={secure})
server = server_app()
"""

_PROJECT = """\
[project]
name = "fedunlearn-run"
version = "1.0.0"
description = "Make a federated image classifier forget classes"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedunlearn"

[tool.flwr.app.components]
serverapp = "fedunlearn_run:server"
clientapp = "fedunlearn_run:client"

[tool.flwr.app.config]
recipe = {recipe}
command = {command}
out = {out}
key = {key}
patience = {patience}
"""
_CONNECTION = """\
[superlink]
default = "{name}"

[superlink.{name}]
address = {address}
root-certificates = {ca}
"""
START = 300.0  # seconds for Ray to start, which takes a minute on a busy machine
_STOP = 60.0
_CALL = 120.0  # seconds for one command of flwr: it asks, and does not wait for a run


@dataclass(frozen=True)
class SuperLink:
    """A Flower deployment.

    Attributes:
        address: ``ADDRESS:PORT``.
        ca: certificate of the authority that signed its HTTPS certificate; those the system trusts where None.
    """

    address: str
    ca: Path | None = None


def run_on(
    superlink: SuperLink,
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    key: Path | None = None,
    patience: float = PATIENCE,
    tell: Callable[[str], object] = print,
) -> dict[str, Any] | None:
    """Have a Flower deployment do what ``command`` asks, and return the content of result.json.

    The app that is sent holds the recipe; the server's part runs where the SuperLink does, and writes ``out`` there.
    Ctrl-C stops the run; the same call goes on with it.

    Args:
        superlink: the deployment.
        recipe: what to do.
        out: folder of the run, on the machine of the SuperLink.
        command: ``"train"``, ``"unlearn"`` or ``"run"``.
        key: the operator's private key, on the machine of the SuperLink.
        patience: seconds that the server's part waits for clients at the start; half of them must be there then.
        tell: shown each line that the server's part has to say.

    Returns:
        None where ``out`` is not on this machine.

    Raises:
        FederationError: the SuperLink cannot be reached or does not answer, or the run did not start or failed there.
    """
    recipe = recipe.model_copy(update={"compute": ON_FLOWER})
    with tempfile.TemporaryDirectory(prefix="fedunlearn-") as name:
        home = Path(name)
        flwr = _Flwr(home, superlink)
        number = flwr.start(_bundle(home / "app", recipe, out.absolute(), command, key, patience))
        tell(f"run {number} on {superlink.address}")
        began, followed = time.monotonic(), False
        try:
            while True:
                status, details = flwr.status(number)
                if followed and status.startswith("running"):  # about to end, or the log broke off and not the run
                    time.sleep(_AGAIN)
                    status, details = flwr.status(number)
                ended = status.startswith("finished")
                if status.startswith("running") or (ended and not followed):
                    flwr.follow(number, tell)
                    followed = True
                if ended:
                    break
                if not followed and time.monotonic() - began > START:
                    flwr.call("stop", number, _NAME)
                    raise FederationError(
                        f"run {number} on {superlink.address} was still {status} after {START:g} s, expected running: "
                        "see the SuperLink's log for why it starts no ServerApp, and run the command again"
                    )
                if not followed:  # it waits to start
                    time.sleep(_AGAIN)
        except KeyboardInterrupt:
            flwr.call("stop", number, _NAME)
            raise
    if status != "finished:completed":
        reason = details.removeprefix("ServerApp failed with exception: ")
        raise FederationError(
            f"run {number} on {superlink.address} ended as {status}: {reason or 'no reason given'} "
            f"(its log: flwr log {number}); what was finished is kept, the same command goes on with it"
        )
    return _result(out / RESULT, recipe)


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
    _hush()
    grids: queue.Queue[Grid | None] = queue.Queue()
    failures: list[BaseException] = []
    finished = threading.Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        finished.wait()

    number = len(share_out(recipe, read_data(recipe).train)[0])
    app = client_app(
        lambda context: built_by(recipe, context),
        lambda context: held_by(recipe, context),
        rules=lambda context: recipe.rules(),
        secure=recipe.privacy.secure,
    )

    def simulate() -> None:
        try:
            from flwr.simulation import run_simulation  # slow to import, and only needed here

            run_simulation(server, app, number, backend_config=_a_worker_per_core(number))
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
        yield cast(Grid, _Watched(grid, thread, failures))
    except queue.Empty:
        raise FederationError(f"Flower's simulation did not start within {start:g} s") from None
    finally:
        finished.set()
        thread.join(_STOP)


def _hush() -> None:
    """Send no usage statistics, unless the environment asks for it, and print no notices."""
    for name, value in {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice of Ray
    logging.getLogger("flwr").setLevel(logging.ERROR)


def _a_worker_per_core(clients: int) -> dict[str, Any]:
    """Return Ray's options."""
    return {
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
        "init_args": {
            "address": "local",
            "num_cpus": min(cores(), clients),
            "include_dashboard": False,
            "logging_level": logging.ERROR,
            "log_to_driver": False,
        },
    }


def _result(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the result of a run of ``recipe``, None where none of it is on this machine."""
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        # The server may have written a folder of the same name elsewhere, and this one be of another run.
        return result if Recipe.model_validate(result["recipe"]).digest() == recipe.digest() else None
    except (OSError, ValueError, KeyError, TypeError):  # or of another version
        return None


def _bundle(folder: Path, recipe: Recipe, out: Path, command: str, key: Path | None, patience: float) -> Path:
    """Write the Flower app of the run."""
    value = recipe.model_dump(mode="json")
    for table, name in PATHS:
        if value[table][name]:
            value[table][name] = str(Path(value[table][name]).absolute())
    texts = {
        "recipe": json.dumps(value),
        "command": command,
        "out": str(out),
        "key": "" if key is None else str(key.absolute()),
    }
    folder.mkdir()
    (folder / "fedunlearn_run.py").write_text(_APP.format(secure=recipe.privacy.secure))
    config = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    project = _PROJECT.format(**config, patience=float(patience))
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    return folder


class _Flwr:
    """The command ``flwr`` with a connection of its own; the user's configuration is left alone."""

    def __init__(self, home: Path, superlink: SuperLink) -> None:
        ca, self._superlink = superlink.ca, superlink.address
        certificate = "" if ca is None else str(ca.absolute())
        if ca is not None and not ca.exists():
            raise FederationError(f"{ca}: there is no such certificate; give the one of the SuperLink's CA with --ca")
        text = _CONNECTION.format(name=_NAME, address=json.dumps(superlink.address), ca=json.dumps(certificate))
        if ca is None:
            text = "".join(line for line in text.splitlines(keepends=True) if "root-certificates" not in line)
        (home / "config.toml").write_text(text, encoding="utf-8")
        self._command = str(Path(sys.executable).with_name("flwr"))
        self._environment = {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            **os.environ,
            "FLWR_HOME": str(home),
            "PYTHONUNBUFFERED": "1",
        }

    def call(self, *arguments: str) -> dict[str, Any]:
        """Return what a ``flwr`` command answers as JSON."""
        try:
            done = subprocess.run(
                [self._command, *arguments, "--format", "json"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_CALL,
            )
        except subprocess.TimeoutExpired as error:
            raise FederationError(
                f"flwr {arguments[0]} on {self._superlink} gave no answer within {_CALL:g} s: check that the SuperLink "
                "runs there and run the command again, which goes on with what is finished"
            ) from error
        try:
            value: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            value = {}
        if done.returncode or not value.get("success", True) or not value:
            said = str(value.get("error-message") or done.stdout + done.stderr).strip().splitlines()
            raise FederationError(
                f"flwr {arguments[0]} on {self._superlink} failed: {said[-1] if said else 'no reason given'}; "
                "check that the SuperLink runs there, and --ca"
            )
        return value

    def start(self, app: Path) -> str:
        """Start a run and return its number."""
        return str(self.call("run", str(app), _NAME)["run-id"])

    def follow(self, number: str, tell: Callable[[str], object]) -> None:
        """Show what the server's part says until the run ends."""
        with subprocess.Popen(
            [self._command, "log", number, _NAME, "--stream"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None  # it is a pipe
            for line in process.stdout:
                _, found, said = line.rstrip().partition(PREFIX)
                if found:
                    tell(said)

    def status(self, number: str) -> tuple[str, str]:
        """Return how a run ended, and why."""
        run = self.call("list", "--run-id", number, _NAME)["runs"][0]
        return str(run["status"]), str(run.get("status-details") or "")


class _Watched:
    """The grid of a simulation, which would keep silent if that failed."""

    def __init__(self, grid: Grid, thread: threading.Thread, failures: list[BaseException]) -> None:
        self._grid = grid
        self._thread = thread
        self._failures = failures

    def __getattr__(self, name: str) -> Any:
        """Return what the grid has by this name, while the simulation lives."""
        if not self._thread.is_alive():
            raise FederationError(f"Flower's simulation failed{_reason(self._failures)}")
        return getattr(self._grid, name)


def _reason(failures: list[BaseException]) -> str:
    """Return the first cause of what went wrong, if something did."""
    cause: BaseException | None = failures[0] if failures else None
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    return "" if cause is None else f": {type(cause).__name__}: {cause}"
