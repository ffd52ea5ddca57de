"""Start a run on a Flower deployment, follow it, and say how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedunlearn.errors import FederationError
from fedunlearn.evidence.folder import RESULT
from fedunlearn.flower_app import PATIENCE, PREFIX
from fedunlearn.recipe import ON_FLOWER, Recipe

_NAME = "fedunlearn"
_AGAIN = 3.0
_APP = """\
from fedunlearn.federation.flower_client import client_app
from fedunlearn.flower_app import recipe_images, recipe_model, recipe_rules, server_app

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


def run_on(
    superlink: str,
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    ca: Path | None,
    key: Path | None = None,
    patience: float = PATIENCE,
    tell: Callable[[str], object] = print,
) -> dict[str, Any] | None:
    """Have a Flower deployment do what ``command`` asks, and return the content of result.json.

    The app that is sent holds the recipe; the server's part runs where the SuperLink does, and writes ``out`` there.
    Ctrl-C stops the run; the same call goes on with it.

    Args:
        superlink: ``ADDRESS:PORT``.
        recipe: what to do.
        out: folder of the run, on the machine of the SuperLink.
        command: ``"train"``, ``"unlearn"`` or ``"run"``.
        ca: certificate of the authority that signed the SuperLink's; those the system trusts where None.
        key: the operator's private key, on the machine of the SuperLink.
        patience: seconds that the server's part waits for clients at the start; half of them must be there then.
        tell: shown each line that the server's part has to say.

    Returns:
        None where ``out`` is not on this machine.

    Raises:
        FederationError: the SuperLink cannot be reached, or the run failed there.
    """
    recipe = recipe.model_copy(update={"compute": ON_FLOWER})
    with tempfile.TemporaryDirectory(prefix="fedunlearn-") as name:
        home = Path(name)
        flwr = _Flwr(home, superlink, ca)
        number = flwr.start(_bundle(home / "app", recipe, out.absolute(), command, key, patience))
        tell(f"run {number} on {superlink}")
        try:
            while True:
                flwr.follow(number, tell)
                status, details = flwr.status(number)
                if status.startswith("finished"):
                    break
                time.sleep(_AGAIN)  # the log broke off, not the run
        except KeyboardInterrupt:
            flwr.call("stop", number, _NAME)
            raise
    if status != "finished:completed":
        reason = details.removeprefix("ServerApp failed with exception: ")
        raise FederationError(
            f"run {number} on {superlink} ended as {status}: {reason or 'no reason given'} "
            f"(its log: flwr log {number}); what was finished is kept, the same command goes on with it"
        )
    return _result(out / RESULT, recipe)


def _result(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the result of a run of ``recipe``, None where none of it is on this machine."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    # The server may have written a folder of the same name elsewhere, and this one be of another run.
    return result if Recipe.model_validate(result["recipe"]).digest() == recipe.digest() else None


def _bundle(folder: Path, recipe: Recipe, out: Path, command: str, key: Path | None, patience: float) -> Path:
    """Write the Flower app of the run."""
    value = recipe.model_dump(mode="json")
    for table, name in (("data", "path"), ("model", "weights")):
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

    def __init__(self, home: Path, superlink: str, ca: Path | None) -> None:
        self._superlink = superlink
        certificate = "" if ca is None else str(ca.absolute())
        if ca is not None and not ca.exists():
            raise FederationError(f"{ca}: there is no such certificate; give the one of the SuperLink's CA with --ca")
        text = _CONNECTION.format(name=_NAME, address=json.dumps(superlink), ca=json.dumps(certificate))
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
        done = subprocess.run(
            [self._command, *arguments, "--format", "json"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
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
