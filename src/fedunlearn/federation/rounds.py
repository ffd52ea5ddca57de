"""A federation, and what a server has its clients do: measure, re-estimate, train by rounds, evaluate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedunlearn.arguments import is_number, is_whole, must_be
from fedunlearn.channels.checks import passed_in_training, placed
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.stats import ChannelStats, Pooling, pooled
from fedunlearn.errors import FederationError, ModelError, RecipeError
from fedunlearn.federation.about import asked
from fedunlearn.federation.ask import ask
from fedunlearn.federation.jobs import Engine, Evaluate, Job, Measure, Reestimate, Reply, Task, Train
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Cost, Entry
from fedunlearn.seeding import generator
from fedunlearn.training.batch_norm import batch_norm_layers, fit_batch_norm
from fedunlearn.training.sgd import Training, check_trainable, constant

_logger = logging.getLogger(__name__)
_CROWD = 3  # of two clients, one may well hold most images

_VELOCITY = "velocity:"  # of the server, beside the weights in the state of a round


@dataclass(frozen=True, eq=False)
class Federation:
    """Who takes part, who keeps the record, and who owns the draws.

    Attributes:
        engine: runs jobs on the clients.
        journal: where each step is recorded, to go on after a kill; in memory where none is given.
        seed: owner of all draws.
        participation: share of the clients drawn in each round of training, at least one.
        clients: those that take part in training; all where None.
        exclude: classes whose images are not used.
        request: what the steps are done for, which the journal holds them to, see ``asked``.

    Raises:
        FederationError: a value is none of these.

    Example:
        >>> import fedunlearn as fu
        >>> train, test = fu.read_digits()
        >>> fed = fu.Federation(fu.LocalEngine(fu.partition(train, by="iid", clients=3, seed=0)), seed=1)
        >>> fed.keeping(exclude=(9,)).exclude
        (9,)
    """

    engine: Engine
    journal: Journal = field(default_factory=Journal)
    seed: int = 0
    participation: float = 1.0
    clients: tuple[str, ...] | None = None
    exclude: tuple[int, ...] = ()
    request: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(getattr(self.engine, "run", None)):
            raise FederationError(
                f"Federation(engine) must be an engine, such as LocalEngine(clients), got {type(self.engine).__name__}"
            )
        if not isinstance(self.journal, Journal):
            raise FederationError(
                f"Federation(journal=...) must be a Journal, got {self.journal!r}: for one in a folder, give "
                "Journal(Path(folder))"
            )
        if not is_whole(self.seed, 0):
            raise FederationError(f"Federation(seed=...) must be a whole number of at least 0, got {self.seed!r}")
        if not is_number(self.participation) or not 0 < self.participation <= 1:
            raise FederationError(
                f"Federation(participation=...) must lie above 0 and at most at 1, got {self.participation!r}"
            )
        if self.clients is not None and not _several(self.clients, lambda name: isinstance(name, str)):
            raise FederationError(f"Federation(clients=...) must be names in a tuple, or None, got {self.clients!r}")
        if not _several(self.exclude, lambda label: is_whole(label, 0)):
            raise FederationError(
                f"Federation(exclude=...) must be numbers of classes in a tuple, got {self.exclude!r}"
            )

    def keeping(self, *, exclude: Sequence[int], clients: Sequence[str] | None = None) -> Federation:
        """Return the federation without ``exclude`` either; only ``clients`` take part where they are given."""
        able = self.clients if clients is None else tuple(clients)
        return replace(self, exclude=tuple(sorted({*self.exclude, *exclude})), clients=able)

    def able(self) -> list[str]:
        """Return the clients that take part in training, sorted."""
        return sorted(self.engine.clients if self.clients is None else self.clients)

    def about(self, **values: object) -> dict[str, str]:
        """Return what a step of these values is about: the request, the values, and the owner of its draws."""
        return {**self.request, **asked(**values, seed=self.seed)}

    def part(self, name: str) -> Federation:
        """Return the federation with its steps recorded as those of a part of the run."""
        return replace(self, journal=self.journal.part(name))

    def job(self, task: Task, model: Classifier, *, phase: str, round: int = 0) -> Job:
        """Return ``task`` as a job for the clients that take part."""
        return Job(task=task, model=model, phase=phase, round=round, clients=self.clients, seed=self.seed)

    def cost(self, *phases: str) -> Cost:
        """Return what the phases whose names start with one of ``phases`` cost the clients."""
        return Cost.of(self.journal.entries(*phases))


def _several(values: object, valid: Callable[[object], bool]) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(valid(value) for value in values)


@dataclass(frozen=True, eq=False)
class Holdings:
    """What is known of the classes that clients hold.

    Attributes:
        counts: client to its images of each class, int64, shape ``(classes,)``; of a client that did not answer, or
            answered under secure aggregation, nothing is known.
        clients: ids of all clients.
    """

    counts: Mapping[str, Tensor]
    clients: tuple[str, ...]

    def with_images_besides(self, classes: Sequence[int]) -> tuple[str, ...]:
        """Return the clients that hold images of other classes, and those of whom nothing is known."""
        return tuple(name for name in self.clients if self._may_hold_more(name, classes))

    def _may_hold_more(self, client: str, classes: Sequence[int]) -> bool:
        counts = self.counts.get(client)
        # A client that reports nothing by its rules may hold images of the kept classes all the same.
        return counts is None or not bool(counts.any()) or int(counts.sum() - counts[list(classes)].sum()) > 0


@dataclass(frozen=True)
class Server:
    """How the learning rate changes from round to round, and what the server makes of the clients' average.

    With momentum ``b`` the server moves on as the averages did before (FedAvgM: T. Hsu, H. Qi, M. Brown, *Measuring the
    Effects of Non-Identical Data Distribution for Federated Visual Classification*, 2019)::

        v = b v + (average - w)        w = w + v

    Buffers, such as the statistics of batch normalisation, are the clients' average at any momentum.

    Attributes:
        schedule: factor of the learning rate in ``round`` of ``rounds``.
        momentum: ``b``; 0 is plain averaging.

    Raises:
        RecipeError: the momentum does not lie in ``[0, 1)``, or the schedule is no function.
    """

    schedule: Callable[[int, int], float] = constant
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise RecipeError(f"Server(schedule) must be a function, such as one_cycle, got {self.schedule!r}")
        if not is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise RecipeError(f"Server(momentum=...) must be at least 0 and below 1, got {self.momentum!r}")

    def moved(
        self, model: nn.Module, average: Mapping[str, Tensor], velocity: dict[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the next state of ``model``; ``velocity``, by parameter, is brought up to date in place."""
        if not self.momentum:
            return average
        state = dict(average)
        for name, parameter in model.named_parameters():
            before = parameter.detach().cpu()
            moving = average[name] - before
            if name in velocity:
                moving += self.momentum * velocity[name]
            velocity[name] = moving
            state[name] = before + moving
        return state


