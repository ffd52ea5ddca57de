"""The command line: fedunlearn run | train | unlearn | evaluate | audit | report | keygen | verify | recipes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from fedunlearn.console import RunProgress, audit_table, describe, notes, result_table, verdict_line
from fedunlearn.errors import FedUnlearnError, PlanError, RecipeError
from fedunlearn.evidence import verify as verifier
from fedunlearn.evidence.folder import REPORT
from fedunlearn.evidence.keys import make_keys
from fedunlearn.run import commands
from fedunlearn.run.commands import audit_model
from fedunlearn.run.recipe import SHIPPED, Recipe, load_recipe
from fedunlearn.training.compute import one_torch_thread
from fedunlearn.version import __version__

app = typer.Typer(
    help="Make a federated image classifier forget classes, fast, and show that it did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeOption = Annotated[str, typer.Option("--recipe", help="Name of a shipped recipe, or a TOML file.")]
DataOption = Annotated[str | None, typer.Option("--data", help="Folder or file of the images; sets data.path.")]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help=".safetensors, .npz, .pt or .th; sets model.weights.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the run, runs/RECIPE by default; the same command goes on with it."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="table.key=value overrides a key of the recipe.")]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", help="Who runs the clients: local, flower-simulation, flower; sets federation.engine."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", help="float32 everywhere, bfloat16, or auto: what is faster; sets compute.precision."),
]
SuperLinkOption = Annotated[
    str | None, typer.Option("--superlink", help="With --engine flower: ADDRESS:PORT of your SuperLink.")
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", help="With --superlink: the certificate that its HTTPS certificate is checked by."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="Your private key (fedunlearn keygen): sign a dossier of the run.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Run the command line; a model named package.module:function may lie in the working directory."""
    sys.path.insert(0, str(Path.cwd()))
    app(prog_name="fedunlearn")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    out: OutOption = None,
    data: DataOption = None,
    weights: WeightsOption = None,
    overrides: SetOption = None,
    precision: PrecisionOption = None,
    engine: EngineOption = None,
    superlink: SuperLinkOption = None,
    ca: CaOption = None,
    quiet: QuietOption = False,
    key: KeyOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train or load a model, make it forget, audit it beside retrained models and controls, and report."""
    clients = Clients(engine, superlink, ca, precision)
    _do("run", recipe, out, data, weights, overrides, quiet, as_json, debug, clients, key=key)


@app.command()
def train(
    recipe: RecipeOption,
    out: OutOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    precision: PrecisionOption = None,
    engine: EngineOption = None,
    superlink: SuperLinkOption = None,
    ca: CaOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the original model by federated averaging."""
    clients = Clients(engine, superlink, ca, precision)
    _do("train", recipe, out, data, None, overrides, quiet, as_json, debug, clients)


@app.command()
def unlearn(
    recipe: RecipeOption,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="The trained model; sets model.weights. Trained first where none is given."),
    ] = None,
    out: OutOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    precision: PrecisionOption = None,
    engine: EngineOption = None,
    superlink: SuperLinkOption = None,
    ca: CaOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a model forget, without comparisons."""
    clients = Clients(engine, superlink, ca, precision)
    _do("unlearn", recipe, out, data, weights, overrides, quiet, as_json, debug, clients)


@app.command()
def evaluate(
    recipe: RecipeOption,
    weights: Annotated[str, typer.Option("--weights", help="The model; sets model.weights.")],
    data: DataOption = None,
    overrides: SetOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model, unlearned or not, on the test images."""
    with _told(debug):
        block = commands.evaluate_weights(load_recipe(recipe, _overrides(data, weights, overrides)))
        _show({"model": block}, quiet, as_json, block)


@app.command()
def audit(
    model: Annotated[Path, typer.Argument(help="Weights of the model: .safetensors, .npz, .pt or .th.")],
    recipe: RecipeOption,
    out: OutOption = None,
    data: DataOption = None,
    oracle: Annotated[
        list[Path] | None, typer.Option("--oracle", help="A model retrained without the class; at least three.")
    ] = None,
    client: Annotated[str | None, typer.Option("--client", help="Audit with this client's images alone.")] = None,
    overrides: SetOption = None,
    precision: PrecisionOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Audit a model that this or another tool made forget, beside retrained models."""
    with _told(debug):
        chosen = load_recipe(recipe, _overrides(data, None, overrides, precision=precision))
        folder = out or Path("runs") / f"{Path(recipe).stem}-audit"
        with _progress(quiet) as (console, observe):
            result = audit_model(
                chosen,
                folder,
                model=model,
                oracles=oracle or (),
                client=client,
                prepared=lambda setting: console.print(describe(setting), highlight=False),
                observe=observe,
            )
        if as_json:
            typer.echo(json.dumps(result, indent=2))
        elif not quiet:
            Console().print(audit_table(result))
            Console().print(verdict_line(result), highlight=False)
            console.print(f"report: {folder / REPORT}", soft_wrap=True, highlight=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of an audited run.")],
    debug: DebugOption = False,
) -> None:
    """Write report.html and report.md of a run again."""
    with _told(debug):
        from fedunlearn.evidence.report import write_report  # slow to import

        write_report(folder)
        typer.echo(folder / REPORT)


@app.command()
def keygen(
    out: Annotated[Path, typer.Option("--out", help="File of the private key; the public one is FILE.pub.")],
    debug: DebugOption = False,
) -> None:
    """Make the operator's keys, which sign and verify dossiers."""
    with _told(debug):
        make_keys(out)
        typer.echo(f"{out}: private, keep it\n{out}.pub: give it to those who verify")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder with dossier.json.")],
    key: Annotated[Path, typer.Option("--key", help="The operator's public key.")],
) -> None:
    """Check signature, files, event log, figures and dates of a dossier."""
    sys.exit(verifier.main([str(folder), "--key", str(key)]))


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    for name in SHIPPED:
        typer.echo(name)


