"""The paper's cells: python -m benchmarks.cells train|unlearn RECIPE --data DIR --work DIR.

``train`` makes the models of one recipe (``cifar10-resnet20`` and the like): an original, and models retrained without
the class, seeds 1 to ``--retrained``, each from fresh weights. Finished models are written into
``benchmarks/models/RECIPE`` with the rounds they took; a killed call goes on from its last finished round.

``unlearn`` takes these models and makes the original forget, audited beside the retrained ones, for each setting in
``SETTINGS`` and three seeds; results are written into ``benchmarks/cells``, or held against those that are there.
``--work`` holds what is not kept; another number of retrained models needs another one.

``--forget 0 9`` takes other classes than the recipe's, with the same original: their retrained models are in
``benchmarks/models/RECIPE-class0-9``, their results are named like that. ``--settings`` takes some of the settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors

from fedunlearn.audits.audit import FOLDER
from fedunlearn.evidence.folder import RESULT, RunFolder
from fedunlearn.federation.journal import Journal
from fedunlearn.run.commands import run
from fedunlearn.run.experiment import Experiment, new_model, original_model, prepare, save_model
from fedunlearn.run.inputs import fingerprint
from fedunlearn.run.kept import store
from fedunlearn.run.machine import processor
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.references import retrained_models
from fedunlearn.run.result import evaluate
from fedunlearn.training.compute import one_torch_thread

MODELS, CELLS = (Path(__file__).parent / name for name in ("models", "cells"))
LEVELS = "levels.json"
SEEDS = (0, 1, 2)
_PAPER = "tf_idf-paper"
_ERASE = ("unlearn.lr=0.03", "erase.complement=1", "erase.separation=0.1", "erase.until=0.3")
_AGAIN = (*_ERASE[:-1], "erase.every=6")
_DECAY = (*_AGAIN, "unlearn.weight_decay=0.005")
# Ours, ours with an erase step, the step with nothing pruned, at the start, again and again, so with ten times the
# weight decay, and that with a last quarter of plain repair; these two in half of the rounds, the last more often and
# with twice the decay, and in a quarter; the paper's ranking by the recipe's settings, and the paper's own: its hook
# and its share of channels.
SETTINGS = {
    "contrast": ("unlearn.criterion=contrast",),
    "erase": ("unlearn.criterion=contrast", *_ERASE),
    "erase-only": ("unlearn.fraction=0", *_ERASE),
    "erase-again": ("unlearn.fraction=0", *_AGAIN),
    "erase-again-decay": ("unlearn.fraction=0", *_DECAY),
    "erase-again-rest": ("unlearn.fraction=0", *_DECAY, "erase.until=0.75"),
    "erase-again-decay-half": ("unlearn.fraction=0", *_DECAY, "unlearn.rounds=111"),
    "erase-again-rest-half": ("unlearn.fraction=0", *_DECAY, "erase.until=0.75", "unlearn.rounds=111"),
    "erase-again-often-half": (
        "unlearn.fraction=0",
        *_AGAIN[:-1],
        "erase.every=4",
        "unlearn.weight_decay=0.01",
        "erase.until=0.75",
        "unlearn.rounds=111",
    ),
    "erase-again-rest-quarter": ("unlearn.fraction=0", *_DECAY, "erase.until=0.75", "unlearn.rounds=56"),
    "tf_idf": ("unlearn.criterion=tf_idf",),
    _PAPER: ("unlearn.criterion=tf_idf", "unlearn.hook=convolution"),
}
# Of one class alone: how much work the verdict takes.
LESS_WORK = (
    "erase-again-decay-half",
    "erase-again-rest-half",
    "erase-again-often-half",
    "erase-again-rest-quarter",
)
_FULL = tuple(name for name in SETTINGS if name not in LESS_WORK)
PAPER_FRACTION = {"cifar10-resnet20": 0.05, "cifar10-vgg11": 0.1, "cifar100-resnet20": 0.1, "cifar100-vgg11": 0.15}


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "unlearn"))
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--retrained", type=int, default=3)
    parser.add_argument("--forget", type=int, nargs="+", default=(), help="classes; the recipe's where not given")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=(), help="all of full work where not given")
    parser.add_argument("--precision", default="float32", help="of training and unlearning; audits are float32")
    parser.add_argument("--workers", type=int, default=0, help="clients at work side by side; as many as cores where 0")
    asked = parser.parse_args()
    settings = [f"compute.workers={asked.workers}", f'data.path="{asked.data}"']
    with one_torch_thread():
        classes = list(load_recipe(asked.recipe).unlearn.forget)
        forget = () if sorted(asked.forget) == classes else sorted({*asked.forget})
        settings.append(f"compute.precision={asked.precision}")
        if asked.step == "train":
            train(asked.recipe, settings, asked.work, asked.retrained, forget)
        else:
            settings.append(f"audit.oracles={asked.retrained}")
            known = [name for name in _FULL if name != _PAPER or asked.recipe in PAPER_FRACTION]
            if _PAPER in asked.settings and asked.recipe not in PAPER_FRACTION:
                parser.error(f"{_PAPER}: the paper gives no share of channels for {asked.recipe}")
            unlearn(asked.recipe, settings, asked.work, forget, names=asked.settings or known)


def cell_of(recipe: str, forget: Sequence[int]) -> str:
    """Return the name of a recipe's cell whose classes are ``forget``; that of the recipe where none are given."""
    return f"{recipe}-class{'-'.join(map(str, forget))}" if forget else recipe


