"""Rounds of federated averaging, resumed from a journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedunlearn.errors import FederationError
from fedunlearn.federation.average import fedavg
from fedunlearn.federation.collect import Answers
from fedunlearn.federation.jobs import Engine, Evaluate, Train
from fedunlearn.federation.ledger import Entry
from fedunlearn.journal import Journal, Step
from fedunlearn.plan import PruningPlan
from fedunlearn.seeding import generator
from fedunlearn.training import Training, constant


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


def _drawn(able: Sequence[str], participation: float, seed: int, phase: str, round: int) -> tuple[str, ...]:
    if not able:
        raise FederationError("no client has images of the kept classes: there is nobody to train with")
    wanted = max(1, int(participation * len(able) + 0.5))
    order = torch.randperm(len(able), generator=generator(seed, phase, "participation", round))
    return tuple(sorted(able[int(i)] for i in order[:wanted]))
