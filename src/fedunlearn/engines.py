"""Who runs the clients of a recipe: one function an engine, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedunlearn.errors import RecipeError
from fedunlearn.federation.jobs import Engine
from fedunlearn.run.commands import run
from fedunlearn.run.compare import Plan, compare
from fedunlearn.run.experiment import Experiment
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.work import Observe


@dataclass(frozen=True, kw_only=True)
class Order:
    """A command to carry out.

    Attributes:
        recipe: what to do.
        out: folder of the run.
        command: ``"train"``, ``"unlearn"`` or ``"run"``.
        key: the operator's private key, or None.
        superlink: ``ADDRESS:PORT`` of a Flower deployment, or None.
        ca: certificate of the authority that signed the SuperLink's, or None.
        prepared: called once data, clients and model are there.
        observe: told of each step.
        tell: shown each line that a server elsewhere has to say.
        compared: where set, compares these methods in the place of ``command``.
    """

    recipe: Recipe
    out: Path
    command: str = "run"
    key: Path | None = None
    superlink: str | None = None
    ca: Path | None = None
    prepared: Callable[[Experiment], None] = lambda experiment: None
    observe: Observe = lambda phase, done, planned: None
    tell: Callable[[str], object] = print
    compared: Plan | None = None


def known(recipe: Recipe) -> Recipe:
    """Return ``recipe``; refuse one whose engine is not in the table.

    Raises:
        RecipeError: there is no such engine.
    """
    name = recipe.federation.engine
    if name not in ENGINES:
        raise RecipeError(f"federation.engine must be one of {', '.join(ENGINES)}, got {name!r}")
    return recipe


def carry_out(order: Order) -> dict[str, Any] | None:
    """Do what ``order`` says on the engine of its recipe and return the content of result.json.

    Returns:
        None where the folder of the run is on another machine.

    Raises:
        RecipeError: there is no such engine, it is not installed, or it needs what the order lacks.
        FedUnlearnError: something cannot be used; what was finished stays in the folder.
    """
    name = known(order.recipe).federation.engine
    if order.compared is not None and name == "flower":
        raise RecipeError("compare runs its clients in this process, or with --engine flower-simulation")
    if (order.superlink is not None) != (name == "flower"):
        raise RecipeError("the engine flower needs --superlink ADDRESS:PORT, and no other engine takes it")
    if order.ca is not None and name != "flower":
        raise RecipeError("--ca is the authority of a SuperLink, and this engine has none: leave it out")
    return ENGINES[name](order)


def local(order: Order) -> dict[str, Any]:
    """Run the clients in this process."""
    return _here(order)


def flower_simulation(order: Order) -> dict[str, Any]:
    """Run the clients as workers of Flower's simulation on this machine."""
    try:
        from fedunlearn.flower.app import engine_on
        from fedunlearn.flower.launch import simulation
    except ImportError as error:  # says what to install
        raise RecipeError(str(error)) from error
    with simulation(order.recipe) as grid:
        return _here(order, engine_on(grid))


def flower(order: Order) -> dict[str, Any] | None:
    """Have a Flower deployment run server and clients."""
    try:
        from fedunlearn.flower.launch import SuperLink, run_on
    except ImportError as error:
        raise RecipeError(str(error)) from error
    assert order.superlink is not None  # carry_out checked it
    return run_on(
        SuperLink(order.superlink, order.ca),
        order.recipe,
        order.out,
        command=order.command,
        key=order.key,
        tell=order.tell,
    )


ENGINES: dict[str, Callable[[Order], dict[str, Any] | None]] = {
    "local": local,
    "flower-simulation": flower_simulation,
    "flower": flower,
}


def _here(order: Order, engine: Callable[[Experiment], Engine] | None = None) -> dict[str, Any]:
    if order.compared is not None:
        return compare(
            order.recipe,
            order.out,
            order.compared,
            engine=engine,
            prepared=order.prepared,
            observe=order.observe,
            tell=order.tell,
        )
    return run(
        order.recipe,
        order.out,
        command=order.command,
        key=order.key,
        engine=engine,
        prepared=order.prepared,
        observe=order.observe,
    )