def _forgetting(forget: Sequence[int]) -> list[str]:
    return [f"unlearn.forget={list(forget)}"] if forget else []


def train(recipe: str, settings: Sequence[str], work: Path, retrained: int, forget: Sequence[int]) -> None:
    """Train the models of ``recipe`` that are missing: the original, and those retrained without ``forget``."""
    experiment = prepare(load_recipe(recipe, [*settings, *_forgetting(forget)]))
    folder_of_cell = MODELS / cell_of(recipe, forget)
    for folder in (MODELS / recipe, folder_of_cell):
        folder.mkdir(parents=True, exist_ok=True)
        _check_recipe(experiment, folder / "recipe.json")
    _original(experiment, MODELS / recipe, work / f"{recipe}-models")
    if forget:
        shutil.copy(MODELS / recipe / "original.safetensors", folder_of_cell)  # one folder holds all that a run takes
    else:  # a level is of the recipe's own classes
        _level(experiment, folder_of_cell, "original")
    data = fingerprint(experiment.splits)
    for seed in range(1, retrained + 1):
        _retrained(experiment, folder_of_cell, work / f"{folder_of_cell.name}-models", seed=seed, data=data)
        _level(experiment, folder_of_cell, f"retrained-{seed}")


def _check_recipe(experiment: Experiment, path: Path) -> None:
    """Write what makes the models of a folder, or refuse to make others by another recipe beside them."""
    value = experiment.recipe.model_dump(mode="json", include={"data", "federation", "model", "train"})
    value["data"]["path"] = ""
    text = json.dumps(value, indent=1) + "\n"
    if path.exists() and path.read_text("utf-8") != text:
        raise SystemExit(f"{path}: the models there were made by another recipe; move them away to make others")
    path.write_text(text, "utf-8")


def unlearn(
    recipe: str, settings: Sequence[str], work: Path, forget: Sequence[int] = (), *, names: Sequence[str] = _FULL
) -> None:
    """Make the original of ``recipe`` forget, in every setting named and with every seed that is missing."""
    cell = cell_of(recipe, forget)
    original = MODELS / cell / "original.safetensors"
    models = [f'audit.models="{MODELS / cell}"', f'model.weights="{original}"', *_forgetting(forget)]
    for name in names:
        paper = [f"unlearn.fraction={PAPER_FRACTION[recipe]}"] if name == _PAPER else []
        for seed in SEEDS:
            path = CELLS / f"{cell}-{name}-seed{seed}.json"
            out = work / path.stem
            if (out / RESULT).exists() and path.exists():
                continue
            chosen = load_recipe(recipe, [*settings, *models, *SETTINGS[name], *paper, f"unlearn.seed={seed}"])
            shared = [work / f"{cell}-{name}-seed{seed}" for name in SETTINGS for seed in SEEDS]
            share_figures((folder for folder in shared if (folder / RESULT).exists()), out)
            result = run(chosen, out, observe=_observer(path.stem))
            figures = {model: file["figures"] for model, file in RunFolder.read(out).models.items()}
            result["recipe"]["data"]["path"] = result["recipe"]["model"]["weights"] = ""
            result["recipe"]["audit"]["models"] = ""
            CELLS.mkdir(exist_ok=True)
            if path.exists():
                _compare(path, figures)
            else:
                path.write_text(json.dumps(result | {"figures": figures, "made": _made()}, indent=1) + "\n")
            accuracy = result["unlearned"]["accuracy"]
            _say(
                path.stem,
                f"U {accuracy['forget_row_kept']:.4f}, R {accuracy['retain']:.4f}, "
                f"{result.get('speedup', {}).get('client_flops', 0):.1f}x, {result['verdict']}",
            )


