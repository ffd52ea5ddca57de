"""One of ten clients lies about its statistics: python -m benchmarks.poisoning writes benchmarks/poisoning.json.

Digits, ten iid clients, forget the nines, settings of the recipe, three seeds. Client 0 answers ``Measure`` with

* ``scaled``: its true sums, times the factor;
* ``spare``: for the forgotten class its true activations turned upside down, so that its channels look idle;
* ``destroy``: for the forgotten class what it measured for the threes, so that their channels are pruned;

each times 1 (which no check of size can see) or times 10^6. Each with and without a cap of 2 on a client's influence.
Nothing is chosen by the test images: the cap is the one the documentation suggests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages
from fedunlearn.federation.jobs import Job, Reply
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.tasks import Measure
from fedunlearn.run.experiment import Experiment, original_model, prepare
from fedunlearn.run.forgetting import unlearned_model
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.result import evaluate
from fedunlearn.training.compute import one_torch_thread
from fedunlearn.unlearn import Unlearned

OUT = Path(__file__).parent / "poisoning.json"
FORGET, VICTIM, LIAR, CAP = 9, 3, "client-0", 2.0
SEEDS, FACTORS = (0, 1, 2), (1.0, 1e6)

Attack = Callable[[Tensor], Tensor]


def scaled(sums: Tensor) -> Tensor:
    """Return the truth."""
    return sums


def spare(sums: Tensor) -> Tensor:
    """Return sums whose forgotten class is upside down."""
    lie = sums.clone()
    lie[FORGET] = sums[FORGET].max() - sums[FORGET]
    return lie


def destroy(sums: Tensor) -> Tensor:
    """Return sums whose forgotten class is the victim's."""
    lie = sums.clone()
    lie[FORGET] = sums[VICTIM]
    lie[VICTIM] = sums[FORGET]
    return lie


ATTACKS: dict[str, Attack] = {"scaled": scaled, "spare": spare, "destroy": destroy}


class Liar(LocalEngine):
    """Clients of whom one lies."""

    attack: Attack
    factor: float

    def run(self, job: Job) -> Iterator[Reply]:
        """Run ``job``; the liar's statistics are what the attack makes of them."""
        lies = isinstance(job.task, Measure)
        for reply in super().run(job):
            yield self._lie(reply) if lies and reply.client == LIAR else reply

    def _lie(self, reply: Reply) -> Reply:
        lies = {
            name: self.attack(tensor) * self.factor if name.startswith("sums.") else tensor
            for name, tensor in reply.tensors.items()
        }
        return replace(reply, tensors=lies)


def main() -> None:
    """Measure every attack and write the rows."""
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        experiment = prepare(load_recipe("digits", (f"federation.seed={seed}",)))
        with one_torch_thread():
            original = original_model(experiment, experiment.federation(Journal()))
            for cap in (None, CAP):
                unlearning = experiment.recipe.unlearn.model_copy(update={"influence": cap})
                by_setting = replace(experiment, recipe=experiment.recipe.model_copy(update={"unlearn": unlearning}))
                honest = forgotten(by_setting, original)
                about = {"seed": seed, "cap": cap}
                rows.append(about | {"attack": "none", "factor": 1.0} | figures(honest, honest, experiment.splits.test))
                for name, attack in ATTACKS.items():
                    for factor in FACTORS:
                        rules = experiment.recipe.rules()  # as the honest clients have
                        engine = Liar(experiment.clients, validation=experiment.validation, rules=rules)
                        engine.attack, engine.factor = attack, factor
                        done = forgotten(replace(by_setting, engine=engine), original)
                        rows.append(
                            about | {"attack": name, "factor": factor} | figures(done, honest, experiment.splits.test)
                        )
                        print(rows[-1], flush=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")


def forgotten(experiment: Experiment, original: Classifier) -> Unlearned:
    """Return what the recipe makes of ``original`` with the clients of ``experiment``."""
    return unlearned_model(experiment, original, experiment.federation(Journal()))


def figures(done: Unlearned, honest: Unlearned, test: LabelledImages) -> dict[str, float]:
    """Return the share of the honest plan's channels that were pruned, U and R, and the victim's accuracy."""
    ours, theirs = (
        {(layer, c) for layer, channels in result.pruned.plan.pruned.items() for c in channels}
        for result in (done, honest)
    )
    accuracy = evaluate(done.model, test, forget=(FORGET,), row_kept=done.repaired)["accuracy"]
    pruned = evaluate(done.pruned, test, forget=(FORGET,))
    victim = accuracy["per_class"][str(VICTIM)]
    return {
        "overlap": len(ours & theirs) / len(theirs),
        "forget_pruned": pruned["accuracy"]["forget"],
        "forget": accuracy["forget_row_kept"],
        "retain": accuracy["retain"],
        "victim": victim,
    }


if __name__ == "__main__":
    main()
