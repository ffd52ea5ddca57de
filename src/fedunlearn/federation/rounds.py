"""Rounds of federated averaging, resumed from a journal.

``fedavg`` is federated averaging (McMahan et al., *Communication-Efficient Learning of Deep Networks*, AISTATS 2017);
``measure`` merges the clients' statistics; ``repair`` re-estimates the batch normalisation, then fine-tunes on the kept
classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.channels.plan import PruningPlan
from fedunlearn.channels.stats import ChannelStats, limit_influence
from fedunlearn.errors import FederationError
from fedunlearn.federation.ask import Answers
from fedunlearn.federation.jobs import Engine, Evaluate, Measure, Reestimate, Reply, Train
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Entry
from fedunlearn.seeding import generator
from fedunlearn.training.batch_norm import batch_norm_layers, fit_batch_norm
from fedunlearn.training.sgd import Training, constant


def train_rounds(
    model: nn.Module,
    engine: Engine,
    *,
    training: Training,
    rounds: int,
    phase: str = "train",
    journal: Journal | None = None,
    schedule: Callable[[int, int], float] = constant,
    exclude: tuple[int, ...] = (),
    clients: Sequence[str] | None = None,
    participation: float = 1.0,
    seed: int = 0,
    plan: PruningPlan | None = None,
    validate: int = 0,
    target: float | None = None,
) -> list[Step]:
    """Train ``model`` in place by rounds of federated averaging and return the steps.

    Args:
        model: the global model; where the journal knows finished rounds of ``phase``, training goes on after them.
        engine: who runs the jobs.
        training: local settings; ``training.lr`` times ``schedule(round, rounds)`` is the rate of a round.
        rounds: at most so many.
        phase: name of the phase in the journal and in every draw.
        journal: where each round is recorded; memory where None.
        schedule: factor of the learning rate.
        exclude: classes whose images are not used.
        clients: those that take part; all where None.
        participation: share of them drawn in each round, at least one.
        seed: owner of the draws.
        plan: how the model's shapes came about.
        validate: measure the accuracy on validation images after every so many rounds and the last; never where 0.
        target: stop when that accuracy is reached (it is then measured after each round).

    Raises:
        FederationError: too few usable replies, or no validation images where they are needed.
    """
    journal = journal or Journal()
    steps = journal.steps(phase)
    if steps:
        model.load_state_dict(journal.state(phase))
    able = sorted(engine.clients if clients is None else clients)
    for round in range(len(steps), rounds):
        journal.report(phase, round, rounds)
        if target is not None and steps and (steps[-1].validation or 0.0) >= target:
            break
        job = Train(
            phase=phase,
            round=round,
            model=model,
            plan=plan or PruningPlan(),
            clients=_drawn(able, participation, seed, phase, round),
            seed=seed,
            training=training,
            lr=training.lr * schedule(round, rounds),
            exclude=exclude,
        )
        answers = Answers(engine, job)
        model.load_state_dict(fedavg((reply.tensors, reply.images) for reply in answers), strict=True)
        entries = [answers.entry]
        validation = None
        if target is not None or (validate and ((round + 1) % validate == 0 or round + 1 == rounds)):
            validation, evaluated = validation_accuracy(model, engine, phase=phase, exclude=exclude, plan=plan)
            if validation is None:
                raise FederationError(
                    "no client holds validation images of the kept classes: set data.validation above 0"
                )
            entries.append(evaluated)
        steps.append(Step(phase, round, tuple(entries), validation))
        journal.finish(steps[-1], model.state_dict())
    journal.report(phase, rounds, rounds)
    return steps


def validation_accuracy(
    model: nn.Module,
    engine: Engine,
    *,
    phase: str,
    exclude: tuple[int, ...],
    labels: tuple[int, ...] | None = None,
    plan: PruningPlan | None = None,
) -> tuple[float | None, Entry]:
    """Return the share of right answers on the clients' validation images, and its cost.

    Classes in ``exclude`` do not count; the share is None where no client holds images of others. ``labels`` is the
    class of each output row; row ``r`` is class ``r`` where it is None.
    """
    job = Evaluate(phase=phase, model=model, plan=plan or PruningPlan(), exclude=exclude, labels=labels)
    answers = Answers(engine, job)
    correct = counts = 0
    for reply in answers:
        correct += int(reply.tensors["correct"])
        counts += int(reply.tensors["counts"])
    return correct / counts if counts else None, answers.entry


def fedavg(updates: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Average states, weighted by images, batch normalisation buffers included.

    ::

        state[n] = sum_k images_k * state_k[n] / sum_k images_k

    Args:
        updates: states by tensor name, each with its number of images, which is above 0.

    Returns:
        The average: floats summed in float64 in the order given and returned in their own type; of integer buffers
        (batch counters) the largest, so that they stay integers.
    """
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    total = 0
    for state, images in updates:
        total += images
        for name, tensor in state.items():
            types[name] = tensor.dtype
            if tensor.is_floating_point():
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
                sums[name].add_(tensor, alpha=images)
            else:
                sums[name] = torch.maximum(sums[name], tensor) if name in sums else tensor
    return {
        name: (value / total).to(types[name]) if types[name].is_floating_point else value
        for name, value in sums.items()
    }


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


