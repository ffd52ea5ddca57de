"""What the privacy options cost: python -m benchmarks.private writes benchmarks/private.json.

Digits, ten iid clients, forget the nines, the recipe's settings but all images of a client measured (``sample = 0``),
three seeds. ``overlap``: share of the channels pruned without any option that are pruned with it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.poisoning import FORGET, SEEDS, figures, forgotten
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.privacy import Privacy, epsilon
from fedunlearn.run.experiment import original_model, prepare
from fedunlearn.run.recipe import load_recipe
from fedunlearn.training.compute import one_torch_thread

OUT = Path(__file__).parent / "private.json"
DELTA = 1e-5
RULES = (
    Privacy(min_count=0, min_images=1),
    Privacy(min_count=10),
    Privacy(clip=2.0),
    Privacy(clip=2.0, noise=0.5),
    Privacy(clip=2.0, noise=1.0),
    Privacy(clip=2.0, noise=4.0),
)


def main() -> None:
    """Measure every set of rules and write the rows."""
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        experiment = prepare(load_recipe("digits", (f"federation.seed={seed}", "unlearn.sample=0")))
        with one_torch_thread():
            original = original_model(experiment, experiment.federation(Journal()))
            honest = forgotten(experiment, original)
            for rules in RULES:
                engine = LocalEngine(experiment.clients, validation=experiment.validation, rules=rules)
                done = forgotten(replace(experiment, engine=engine), original)
                row: dict[str, Any] = {
                    "seed": seed,
                    "min_count": rules.min_count,
                    "clip": rules.clip,
                    "noise": rules.noise,
                }
                row["epsilon"] = epsilon(rules.noise, DELTA) if rules.noise else None
                rows.append(row | figures(done, honest, experiment.splits.test))
                print(rows[-1], flush=True)
    OUT.write_text(json.dumps({"delta": DELTA, "forget": FORGET, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
