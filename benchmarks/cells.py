"""The models of the paper's cells: python -m benchmarks.cells RECIPE --data DIR --work DIR trains what is missing.

For one recipe (``cifar10-resnet20`` and the like): an original and models retrained without the class, seeds 1 to
``--retrained``, each from fresh weights by the recipe. Finished models are written into ``benchmarks/models/RECIPE``
with the rounds they took; a killed call goes on from its last finished round. ``--work`` holds what is not kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedunlearn.federation.journal import Journal
from fedunlearn.run.compare import RetrainedCache, retrained_models
from fedunlearn.run.experiment import Experiment, fingerprint, original_model, prepare, save_model
from fedunlearn.run.recipe import load_recipe, portable_recipe
from fedunlearn.run.result import evaluate
from fedunlearn.training.compute import one_torch_thread

MODELS = Path(__file__).parent / "models"


def main() -> None:
    """Train what is missing and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--retrained", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="clients at work side by side; as many as cores where 0")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    asked = parser.parse_args()
    settings = ["compute.precision=float32", f"compute.workers={asked.workers}", f'data.path="{asked.data}"']
    experiment = prepare(load_recipe(asked.recipe, [*asked.overrides, *settings]))
    folder = MODELS / asked.recipe
    folder.mkdir(parents=True, exist_ok=True)
    recipe = portable_recipe(experiment.recipe, folder) | {"compute": {"precision": "float32"}}
    recipe["data"]["path"] = ""
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    with one_torch_thread():
        _original(experiment, folder, asked.work)
        data = fingerprint(experiment.splits)
        for seed in range(1, asked.retrained + 1):
            _retrained(experiment, folder, asked.work, seed=seed, data=data)


def _original(experiment: Experiment, folder: Path, work: Path) -> None:
    path = folder / "original.safetensors"
    if path.exists():
        return
    fed = experiment.federation(Journal(work / "original", observe=_observer("original")))
    model = original_model(experiment, fed)
    save_model(path, model, experiment)
    figures = evaluate(model, experiment.splits.test, forget=experiment.forget)["accuracy"]
    _say("original", f"U {figures['forget']:.4f}, R {figures['retain']:.4f}")


def _retrained(experiment: Experiment, folder: Path, work: Path, *, seed: int, data: str) -> None:
    name = f"retrained-{seed}"
    path = folder / f"{name}.safetensors"
    if path.exists():
        return
    fed = replace(experiment.federation(Journal(work / name, observe=_observer(name))), seed=seed - 1)
    (oracle,) = retrained_models(experiment, fed, data=data, count=1).values()
    RetrainedCache(path).store(oracle.model.module, oracle.steps)
    kept = oracle.model.without_rows(experiment.forget)
    figures = evaluate(kept, experiment.splits.test, forget=experiment.forget)["accuracy"]
    seen = [step.validation for step in oracle.steps if step.validation is not None]
    _say(name, f"R {figures['retain']:.4f}, on validation images {seen[-1] if seen else '-'}")


def _observer(name: str) -> Callable[[str, int, int], None]:
    return lambda phase, done, planned: _say(name, f"{phase} {done} of {planned}") if done % 10 == 0 else None


def _say(name: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)


if __name__ == "__main__":
    main()
