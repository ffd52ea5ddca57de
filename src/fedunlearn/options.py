"""The options of the command line, each said once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from fedunlearn.errors import RecipeError
from fedunlearn.run.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person said: the value of each option of a command, its default where the command has no such option."""

    recipe: str
    out: Path | None = None
    data: str | None = None
    weights: str | None = None
    models: Path | None = None
    overrides: Sequence[str] | None = None
    precision: str | None = None
    engine: str | None = None
    superlink: str | None = None
    ca: Path | None = None
    key: Path | None = None
    model: Path | None = None
    oracle: Sequence[Path] | None = None
    original: Path | None = None
    client: str | None = None
    quiet: bool = False
    as_json: bool = False
    method: str | None = None
    methods: str = "all"
    seeds: int = 3
    tune: int = 0
    debug: bool = False

    def loaded_recipe(self) -> Recipe:
        """Return the recipe with all that options override."""
        named = {
            "data.path": self.data,
            "model.weights": self.weights,
            "audit.models": None if self.models is None else str(self.models),
            "federation.engine": self.engine,
            "compute.precision": self.precision,
            "unlearn.method": self.method,
        }
        given = {key: value for key, value in named.items() if value is not None}
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
        from fedunlearn.engines import known  # slow to import

        recipe = load_recipe(self.recipe, [*(self.overrides or ()), *overrides])
        if self.models and not recipe.model.weights:
            original = self.models / "original.safetensors"
            if not original.exists():
                raise RecipeError(
                    f"--models {self.models}: expected a folder with original.safetensors, that of a run or one of "
                    "models, and found none there: check the path, or name the original with --weights"
                )
            table = recipe.model.model_copy(update={"weights": str(original)})
            recipe = recipe.model_copy(update={"model": table})
        return known(recipe)


DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def option(name: str, kind: Any, help: str, *, flag: str = "", default: Any = None) -> Parameter:
    """Return an option as typer reads it."""
    about = typer.Option(flag or f"--{name}", help=help)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about])


def argument(name: str, kind: Any, help: str) -> Parameter:
    """Return an argument as typer reads it."""
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[kind, typer.Argument(help=help)])


RECIPE = "Name of a shipped recipe, or a TOML file."
# All options of the commands that work on a recipe; each command names those it takes.
OPTIONS = {
    parameter.name: parameter
    for parameter in (
        option("recipe", str, RECIPE, default=Parameter.empty),
        option(
            "out",
            Path | None,
            "Folder of the run, in runs/ by default; the same command goes on with it.",
        ),
        option("data", str | None, "Folder or file of the images; sets data.path."),
        option("weights", str | None, "The trained model, .safetensors, .npz, .pt, .pth or .th; sets model.weights."),
        option(
            "models",
            Path | None,
            "Folder of a run with the same data, training and request, or of its models alone: trains none, and takes "
            "its original unless --weights names another.",
        ),
        option("overrides", list[str] | None, "table.key=value overrides a key of the recipe.", flag="--set"),
        option(
            "precision", str | None, "float32 everywhere, bfloat16, or auto: what is faster; sets compute.precision."
        ),
        option("engine", str | None, "Who runs the clients: local, flower-simulation, flower; sets federation.engine."),
        option("superlink", str | None, "With --engine flower: ADDRESS:PORT of your SuperLink."),
        option("ca", Path | None, "With --superlink: the certificate that its HTTPS certificate is checked by."),
        option("key", Path | None, "Your private key (fedunlearn keygen): sign a dossier of the run."),
        option("oracle", list[Path] | None, "A model retrained without the class; at least three."),
        option(
            "original", Path | None, "The model before unlearning: the control that must fail, so that a pass counts."
        ),
        option("method", str | None, "How to forget (fedunlearn methods lists them); sets unlearn.method."),
        option("methods", str, "all, or names with commas between them.", default="all"),
        option("seeds", int, "How many seeds each method is done with.", default=3),
        option("tune", int, "Settings to try for each method, on validation images of one seed.", default=0),
        option("client", str | None, "Audit with this client's images alone."),
        option("quiet", bool, "Print nothing but errors.", default=False),
        option("as_json", bool, "Print the result as JSON on standard output.", flag="--json", default=False),
        Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption),
    )
}
WORK = ("out", "data", "overrides", "precision", "engine", "superlink", "ca")
SHOWN = ("quiet", "as_json", "debug")
