"""What bfloat16 changes: python -m benchmarks.precision runs digits in both precisions and writes precision.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedunlearn.federation.journal import Journal
from fedunlearn.run.experiment import original_model, prepare
from fedunlearn.run.forgetting import unlearned_model
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.result import evaluate
from fedunlearn.training.compute import one_torch_thread

SEEDS = (0, 1, 2)
_OUT = Path(__file__).with_suffix(".json")


def main() -> None:
    """Train and unlearn with each seed in each precision and write the rows."""
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        for precision in ("float32", "bfloat16"):
            experiment = prepare(load_recipe("digits", (f"federation.seed={seed}", f"compute.precision={precision}")))
            test, forget = experiment.splits.test, experiment.forget
            with one_torch_thread():
                original = original_model(experiment, experiment.federation(Journal()))
                unlearned = unlearned_model(experiment, original, experiment.federation(Journal()))
            before = evaluate(original, test, forget=forget)["accuracy"]
            after = evaluate(unlearned.model, test, forget=forget, row_kept=unlearned.repaired)
            row = {
                "seed": seed,
                "precision": precision,
                "original_forget": before["forget"],
                "original_retain": before["retain"],
                "forget": after["accuracy"]["forget_row_kept"],
                "retain": after["accuracy"]["retain"],
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    _OUT.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
