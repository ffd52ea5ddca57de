"""More than one class on the digits: five requests in a row, several classes at once, a class that one client holds.

``python -m benchmarks.requests OUT`` does each with three seeds, beside three retrained models and by the settings of
the recipe, and writes benchmarks/requests.json. OUT keeps the runs, which go on there.
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
VARIANTS = {"": (), "erase step": ("erase.complement=1.0",), "fraction auto": ("unlearn.fraction=auto",)}
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
        "retrained": fmean(own["accuracy"]["retain"] for own in result["oracles"].values()),
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


def main(out: str) -> None:
    """Make all requests and write their figures."""
    folder, rows = Path(out), []
    folder.mkdir(parents=True, exist_ok=True)
    one = write_held_by_one(folder / "one.npz")
    for seed in SEEDS:
        before: Path | None = None
        for number, label in enumerate(IN_A_ROW, 1):
            weights = () if before is None else (f"model.weights={json.dumps(str(before))}",)
            place = folder / f"row-{number}-seed{seed}"
            rows.append(asked(f"{number} in a row", seed, place, f"unlearn.forget={label}", *weights))
            before = place / "model.safetensors"
        given = ("data.source=npz", f"data.path={json.dumps(str(one))}", "federation.partition=group")
        for variant, overrides in VARIANTS.items():
            mark, text = (f"-{variant.split()[0]}", f", {variant}") if variant else ("", "")
            for classes in AT_ONCE:
                place = folder / f"once-{len(classes)}{mark}-seed{seed}"
                wanted = (f"unlearn.forget={list(classes)}", "unlearn.jointly=true")
                rows.append(asked(f"{len(classes)} at once{text}", seed, place, *wanted, *overrides))
            place = folder / f"one{mark}-seed{seed}"
            rows.append(asked(f"held by one client{text}", seed, place, "federation.clients=0", *given, *overrides))
        OUT.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        print(f"seed {seed}: done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
