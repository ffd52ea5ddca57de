"""The command line, a function for each command: from ``run`` and ``compare`` to ``verify``."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from fedunlearn.checkpoint import read_weights
from fedunlearn.console import (
    RunProgress,
    audit_table,
    comparison_notes,
    comparison_table,
    describe,
    expected,
    methods_table,
    notes,
    print_table,
    result_table,
    sharpness,
    verdict_line,
)
from fedunlearn.errors import FedUnlearnError, PlanError, RecipeError
from fedunlearn.evidence import verify as verifier
from fedunlearn.evidence.folder import REPORT, RESULT, RunFolder
from fedunlearn.evidence.keys import make_keys, read_private_key
from fedunlearn.evidence.words import unable_of
from fedunlearn.options import OPTIONS, RECIPE, SHOWN, WORK, DebugOption, Options, argument, option
from fedunlearn.run.experiment import Experiment
from fedunlearn.run.recipe import SHIPPED
from fedunlearn.training.compute import one_torch_thread
from fedunlearn.version import __version__

_ALL = "all"  # of --methods

app = typer.Typer(
    help="Make a federated image classifier forget classes, fast, and show what became of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _command(*names: str | Parameter) -> Callable[[Callable[[Options], None]], Callable[[Options], None]]:
    """Register a function of ``Options`` as the command of its name, with these options and arguments."""
    parameters = [name if isinstance(name, Parameter) else OPTIONS[name] for name in names]

    def register(function: Callable[[Options], None]) -> Callable[[Options], None]:
        def call(**values: Any) -> None:
            options = Options(**values)
            with _told(options.debug):
                function(options)

        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(function.__name__, help=function.__doc__)(call)
        return function

    return register


def main() -> None:
    """Run the command line."""
    app(prog_name="fedunlearn")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@_command(argument("recipe", str, RECIPE), *WORK, "weights", "models", "method", "key", *SHOWN)
def run(options: Options) -> None:
    """Train or load a model, make it forget, audit it beside retrained models and controls, and report."""
    _work("run", options)


@_command("recipe", *WORK, *SHOWN)
def train(options: Options) -> None:
    """Train the original model by federated averaging."""
    _work("train", options)


@_command("recipe", *WORK, "weights", "method", "key", *SHOWN)
def unlearn(options: Options) -> None:
    """Make a model forget, without comparisons; it is trained first where --weights names none."""
    _work("unlearn", options)


@_command(
    argument("recipe", str, RECIPE),
    *("methods", "seeds", "tune", "out", "data", "overrides", "precision", "weights", "models", *SHOWN),
    option("engine", str | None, "Who runs the clients: local or flower-simulation; sets federation.engine."),
)
def compare(options: Options) -> None:
    """Make a model forget by many methods, on the same clients, and audit each by the same bands."""
    from fedunlearn.engines import Order, carry_out  # slow to import
    from fedunlearn.run.compare import Plan

    given = [name.strip() for name in options.methods.split(",") if name.strip()]
    plan = Plan(tuple(name for name in given if name != _ALL), options.seeds, options.tune)
    plan, recipe = replace(plan, methods=()) if _ALL in given else plan, options.loaded_recipe()
    folder = options.out or Path("runs") / f"{Path(options.recipe).stem}-compare"
    with _progress(options.quiet) as (console, observe):
        result = carry_out(
            Order(
                recipe=recipe,
                out=folder,
                prepared=lambda experiment: console.print(
                    f"{describe(experiment)}\n{sharpness(experiment)}", highlight=False
                ),
                observe=observe,
                tell=partial(console.print, highlight=False, markup=False, soft_wrap=True),
                compared=plan,
            )
        )
    assert result is not None  # it was made in this process
    _show(options, result, comparison_table(result), comparison_notes(result))
    if not options.as_json:
        console.print(f"report: {folder / REPORT}", soft_wrap=True, highlight=False, markup=False)
    if result["failed"]:
        _fail(f"{len(result['failed'])} cells failed, the first: {next(iter(result['failed'].values()))}", 1)


@app.command()
def methods() -> None:
    """List the methods: what each asks of the clients, its settings, its source."""
    from fedunlearn.methods.table import COMPARED  # slow to import

    print_table(Console(), methods_table(COMPARED.values()))


@_command("recipe", OPTIONS["weights"].replace(default=Parameter.empty), "data", "overrides", *SHOWN)
def evaluate(options: Options) -> None:
    """Measure a model, unlearned or not, on the test images."""
    from fedunlearn.run.commands import evaluate_weights  # slow to import

    recipe = options.loaded_recipe()
    with _progress(options.quiet) as (console, observe):
        observe("evaluate", 0, 1)
        block = evaluate_weights(recipe, tell=partial(console.print, highlight=False, markup=False))
        observe("evaluate", 1, 1)
    _show(options, block, result_table({"model": block}), notes({"model": block}))


@_command(
    "recipe",
    OPTIONS["weights"].replace(default=Parameter.empty),
    option("out", Path, "The file to write, which ends in .onnx.", default=Parameter.empty),
    "data",
    "overrides",
    "quiet",
    "debug",
)
def export(options: Options) -> None:
    """Write a model as ONNX, unlearned or not, after onnxruntime gave the logits that torch gives."""
    from fedunlearn.run.commands import export_weights  # slow to import

    assert options.out is not None  # an option that the command requires
    with _progress(options.quiet) as (console, _):
        tell = partial(console.print, highlight=False, markup=False)
        apart = export_weights(options.loaded_recipe(), options.out, tell=tell)
    if not options.quiet:
        typer.echo(f"{options.out}: by onnxruntime its logits are those of torch to {apart:.0e} of the largest")


@_command(
    argument("model", Path, "Weights of the model: .safetensors, .npz, .pt, .pth or .th."),
    *("recipe", "out", "data", "oracle", "original", "client", "overrides", "precision", "key", *SHOWN),
)
def audit(options: Options) -> None:
    """Audit a model that this or another tool made forget, beside retrained models."""
    from fedunlearn.run.audit_file import Candidate, audit_model  # slow to import
    from fedunlearn.run.estimate import seconds_to_train

    assert options.model is not None  # an argument of the command
    folder = options.out or Path("runs") / f"{Path(options.recipe).stem}-audit"
    recipe = options.loaded_recipe()
    weights = read_weights(options.model)
    with _progress(options.quiet) as (console, observe):

        def described(experiment: Experiment) -> None:
            console.print(describe(experiment, weights), highlight=False)
            made = not options.quiet and not options.oracle and not (folder / RESULT).exists()
            made = made and experiment.recipe.audit.oracles > 0 and not experiment.recipe.audit.models
            seconds = seconds_to_train(experiment, "audit") if made else None
            if seconds is not None:
                console.print(expected(seconds, experiment.recipe, "audit"), highlight=False)
            sharp = sharpness(experiment, given=len(options.oracle or ()), client=options.client)
            console.print(sharp, highlight=False)
            if options.original is None:
                console.print("without --original, the model before, no verdict can be a pass", highlight=False)

        result = audit_model(
            recipe,
            folder,
            Candidate(
                model=options.model,
                oracles=options.oracle or (),
                original=options.original,
                client=options.client,
            ),
            key=options.key,
            prepared=described,
            observe=observe,
        )
    cannot = unable_of(RunFolder.read(folder))
    _show(options, result, audit_table(result, cannot), verdict_line(result, cannot))
    if not options.as_json:
        console.print(f"report: {folder / REPORT}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Folder of pictures (a folder per class), or an .npz.")],
    forget: Annotated[str, typer.Option("--forget", help="Name or number of the class to forget.")],
    out: Annotated[Path, typer.Option("--out", help="Where recipe.toml and my_model.py go.")] = Path(),
    debug: DebugOption = False,
) -> None:
    """Write a recipe for your images and a model to replace by yours."""
    with _told(debug):
        from fedunlearn.run.starter import write_starter  # slow to import

        recipe, images = write_starter(data, forget, out)
        typer.echo(f"{len(images)} images to train on in {len(images.classes)} classes: {', '.join(images.classes)}")
        typer.echo(f"wrote {recipe} and {recipe.with_name('my_model.py')}")
        typer.echo(f"next: cd {shlex.quote(str(out))} && fedunlearn run {recipe.name}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of an audited run, or of a comparison.")],
    debug: DebugOption = False,
) -> None:
    """Write report.html and report.md of a run again, or report.html of a comparison."""
    with _told(debug):
        from fedunlearn.evidence.comparison import COMPARISON, write_comparison  # slow to import
        from fedunlearn.evidence.report import write_report

        (write_comparison if (folder / COMPARISON).exists() else write_report)(folder)
        typer.echo(folder / REPORT)


@app.command()
def keygen(
    out: Annotated[Path, typer.Option("--out", help="File of the private key; the public one is FILE.pub.")],
    debug: DebugOption = False,
) -> None:
    """Make the operator's keys, which sign and verify dossiers."""
    with _told(debug):
        digest = verifier.fingerprint(make_keys(out))
        typer.echo(f"{out}: private, keep it\n{out}.pub: give it to those who verify")
        typer.echo(f"fingerprint, to tell them by another way: {digest}")


