"""Fine-tuning only: the original model goes on learning the kept classes. The control of equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from fedunlearn.channels.plan import PruningPlan
from fedunlearn.federation.jobs import Engine
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.training.sgd import Training


def finetune(
    model: nn.Module,
    engine: Engine,
    *,
    training: Training,
    rounds: int,
    flops: int,
    images: int,
    forget: tuple[int, ...],
    clients: Sequence[str],
    journal: Journal,
    participation: float = 1.0,
    seed: int = 0,
    plan: PruningPlan | None = None,
) -> list[Step]:
    """Train ``model`` in place on the kept classes until clients have spent about ``flops`` operations.

    Args:
        model: the original model, nothing pruned, all rows in place.
        engine: who runs the jobs.
        training: settings of the repair; its local epochs are replaced so that the cost fits.
        rounds: rounds to spread the cost over.
        flops: what unlearning cost, statistics and re-estimation included.
        images: images of the kept classes that the clients of one round hold.
        forget: classes whose images are not used.
        clients: those that hold images of other classes.
        journal: where each round is recorded.
        participation: share of the clients drawn in each round.
        seed: owner of all draws.
        plan: how the shapes of ``model`` follow from its architecture, where channels were removed before.
    """
    _, per_image = flops_per_image(model, engine.shape)
    epochs = flops / per_image / (rounds * images)
    return train_rounds(
        model,
        engine,
        phase="finetune",
        training=replace(training, local_epochs=epochs),
        rounds=rounds,
        journal=journal,
        exclude=forget,
        clients=clients,
        participation=participation,
        seed=seed,
        plan=plan,
    )
