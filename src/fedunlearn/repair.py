"""Repair after pruning: re-estimate the batch normalisation, then fine-tune on the kept classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.federation.client import batch_norm_layers
from fedunlearn.federation.collect import Answers
from fedunlearn.federation.jobs import Engine, Reestimate
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.journal import Journal, Step
from fedunlearn.plan import PruningPlan
from fedunlearn.training import Training


def repair(
    model: nn.Module,
    engine: Engine,
    *,
    training: Training,
    rounds: int,
    batch_norm: bool,
    journal: Journal,
    exclude: tuple[int, ...],
    clients: Sequence[str],
    sample: int | None = None,
    participation: float = 1.0,
    seed: int = 0,
    plan: PruningPlan | None = None,
    target: float | None = None,
) -> nn.Module:
    """Return a repaired copy of the pruned ``model``, all output rows in place; arguments as for ``unlearn``."""
    repaired = copy.deepcopy(model)
    if batch_norm:
        repaired = reestimate(
            model, engine, journal=journal, exclude=exclude, clients=clients, sample=sample, seed=seed, plan=plan
        )
    train_rounds(
        repaired,
        engine,
        phase="repair",
        training=training,
        rounds=rounds,
        journal=journal,
        exclude=exclude,
        clients=clients,
        participation=participation,
        seed=seed,
        plan=plan,
        target=target,
    )
    return repaired


def reestimate(
    model: nn.Module,
    engine: Engine,
    *,
    journal: Journal,
    exclude: tuple[int, ...] = (),
    clients: Sequence[str] | None = None,
    sample: int | None = None,
    seed: int = 0,
    plan: PruningPlan | None = None,
) -> nn.Module:
    """Return a copy of ``model`` whose batch normalisation statistics fit the kept classes; no labels, no gradients.

    Over the batches ``b`` of all clients, of ``n_b`` images with mean ``m_b`` and variance ``v_b`` per channel::

        mean = sum_b n_b m_b / sum_b n_b
        var  = sum_b n_b (v_b + m_b^2) / sum_b n_b - mean^2

    Clients send the sums, so secure aggregation applies. Each layer normalises by the batch while its successors are
    measured, as in training: the statistics of the first layer do not depend on who holds which image, those of deeper
    layers do where clients hold few classes each.

    Args:
        model: the pruned model.
        engine: who runs the job.
        journal: where the step is recorded; a finished one is read back.
        exclude: classes whose images are not used.
        clients: those that hold images of other classes; all where None.
        sample: at most so many images per client.
        seed: owner of that draw.
        plan: how the model's shapes came about.

    Raises:
        FederationError: too few usable replies.
    """
    phase = "reestimate"
    fitted = copy.deepcopy(model)
    if journal.steps(phase):
        fitted.load_state_dict(journal.state(phase))
        return fitted
    if not batch_norm_layers(fitted):
        return fitted
    job = Reestimate(
        phase=phase,
        model=model,
        plan=plan or PruningPlan(),
        clients=None if clients is None else tuple(clients),
        exclude=exclude,
        sample=sample,
        seed=seed,
    )
    journal.report(phase, 0, 1)
    answers = Answers(engine, job)
    fit_batch_norm(fitted, [reply.tensors for reply in answers])
    journal.finish(Step(phase, 0, (answers.entry,)), fitted.state_dict())
    journal.report(phase, 1, 1)
    return fitted


def fit_batch_norm(model: nn.Module, sums: Sequence[Mapping[str, Tensor]]) -> None:
    """Set the batch normalisation statistics of ``model``, in place, from the ``sums`` of one or more clients."""
    total = sum(float(part["images"]) for part in sums)
    for name, layer in batch_norm_layers(model).items():
        mean = torch.stack([part[f"mean:{name}"] for part in sums]).sum(0) / total
        square = torch.stack([part[f"square:{name}"] for part in sums]).sum(0) / total
        assert layer.running_mean is not None and layer.running_var is not None  # batch_norm_layers chose it so
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((square - mean**2).clamp_min(0))