@dataclass(frozen=True)
class Watch:
    """When training is measured on the clients' validation images, and when it may stop.

    Attributes:
        every: measure after so many rounds, and after the last; never where 0.
        target: stop when this accuracy is reached; it is then measured after each round.

    Raises:
        RecipeError: a value is none of these.
    """

    every: int = 0
    target: float | None = None

    def __post_init__(self) -> None:
        _whole("Watch", "every", self.every)
        _share("Watch", "target", self.target)

    def due(self, round: int, rounds: int) -> bool:
        """Return whether to measure after ``round`` of ``rounds``."""
        regular = self.every > 0 and ((round + 1) % self.every == 0 or round + 1 == rounds)
        return self.target is not None or regular

    def reached(self, steps: Sequence[Step]) -> bool:
        """Return whether the last of ``steps`` reached the target."""
        return self.target is not None and bool(steps) and (steps[-1].validation or 0.0) >= self.target


@dataclass(frozen=True)
class Repair:
    """What follows the pruning.

    Attributes:
        training: local settings of the rounds.
        rounds: at most so many; 0 for none.
        batch_norm: re-estimate the batch normalisation statistics first.
        target: stop at this accuracy on the clients' validation images of the kept classes.

    Raises:
        RecipeError: a value is none of these.
    """

    training: Training
    rounds: int = 1
    batch_norm: bool = True
    target: float | None = None

    def __post_init__(self) -> None:
        must_be(Training, self.training, "Repair(training)", "a Training, such as Training(lr=0.05)", RecipeError)
        _whole("Repair", "rounds", self.rounds)
        must_be(bool, self.batch_norm, "Repair(batch_norm=...)", "True or False", RecipeError)
        _share("Repair", "target", self.target)


