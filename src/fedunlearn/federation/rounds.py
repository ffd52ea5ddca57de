"""Training by rounds of federated averaging, and the repair after pruning."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedunlearn.arguments import is_number, is_whole, must_be
from fedunlearn.channels.checks import passed_in_training, placed
from fedunlearn.channels.plan import Classifier
from fedunlearn.errors import FederationError, RecipeError
from fedunlearn.federation.about import asked
from fedunlearn.federation.ask import ask
from fedunlearn.federation.averaging import Server, averaged, evened
from fedunlearn.federation.federation import Federation, check_somebody, whole_model
from fedunlearn.federation.jobs import BY_RULES, Reply
from fedunlearn.federation.journal import Step
from fedunlearn.federation.ledger import Entry
from fedunlearn.federation.tasks import Evaluate, Train
from fedunlearn.seeding import generator
from fedunlearn.training.objectives.base import Local
from fedunlearn.training.sgd import Training, check_trainable

_logger = logging.getLogger(__name__)

_VELOCITY = "velocity:"  # of the server, beside the weights in the state of a round


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
        server: how the rate changes over the rounds, and what the server makes of the averages.

    Raises:
        RecipeError: a value is none of these.
    """

    training: Training
    rounds: int = 1
    batch_norm: bool = True
    target: float | None = None
    server: Server = Server()

    def __post_init__(self) -> None:
        must_be(Training, self.training, "Repair(training)", "a Training, such as Training(lr=0.05)", RecipeError)
        _whole("Repair", "rounds", self.rounds)
        must_be(bool, self.batch_norm, "Repair(batch_norm=...)", "True or False", RecipeError)
        _share("Repair", "target", self.target)
        must_be(Server, self.server, "Repair(server=...)", "a Server, such as Server(one_cycle)", RecipeError)

    def check(self, model: Classifier) -> None:
        """Refuse what would fail in the repair only, after clients were asked.

        Raises:
            ModelError: there is nothing to train.
            RecipeError: the schedule of the server fails.
        """
        if self.rounds:
            check_trainable(model.module)
        self.server.rates(self.training.lr, self.rounds)

    def of(self, model: Classifier, kept: Federation, *, phase: str = "repair") -> Classifier:
        """Return ``model`` trained by the rounds of this repair on the clients and classes of ``kept``."""
        watch = Watch(target=self.target)
        return train_rounds(
            model, kept, self.training, rounds=self.rounds, phase=phase, server=self.server, watch=watch
        )


def _whole(owner: str, name: str, value: object) -> None:
    if not is_whole(value, 0):
        raise RecipeError(f"{owner}({name}=...) must be a whole number of at least 0, got {value!r}")


def _share(owner: str, name: str, value: float | None) -> None:
    if value is not None and not (is_number(value) and 0 <= value <= 1):
        raise RecipeError(f"{owner}({name}=...) must lie in 0 .. 1, or be None, got {value!r}")


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
        RecipeError: ``training``, ``server`` or ``watch`` is none, ``rounds`` no number of rounds, or ``training``
            has an objective and no class is left out.
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
    _check(trained, fed, training, rounds)
    tasks = [
        Train(training=training.of_round(round, rounds), lr=lr, exclude=fed.exclude)
        for round, lr in enumerate(server.rates(training.lr, rounds))
    ]
    common = fed.about(weights=trained, participation=fed.participation, watch=watch)
    common |= asked(server_momentum=server.momentum)
    about = [{**common, **asked(**vars(task), clients=fed.named(task.training.objective))} for task in tasks]
    steps = fed.journal.finished(phase, about)
    velocity = _restored(trained.module, fed.journal.state(phase)) if steps else {}
    for round in range(len(steps), rounds):
        fed.journal.report(phase, round, rounds)
        if watch.reached(steps):
            break
        job = fed.job(tasks[round], trained, phase=phase, round=round)
        small = _too_small(fed, steps, tasks)
        job = replace(job, clients=_drawn(fed, tasks[round].training.objective, phase, round, small))
        average, entry = ask(fed.engine, job, averaged)
        trained.module.load_state_dict(server.moved(trained.module, average, velocity), strict=True)
        entries, validation = [entry], None
        if watch.due(round, rounds):
            validation, evaluated = _watched(trained, fed, phase)
            entries.append(evaluated)
        steps.append(Step(phase, round, tuple(entries), validation, about[round]))
        moving = {_VELOCITY + name: tensor for name, tensor in velocity.items()}
        fed.journal.finish(steps[-1], {**trained.module.state_dict(), **moving})
    fed.journal.report(phase, rounds, rounds)
    return trained