def _made() -> dict[str, str]:
    """Return by which commit a file is made, on which processor and when."""
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")
    told = subprocess.run(git, capture_output=True, text=True, check=False)
    return {"commit": told.stdout.strip(), "processor": processor(), "date": f"{datetime.now(tz=UTC):%Y-%m-%d}"}


def _compare(path: Path, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Say how far figures are from those that are kept, and of which models none are."""
    kept = json.loads(path.read_text("utf-8"))["figures"]
    apart = {
        f"{figure} of {model}": abs(told["value"] - kept[model][figure]["value"])
        for model, theirs in figures.items()
        for figure, told in theirs.items()
        if figure in kept.get(model, {})
    }
    name, largest = max(apart.items(), key=lambda pair: pair[1])
    new = ", ".join(sorted(figures.keys() - kept.keys()))
    _say(
        path.stem,
        f"differs from the kept figures by {largest:.4f} at most ({name})" + (f"; not kept: {new}" if new else ""),
    )


def share_figures(done: Iterable[Path], out: Path) -> None:
    """Copy what the first of ``done`` measured of the models that all share; an audit takes it for these alone."""
    first = next(iter(done), None)
    if first is None or out.exists():
        return
    (out / FOLDER).mkdir(parents=True)
    for path in (first / FOLDER).glob("*.json"):
        if path.stem in ("original", "head_only") or path.stem.startswith("retrained"):
            shutil.copy(path, out / FOLDER)


def _original(experiment: Experiment, folder: Path, work: Path) -> None:
    path = folder / "original.safetensors"
    if path.exists():
        return
    fed = experiment.federation(Journal(work / "original", observe=_observer("original")))
    model = original_model(experiment, fed)
    save_model(path, model, experiment)


def _retrained(experiment: Experiment, folder: Path, work: Path, *, seed: int, data: str) -> None:
    name = f"retrained-{seed}"
    path = folder / f"{name}.safetensors"
    if path.exists():
        return
    fed = replace(experiment.federation(Journal(work / name, observe=_observer(name))), seed=seed - 1)
    (oracle,) = retrained_models(experiment, fed, data=data, count=1).values()
    store(path, oracle.model.module, oracle.steps)


def _level(experiment: Experiment, folder: Path, name: str) -> None:
    """Write how good a kept model is on test images into levels.json."""
    path = folder / LEVELS
    levels = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if name in levels:
        return
    model = new_model(experiment.recipe, experiment.splits.train, seed=0)
    with safetensors.safe_open(folder / f"{name}.safetensors", "pt") as file:
        model.module.load_state_dict({tensor: file.get_tensor(tensor) for tensor in file.keys()})  # noqa: SIM118
    if name != "original":
        model = model.without_rows(experiment.forget)
    accuracy = evaluate(model, experiment.splits.test, forget=experiment.forget)["accuracy"]
    levels[name] = {"forget": accuracy["forget_row_kept"], "retain": accuracy["retain"]}
    levels[name]["precision"] = experiment.recipe.compute.precision  # of its training: machines differ in what is fast
    path.write_text(json.dumps(levels, indent=1) + "\n")
    _say(name, str(levels[name]))


def _observer(name: str) -> Callable[[str, int, int], None]:
    def observe(phase: str, done: int, planned: int) -> None:
        if done % 10 == 0 or phase in ("audit", "evaluate"):  # a model a step, minutes each
            _say(name, f"{phase} {done} of {planned}")

    return observe


def _say(name: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)


if __name__ == "__main__":
    main()