def _whole(owner: str, name: str, value: object) -> None:
    if not is_whole(value, 0):
        raise RecipeError(f"{owner}({name}=...) must be a whole number of at least 0, got {value!r}")


def _share(owner: str, name: str, value: float | None) -> None:
    if value is not None and not (is_number(value) and 0 <= value <= 1):
        raise RecipeError(f"{owner}({name}=...) must lie in 0 .. 1, or be None, got {value!r}")


def whole_model(model: nn.Module | Classifier, fed: Federation) -> Classifier:
    """Return ``model`` as a classifier of the clients' images; refuse one without a row for every class, in order.

    Raises:
        ModelError: it is no such model, or its weights are not finite.
        FederationError: ``fed`` is no federation, or excludes a class that there is not.
    """
    must_be(Federation, fed, "the second argument", "a Federation, such as Federation(engine)", FederationError)
    beyond = [label for label in fed.exclude if label >= fed.engine.classes]
    if beyond:
        raise FederationError(
            f"Federation(exclude=...) names class {beyond[0]}, the clients' classes are 0 .. {fed.engine.classes - 1}"
        )
    whole = Classifier.of(model, fed.engine.shape)
    checked = whole.checked(fed.engine.classes)
    if checked.labels != tuple(range(fed.engine.classes)):
        raise ModelError(
            f"the model's output rows name the classes {list(checked.labels or ())}, the clients' labels are 0 .. "
            f"{fed.engine.classes - 1} in this order: start from the model that has a row for every class"
        )
    return whole


def measure(
    model: Classifier,
    fed: Federation,
    *,
    hook: str = "activation",
    phase: str = "measure",
    pooling: Pooling = pooled,
    sample: int | None = None,
) -> tuple[ChannelStats, Holdings]:
    """Return the clients' statistics, merged in client-id order, and what each client holds.

    Args:
        model: whose channels are read.
        fed: all its clients are asked.
        hook: where, see ``find_channels``.
        phase: name of the step in the journal and in every draw.
        pooling: makes one of the clients' statistics.
        sample: at most so many images per client.

    Raises:
        FederationError: too few clients gave usable replies, or only their sum is known where each is needed.
        RunError: the journal holds the phase of another request.
    """
    clients = tuple(fed.engine.clients if fed.clients is None else fed.clients)
    task = Measure(hook=hook, classes=fed.engine.classes, sample=sample)
    about = fed.about(weights=model, **vars(task), pooling=pooling, clients=sorted(fed.engine.clients))
    recorded = fed.journal.finished(phase, [about])
    if recorded:
        saved = fed.journal.state(phase)
        rows = saved.pop("held")
        return ChannelStats.from_tensors(saved), Holdings(dict(zip(recorded[0].entries[0].clients, rows)), clients)
    held: dict[str, Tensor] = {}

    def parts(replies: Iterator[Reply]) -> Iterator[ChannelStats]:
        for reply in replies:
            if reply.members and pooling is not pooled:
                raise FederationError(
                    "under secure aggregation only the sum of the statistics is known: "
                    "unlearn.mean_of_clients and unlearn.influence need those of each client"
                )
            if not reply.members:
                held[reply.client] = reply.tensors["held"]
            yield ChannelStats.from_tensors({name: own for name, own in reply.tensors.items() if name != "held"})

    fed.journal.report(phase, 0, 1)
    job = replace(fed.job(task, model, phase=phase), clients=None)
    stats, entry = ask(fed.engine, job, lambda replies: pooling(parts(replies)))
    must_be(ChannelStats, stats, "what a pooling returns", "ChannelStats, as pooled() makes them", FederationError)
    known = torch.stack(list(held.values())) if held else torch.zeros(0, fed.engine.classes)
    fed.journal.finish(Step(phase, 0, (entry,), about=about), {**stats.tensors(), "held": known})
    fed.journal.report(phase, 1, 1)
    return stats, Holdings(held, clients)