def _check(model: Classifier, fed: Federation, training: Training, rounds: int) -> None:
    """Refuse what would fail in a round, before clients are asked."""
    if training.objective is not None and not fed.exclude:
        raise RecipeError(
            "Training(objective=...) forgets the classes that a federation leaves out, and this one leaves none out: "
            "use fed.keeping(exclude=...)"
        )
    if training.objective is not None and training.objective.share and not fed.has_holders():
        _logger.warning(
            "no client that holds images of the classes %s takes part in training, for which it needs images of "
            "others: nothing of them is trained on",
            list(fed.exclude),
        )
    if rounds:
        check_trainable(model.module)
        passed_in_training(model.module, placed(model.example, model.module))


def _restored(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load the weights in the state of a round, and return the server's velocity in it."""
    velocity = {name: state.pop(_VELOCITY + name) for name in [*state] if _VELOCITY + name in state}
    module.load_state_dict(state)
    return velocity


def _watched(model: Classifier, fed: Federation, phase: str) -> tuple[float, Entry]:
    accuracy, entry = validation_accuracy(model, fed, phase=phase)
    if accuracy is None:
        raise FederationError(
            "no client counts validation images of the kept classes: set data.validation above 0, "
            "high enough for the clients' min_images"
        )
    return accuracy, entry


def validation_accuracy(model: Classifier, fed: Federation, *, phase: str) -> tuple[float | None, Entry]:
    """Return the share of right answers on the validation images of all clients, and its cost.

    Classes that the federation leaves out do not count; the share is None where no client holds images of others.
    """
    model.checked(fed.engine.classes)
    job = replace(fed.job(Evaluate(exclude=fed.exclude, labels=model.labels), model, phase=phase), clients=None)

    def total(replies: Iterable[Reply]) -> tuple[float, float]:
        parts = evened(reply for reply in replies if reply.images)
        return sum(float(part["correct"]) for part in parts), sum(float(part["counts"]) for part in parts)

    (correct, counts), entry = ask(fed.engine, job, total)
    return correct / counts if counts else None, entry


def _too_small(fed: Federation, steps: Sequence[Step], tasks: Sequence[Train]) -> set[str]:
    """Return the clients that said, of the same images, that they are too few for their rules: they always would."""
    left_out = asked(exclude=fed.exclude)["exclude"]
    said = [step for step in fed.journal.steps("reestimate") if step.about.get("exclude") == left_out]
    said += [step for step, task in zip(steps, tasks) if not _of_forgotten_alone(task.training.objective)]
    refused = [refusal for step in said for entry in step.entries for refusal in entry.refused.items()]
    return {name for name, why in refused if BY_RULES in why}


def _of_forgotten_alone(objective: Local | None) -> bool:
    return objective is not None and objective.share == 1


def _drawn(fed: Federation, objective: Local | None, phase: str, round: int, small: Collection[str]) -> tuple[str, ...]:
    check_somebody(fed)
    if _of_forgotten_alone(objective):  # of other images than those that were too few
        small = ()
    # Where all holders are, the round is one without images of the classes: better than none.
    able = [name for name in fed.able(objective) if name not in small]
    able = able or [name for name in fed.able() if name not in small] or fed.able(objective)
    order = torch.randperm(len(able), generator=generator(fed.seed, phase, "participation", round))
    drawn = replace(fed, clients=tuple(able), holders=None).drawn()
    return tuple(sorted(able[int(i)] for i in order[:drawn]))