@app.command()
def acknowledge(
    folder: Annotated[Path, typer.Argument(help="Folder of an audited run.")],
    client: Annotated[list[str], typer.Option("--client", help="Id of a client; may be given several times.")],
    key: Annotated[Path, typer.Option("--key", help="Your private key: the folder is signed again.")],
    debug: DebugOption = False,
) -> None:
    """Record that clients confirmed to have deleted their images of the class, and sign the run again."""
    with _told(debug):
        from fedunlearn.evidence import dossier  # slow to import

        before = (folder / verifier.DOSSIER).exists()
        dossier.acknowledge(folder, client, read_private_key(key, outside=folder))
        typer.echo(f"{folder}: recorded and signed{' again' if before else ', which it was not before'}")


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


def _work(command: str, options: Options) -> None:
    """Do ``command`` and show what came of it."""
    from fedunlearn.engines import Order, carry_out  # slow to import
    from fedunlearn.run.estimate import seconds_to_train

    recipe = options.loaded_recipe()
    stem = Path(options.recipe).stem
    folder = options.out or Path("runs") / (stem if command == "run" else f"{stem}-{command}")
    with _progress(options.quiet) as (console, observe):

        def described(experiment: Experiment) -> None:
            console.print(describe(experiment), highlight=False)
            told = options.quiet or (folder / RESULT).exists()
            seconds = None if told else seconds_to_train(experiment, command)
            if seconds is not None:
                console.print(expected(seconds, experiment.recipe, command), highlight=False)
            if command == "run" and not told:
                console.print(sharpness(experiment), highlight=False)

        result = carry_out(
            Order(
                command=command,
                recipe=recipe,
                out=folder,
                key=options.key,
                superlink=options.superlink,
                ca=options.ca,
                prepared=described,
                observe=observe,
                tell=partial(console.print, highlight=False, markup=False, soft_wrap=True),
            )
        )
    if result is None:
        typer.echo(f"the run is finished; its files are in {folder.absolute()} where the SuperLink runs", err=True)
        return
    _show(options, result, result_table(result), notes(result, unable_of(RunFolder.read(folder))))
    if not options.quiet:
        for text in (f"report: {folder / REPORT}",) * (command == "run") + (f"files: {folder}",):
            console.print(text, soft_wrap=True, highlight=False, markup=False)


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


def _show(options: Options, value: dict[str, Any], table: Table, *said: str) -> None:
    """Print a result: as JSON where that is asked for, else as a table and what is said below it."""
    if options.as_json:
        typer.echo(json.dumps(value, indent=2))
    elif not options.quiet:
        console = Console()
        print_table(console, table)
        for text in filter(None, said):
            console.print(text, highlight=False)


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
        elsewhere = isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError))
        mend = (
            "give a place that is there and can be written"
            if elsewhere
            else "what was finished is kept; mend this and run the same command again"
        )
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}: {mend}", 1)


def _fail(message: str, code: int) -> None:
    typer.echo(f"fedunlearn: {message}", err=True)
    sys.exit(code)