def reestimate(model: Classifier, fed: Federation, *, sample: int | None = None) -> Classifier:
    """Return ``model`` with batch normalisation statistics that fit the kept classes; no labels, no gradients.

    Over the batches ``b`` of all clients, of ``n_b`` images with mean ``m_b`` and variance ``v_b`` per channel::

        mean = sum_b n_b m_b / sum_b n_b
        var  = sum_b n_b (v_b + m_b^2) / sum_b n_b - mean^2

    Clients send the sums, so secure aggregation applies. Each layer normalises by the batch while its successors are
    measured, as in training: the statistics of the first layer do not depend on who holds which image, those of deeper
    layers do where clients hold few classes each.

    Args:
        model: the pruned model.
        fed: the clients that hold images of the kept classes.
        sample: at most so many images per client.

    Raises:
        FederationError: too few usable replies.
        RunError: the journal holds the step of another request.
    """
    must_be(Classifier, model, "reestimate(model)", "a Classifier, such as Classifier(module, shape)", ModelError)
    phase = "reestimate"
    fitted = model.copy()
    task = Reestimate(exclude=fed.exclude, sample=sample)
    about = fed.about(weights=model, **vars(task), clients=fed.able())
    if fed.journal.finished(phase, [about]):
        fitted.module.load_state_dict(fed.journal.state(phase))
        return fitted
    if not batch_norm_layers(fitted.module):
        return fitted
    _check_somebody(fed)
    fed.journal.report(phase, 0, 1)
    job = fed.job(task, model, phase=phase)
    sums, entry = ask(fed.engine, job, lambda replies: [reply.tensors for reply in replies])
    fit_batch_norm(fitted.module, sums)
    fed.journal.finish(Step(phase, 0, (entry,), about=about), fitted.module.state_dict())
    fed.journal.report(phase, 1, 1)
    return fitted


def train_rounds(
    model: nn.Module | Classifier,
    fed: Federation,
    training: Training,
    *,
    rounds: int,
    phase: str = "train",
    server: Server = Server(),
    watch: Watch = Watch(),
) -> Classifier:
    """Train a copy of ``model`` by rounds of federated averaging; ``fed.journal.steps(phase)`` tells of each round.

    Args:
        model: where training starts; where the journal knows finished rounds of ``phase``, it goes on after them.
        fed: clients, participation and the classes that are left out.
        training: local settings; ``training.lr`` times ``server.schedule(round, rounds)`` is the rate of a round.
        rounds: at most so many.
        phase: name of the phase in the journal and in every draw.
        server: how the rate changes, and what the server makes of the averages.
        watch: when to measure on validation images, and to stop.

    Raises:
        ModelError: the model cannot be trained: it lacks a row of a class, say, all its weights are frozen, or in
            training it returns something else than logits.
        RecipeError: ``training`` is none, or ``rounds`` no number of rounds.
        FederationError: too few usable replies, or no validation images where they are needed.

    Example:
        >>> import fedunlearn as fu
        >>> train, test = fu.read_digits()
        >>> fed = fu.Federation(fu.LocalEngine(fu.partition(train, by="iid", clients=3, seed=0)))
        >>> net = fu.build_model("small-cnn", classes=10, colours=1)
        >>> trained = fu.train_rounds(net, fed, fu.Training(lr=0.1, local_epochs=0.1), rounds=1)
        >>> fed.cost("train").rounds
        1
    """
    must_be(Training, training, "train_rounds(training)", "a Training, such as Training(lr=0.1)", RecipeError)
    must_be(Server, server, "train_rounds(server=...)", "a Server, such as Server(one_cycle)", RecipeError)
    must_be(Watch, watch, "train_rounds(watch=...)", "a Watch, such as Watch(every=5)", RecipeError)
    _whole("train_rounds", "rounds", rounds)
    trained = whole_model(model, fed).copy()
    if rounds:
        check_trainable(trained.module)
        passed_in_training(trained.module, placed(trained.example, trained.module))
    tasks = [
        Train(training=training, lr=training.lr * server.schedule(round, rounds), exclude=fed.exclude)
        for round in range(rounds)
    ]
    common = fed.about(weights=trained, clients=fed.able(), participation=fed.participation, watch=watch)
    common |= asked(server_momentum=server.momentum)
    about = [{**common, **asked(**vars(task))} for task in tasks]
    steps = fed.journal.finished(phase, about)
    velocity: dict[str, Tensor] = {}
    if steps:
        saved = fed.journal.state(phase)
        velocity = {name: saved.pop(_VELOCITY + name) for name in [*saved] if _VELOCITY + name in saved}
        trained.module.load_state_dict(saved)
    for round in range(len(steps), rounds):
        fed.journal.report(phase, round, rounds)
        if watch.reached(steps):
            break
        job = replace(fed.job(tasks[round], trained, phase=phase, round=round), clients=_drawn(fed, phase, round))
        average, entry = ask(fed.engine, job, _average)
        trained.module.load_state_dict(server.moved(trained.module, average, velocity), strict=True)
        entries, validation = [entry], None
        if watch.due(round, rounds):
            validation, evaluated = validation_accuracy(trained, fed, phase=phase)
            if validation is None:
                raise FederationError(
                    "no client counts validation images of the kept classes: set data.validation above 0, "
                    "high enough for the clients' min_images"
                )
            entries.append(evaluated)
        steps.append(Step(phase, round, tuple(entries), validation, about[round]))
        moving = {_VELOCITY + name: tensor for name, tensor in velocity.items()}
        fed.journal.finish(steps[-1], {**trained.module.state_dict(), **moving})
    fed.journal.report(phase, rounds, rounds)
    return trained


