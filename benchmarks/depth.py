"""How deep a method forgets against the work of its clients: ``python -m benchmarks.depth RECIPE --work DIR``.

Each method of ``METHODS`` for each number of epochs in ``EPOCHS``, audited beside the same retrained models, into
``benchmarks/depth/RECIPE.json``. What was done before is kept, in the file and in ``--work``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import MODELS, share_figures
from benchmarks.method_tables import FOLDER as COMPARED
from fedunlearn.evidence.comparison import COMPARISON
from fedunlearn.run.compare import Plan, compare
from fedunlearn.run.recipe import Recipe, load_recipe
from fedunlearn.training.compute import one_torch_thread

FOLDER = Path(__file__).parent / "depth"
METHODS = ("contrast", "erase", "erase_only")
EPOCHS = (0.1, 0.3, 0.6, 1.2, 2.0)
_MANY = 5  # rounds of which the number comes near the epochs
_COMMON = ("recipe", "forget", "retrained", "bands", "original")


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", default="", help="folder of the images, for a recipe that needs one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="clients at work side by side; as many as cores where 0")
    asked = parser.parse_args()
    settings = [f"compute.workers={asked.workers}", "compute.precision=float32", "audit.oracles=5"]
    settings += [f'data.path="{asked.data}"'] if asked.data else []
    models = MODELS / asked.recipe
    if models.exists():
        settings += [f'audit.models="{models}"', f'model.weights="{models / "original.safetensors"}"']
    with one_torch_thread():
        for seeds in range(1, asked.seeds + 1):  # all work with one seed first
            for epochs in EPOCHS:
                _measure(asked.recipe, settings, asked.work, epochs, seeds)


def _measure(name: str, settings: Sequence[str], work: Path, epochs: float, seeds: int) -> None:
    """Compare the methods with so many epochs of client work, and write what came of it."""
    shipped = load_recipe(name)
    repair = _repair(shipped, epochs)
    compared = COMPARED / f"{name}.json"
    if repair == shipped.unlearn.model_dump(include=set(repair)) and compared.exists():  # the recipe's shipped work
        value = json.loads(compared.read_text("utf-8"))
        value["cells"] = {cell: one for cell, one in value["cells"].items() if cell.rpartition("-")[0] in METHODS}
    else:
        out = work / f"{name}-{epochs:g}"
        share_figures((folder for folder in sorted(work.glob(f"{name}-*")) if (folder / COMPARISON).exists()), out)
        recipe = load_recipe(name, [*settings, *(f"unlearn.{key}={number}" for key, number in repair.items())])
        plan = Plan(METHODS, seeds=seeds)
        value = compare(recipe, out, plan, tell=lambda line: print(f"{epochs:g} {line}", flush=True))
    path = FOLDER / f"{name}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {"epochs": {}}
    common = {key: value[key] for key in _COMMON}
    common["recipe"]["data"]["path"] = common["recipe"]["model"]["weights"] = common["recipe"]["audit"]["models"] = ""
    known = common | {"epochs": known["epochs"] | {f"{epochs:g}": value["cells"]}}
    known["epochs"] = {key: known["epochs"][key] for key in sorted(known["epochs"], key=float)}
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


def _repair(recipe: Recipe, epochs: float) -> dict[str, float]:
    """Return the settings that give all clients together ``epochs`` passes over their images after pruning.

    Rounds are as long as the recipe's, but where only a few would fit.
    """
    unlearn, participation = recipe.unlearn, recipe.federation.participation
    rounds = max(1, round(epochs / unlearn.local_epochs / participation))
    length = unlearn.local_epochs if rounds >= _MANY else epochs / rounds / participation
    return {"rounds": rounds, "local_epochs": length}


if __name__ == "__main__":
    main()