def measure(
    job: Measure,
    engine: Engine,
    journal: Journal,
    *,
    mean_of_clients: bool = False,
    influence: float | None = None,
) -> tuple[ChannelStats, dict[str, Tensor]]:
    """Return the clients' statistics, merged in client-id order, and what each client holds per class.

    Under secure aggregation the latter is empty: nobody knows.

    Raises:
        FederationError: too few clients gave usable replies, or only their sum is known where each is needed.
    """
    steps = journal.steps(job.phase)
    if steps:
        saved = journal.state(job.phase)
        rows = saved.pop("held")
        return ChannelStats.from_tensors(saved), dict(zip(steps[0].entries[0].clients, rows))
    journal.report(job.phase, 0, 1)
    answers = Answers(engine, job)
    held: dict[str, Tensor] = {}
    merged = _merged(_parts(answers, held, each=mean_of_clients or influence is not None), mean_of_clients, influence)
    known = torch.stack(list(held.values())) if held else torch.zeros(0, job.classes)
    journal.finish(Step(job.phase, 0, (answers.entry,)), {**merged.tensors(), "held": known})
    journal.report(job.phase, 1, 1)
    return merged, held


def _drawn(able: Sequence[str], participation: float, seed: int, phase: str, round: int) -> tuple[str, ...]:
    if not able:
        raise FederationError("no client has images of the kept classes: there is nobody to train with")
    wanted = max(1, int(participation * len(able) + 0.5))
    order = torch.randperm(len(able), generator=generator(seed, phase, "participation", round))
    return tuple(sorted(able[int(i)] for i in order[:wanted]))


def _parts(answers: Iterable[Reply], held: dict[str, Tensor], *, each: bool) -> Iterator[ChannelStats]:
    """Yield the statistics of replies and note in ``held`` what each client has; a sum is refused where ``each``."""
    for reply in answers:
        if reply.members and each:
            raise FederationError(
                "under secure aggregation only the sum of the statistics is known: "
                "unlearn.mean_of_clients and unlearn.influence need those of each client"
            )
        if not reply.members:
            held[reply.client] = reply.tensors["held"]
        yield ChannelStats.from_tensors({name: own for name, own in reply.tensors.items() if name != "held"})


def _merged(parts: Iterable[ChannelStats], mean_of_clients: bool, influence: float | None) -> ChannelStats:
    """Return all ``parts`` as one; they are added up as they come, unless each must be seen beside all others."""
    if influence is not None:
        parts = limit_influence(list(parts), influence)
    if mean_of_clients:
        parts = (part.one_vote_per_class() for part in parts)
    return functools.reduce(ChannelStats.merge, parts)