def validation_accuracy(model: Classifier, fed: Federation, *, phase: str) -> tuple[float | None, Entry]:
    """Return the share of right answers on the validation images of all clients, and its cost.

    Classes that the federation leaves out do not count; the share is None where no client holds images of others.
    """
    model.checked(fed.engine.classes)
    job = replace(fed.job(Evaluate(exclude=fed.exclude, labels=model.labels), model, phase=phase), clients=None)

    def total(replies: Iterable[Reply]) -> tuple[int, int]:
        pairs = [(int(reply.tensors["correct"]), int(reply.tensors["counts"])) for reply in replies]
        return sum(correct for correct, _ in pairs), sum(count for _, count in pairs)

    (correct, counts), entry = ask(fed.engine, job, total)
    return correct / counts if counts else None, entry


def _drawn(fed: Federation, phase: str, round: int) -> tuple[str, ...]:
    _check_somebody(fed)
    able = fed.able()
    wanted = max(1, int(fed.participation * len(able) + 0.5))
    order = torch.randperm(len(able), generator=generator(fed.seed, phase, "participation", round))
    return tuple(sorted(able[int(i)] for i in order[:wanted]))


def _check_somebody(fed: Federation) -> None:
    if not fed.able():
        raise FederationError("no client has images of the kept classes: there is nobody to train with")


def _average(replies: Iterable[Reply]) -> dict[str, Tensor]:
    """Return the average of the clients' states, and say who claims more images than all others together."""
    claims: dict[str, int] = {}

    def updates() -> Iterator[tuple[Mapping[str, Tensor], int]]:
        for reply in replies:
            claims[reply.client] = reply.images
            yield reply.tensors, reply.images

    state = fedavg(updates())
    for client, images in claims.items():
        others = sum(claims.values()) - images
        if len(claims) >= _CROWD and images > others:
            _logger.warning("%s claims %d images, the others %d together: it weighs as much", client, images, others)
    return state


def fedavg(updates: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Average states, weighted by images, batch normalisation buffers included.

    ::

        state[n] = sum_k images_k * state_k[n] / sum_k images_k

    Of three clients or more, none weighs more than all others together: a number of images is a client's own claim.

    Args:
        updates: states by tensor name, each with its number of images, which is above 0.

    Returns:
        The average: floats summed in float64 in the order given and returned in their own type; of integer buffers
        (batch counters) the largest, so that they stay integers.
    """
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    total = clients = most = 0
    heaviest: Mapping[str, Tensor] = {}
    for state, images in updates:
        total += images
        clients += 1
        if images > most:
            heaviest, most = state, images
        for name, tensor in state.items():
            types[name] = tensor.dtype
            if tensor.is_floating_point():
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
                sums[name].add_(tensor, alpha=images)
            else:
                sums[name] = torch.maximum(sums[name], tensor) if name in sums else tensor
    excess = 2 * most - total
    if clients >= _CROWD and excess > 0:  # taken off here, as an honest sum is to add up in its order
        total -= excess
        for name, value in sums.items():
            if types[name].is_floating_point:
                value.sub_(heaviest[name].double(), alpha=excess)
    return {
        name: (value / total).to(types[name]) if types[name].is_floating_point else value
        for name, value in sums.items()
    }
