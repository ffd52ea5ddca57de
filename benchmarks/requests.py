"""More than one class on the digits: five requests in a row, several classes at once, a class that one client holds.

``python -m benchmarks.requests OUT`` does each with three seeds, beside three retrained models and by the settings of
the recipe, and writes benchmarks/requests.json; what is there is not done again. OUT keeps the
runs, which go on there: the next request in a row takes the model of the one before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fedunlearn.data.readers import read_digits
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe
from fedunlearn.seeding import generator

OUT = Path(__file__).parent / "requests.json"
SEEDS = (0, 1, 2)
IN_A_ROW = (9, 8, 7, 6, 5)
AT_ONCE = ((0, 9), (0, 5, 9), (1, 3, 5, 7, 9))
VARIANTS = {
    "": (),
    "erase step": ("erase.complement=1.0",),
    "fraction auto": ("unlearn.fraction=auto",),
    "erase step alone": ("erase.complement=1.0", "unlearn.fraction=0"),
    # At the same work; on validation images U of a class that one client holds is 0 to 8 %, R 99 to 100 %.
    "erase step alone, then plain": (
        *("erase.complement=1.0", "unlearn.fraction=0"),
        *("erase.until=0.5", "unlearn.rounds=4", "unlearn.local_epochs=0.5"),
    ),
    # Set on validation images of five classes at once: U 0 % with each seed, R 100 %.
    "erase step alone, short rounds": (
        *("erase.complement=1.0", "unlearn.fraction=0", "erase.until=0.75"),
        *("unlearn.rounds=20", "unlearn.local_epochs=0.1"),
        *("unlearn.schedule=one-cycle", "unlearn.lr=0.1", "unlearn.server_momentum=0.5"),
    ),
}
ROW_VARIANTS = ("", "erase step alone")
ONCE_VARIANTS = ("", "erase step", "fraction auto", "erase step alone", "erase step alone, short rounds")
ONE_VARIANTS = ("", "erase step", "fraction auto", "erase step alone", "erase step alone, then plain")
CLIENTS = 10
SETTINGS = ("audit.oracles=3", "compute.workers=1", "evidence.feature_maps=false")


def asked(name: str, seed: int, out: Path, *overrides: str) -> dict[str, Any]:
    """Run the digits with ``overrides`` and return the row of its figures."""
    result = run(load_recipe("digits", [*SETTINGS, f"federation.seed={seed}", *overrides]), out)
    accuracy = result["unlearned"]["accuracy"]
    return {
        "request": name,
        "seed": seed,
        "forget": [result["classes"][label] for label in result["forget"]],
        "before": result["original"]["accuracy"]["retain"],
        "forget_row_kept": accuracy["forget_row_kept"],
        "retain": accuracy["retain"],
        "retrained": fmean(oracle["accuracy"]["retain"] for oracle in result["oracles"].values()),
        "parameters": result["unlearned"]["parameters"],
        "verdict": result["verdict"],
    }


def write_held_by_one(path: Path) -> Path:
    """Write the digits such that client 0 holds every nine, and shares of the others like nine more clients."""
    train, test = read_digits()
    groups = torch.randint(CLIENTS, (len(train),), generator=generator(0, "groups"))
    groups[train.labels == 9] = 0
    arrays: dict[str, Any] = {"groups_train": groups.numpy()}
    for name, split in (("train", train), ("test", test)):
        arrays |= {f"x_{name}": split.images[:, 0].numpy(), f"y_{name}": split.labels.numpy()}
    np.savez(path, **arrays)
    return path


class Rows:
    """The rows of benchmarks/requests.json, and those that are missing."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = json.loads(OUT.read_text("utf-8")) if OUT.exists() else []

    def ask(self, name: str, variant: str, seed: int, place: Path, *overrides: str) -> None:
        """Run what has no row yet, and write its row."""
        name += f", {variant}" if variant else ""
        if any((row["request"], row["seed"]) == (name, seed) for row in self._rows):
            return
        self._rows.append(asked(name, seed, place, *overrides, *VARIANTS[variant]))
        OUT.write_text(json.dumps(self._rows, indent=1) + "\n", "utf-8")
        print(f"{name}, seed {seed}: done", flush=True)


def main(out: str) -> None:
    """Make all requests and write their figures."""
    folder, rows = Path(out), Rows()
    folder.mkdir(parents=True, exist_ok=True)
    one = write_held_by_one(folder / "one.npz")
    given = ("data.source=npz", f"data.path={json.dumps(str(one))}", "federation.partition=group")
    for seed in SEEDS:
        for variant in VARIANTS:
            mark = f"{'-'.join(('', *variant.replace(',', '').split()))}-seed{seed}"
            before: Path | None = None
            for number, label in enumerate(IN_A_ROW if variant in ROW_VARIANTS else (), 1):
                weights = () if before is None else (f"model.weights={json.dumps(str(before))}",)
                place = folder / f"row-{number}{mark}"
                rows.ask(f"{number} in a row", variant, seed, place, f"unlearn.forget={label}", *weights)
                before = place / "model.safetensors"
            for classes in AT_ONCE if variant in ONCE_VARIANTS else ():
                wanted = (f"unlearn.forget={list(classes)}", "unlearn.jointly=true")
                rows.ask(f"{len(classes)} at once", variant, seed, folder / f"once-{len(classes)}{mark}", *wanted)
            if variant in ONE_VARIANTS:
                rows.ask("held by one client", variant, seed, folder / f"one{mark}", "federation.clients=0", *given)


if __name__ == "__main__":
    main(*sys.argv[1:])