@dataclass(frozen=True)
class Clients:
    """Where the clients are, for Flower's deployment with SuperLink and certificate of its CA, and how they compute."""

    engine: str | None
    superlink: str | None
    ca: Path | None
    precision: str | None


def _do(
    command: str,
    recipe: str,
    out: Path | None,
    data: str | None,
    weights: str | None,
    overrides: list[str] | None,
    quiet: bool,
    as_json: bool,
    debug: bool,
    clients: Clients,
    key: Path | None = None,
) -> None:
    with _told(debug):
        named = _overrides(data, weights, overrides, engine=clients.engine, precision=clients.precision)
        chosen = load_recipe(recipe, named)
        if (clients.superlink is not None) != (chosen.federation.engine == "flower"):
            raise RecipeError("the engine flower needs --superlink ADDRESS:PORT, and no other engine takes it")
        stem = Path(recipe).stem
        folder = out or Path("runs") / (stem if command == "run" else f"{stem}-{command}")
        with _progress(quiet) as (console, observe):
            result = _work(command, chosen, folder, key, clients, console, observe)
        if result is None:
            typer.echo(f"the run is finished; its files are in {folder.absolute()} where the SuperLink runs", err=True)
            return
        _show(result, quiet, as_json, result)
        if not quiet:
            for text in (f"report: {folder / REPORT}",) * (command == "run") + (f"files: {folder}",):
                console.print(text, soft_wrap=True, highlight=False)


def _work(
    command: str,
    recipe: Recipe,
    folder: Path,
    key: Path | None,
    clients: Clients,
    console: Console,
    observe: Callable[[str, int, int], None],
) -> dict[str, Any] | None:
    """Return the result of ``command``, whoever runs the clients; None where it lies elsewhere."""
    work = partial(
        commands.run,
        recipe,
        folder,
        command=command,
        key=key,
        prepared=lambda setting: console.print(describe(setting), highlight=False),
        observe=observe,
    )
    match recipe.federation.engine:
        case "flower-simulation":
            with _flower_installed():
                from fedunlearn.flower.app import engine_on
                from fedunlearn.flower.launch import START, simulation
            with simulation(recipe) as grid:
                # All clients are there from the start, and answer when Ray has started.
                return work(engine=engine_on(grid, patience=0.0, hello=START))
        case "flower":
            with _flower_installed():
                from fedunlearn.flower.launch import run_on
            assert clients.superlink is not None  # _do checked it
            tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
            return run_on(clients.superlink, recipe, folder, command=command, key=key, ca=clients.ca, tell=tell)
        case _:
            return work()


@contextmanager
def _flower_installed() -> Iterator[None]:
    """Turn a missing extra into an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise RecipeError(str(error)) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Console, Callable[[str, int, int], None]]]:
    """Give a console on standard error and what shows progress on it, while work goes on."""
    console = Console(stderr=True, quiet=quiet)
    handler = RichHandler(console=console, show_path=False)
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[handler])
    with one_torch_thread(), nullcontext() if quiet else RunProgress(console) as progress:
        yield console, _silent if progress is None else progress.observe


def _silent(phase: str, done: int, planned: int) -> None:
    """Show nothing."""


def _overrides(
    data: str | None,
    weights: str | None,
    more: list[str] | None,
    *,
    engine: str | None = None,
    precision: str | None = None,
) -> list[str]:
    named = {
        "data.path": data,
        "model.weights": weights,
        "federation.engine": engine,
        "compute.precision": precision,
    }
    return [
        *(more or []),
        *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value is not None),
    ]


def _show(result: dict[str, Any], quiet: bool, as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    elif not quiet:
        console = Console()
        console.print(result_table(result))
        console.print(notes(result), highlight=False)


@contextmanager
def _told(debug: bool) -> Iterator[None]:
    """Turn an error into one line on standard error and an exit code: 2 for usage, 1 for failure, 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted: the same command goes on from the last finished round", 130)
    except FedUnlearnError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, (RecipeError, PlanError)) else 1)
    except OSError as error:
        if debug:
            raise
        _fail(
            f"{error.filename or 'a file'}: {error.strerror or error}: what was finished is kept; "
            "mend this and run the same command again",
            1,
        )


def _fail(message: str, code: int) -> None:
    typer.echo(f"fedunlearn: {message}", err=True)
    sys.exit(code)
