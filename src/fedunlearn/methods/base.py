"""What a method is: how it is named, what it needs, and what it makes of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fedunlearn.arguments import is_positive, or_none
from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier, Cut, quota
from fedunlearn.channels.scores import Ranking
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.training.objectives.base import first_rounds, in_range
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.table import Objective
from fedunlearn.unlearn import Forgotten, Unlearned


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be forgotten, and the settings of the run that methods share.

    Attributes:
        forget: classes to forget.
        rank: how channels are measured and ranked.
        cut: how many channels go.
        repair: local settings and rounds after an edit.
        jointly: whether several classes are scored as one.
        clients: clients that hold images of the classes that stay.
        holders: clients that hold images of the classes to forget.
        images: images of the kept classes that the clients of one round of repair hold, on average.
        spent: what pruning and repair cost: fine-tuning beside them stops there. None where a method stands alone.
        unlearned: what came of it, for the controls of a run.
    """

    forget: tuple[int, ...]
    rank: Ranking
    cut: Cut
    repair: Repair
    jointly: bool
    clients: tuple[str, ...]
    holders: tuple[str, ...]
    images: float
    spent: Cost | None = None
    unlearned: Forgotten | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method made of a model.

    Attributes:
        subject: the model as it would be delivered.
        cost: what it cost the clients; None where that is nothing beyond what unlearning did.
        gone: the share of random channels that are as many as it pruned, see ``as_many``; None where it pruned none.
    """

    subject: Subject
    cost: Cost | None = None
    gone: float | None = None


Run = Callable[[Classifier, Federation, Request, Any], Outcome]


@dataclass(frozen=True)
class Method:
    """A way to make a model forget, or a control that only seems to be one.

    Attributes:
        name: in files and recipes.
        label: in tables.
        needs: what it asks of the clients.
        run: makes the model forget: ``run(original, federation, request, settings)``.
        applies: whether it differs from unlearning itself, and from the other controls.
        settings: those that were published, a frozen dataclass; what no source gives is that of the recipe's repair.
            None for a method without.
        space: by setting, the values that tuning tries.
        source: where it was published; empty for ours and for controls.
        sums: whether the clients' replies are only added up.
        measures: whether all that clients say before they train is ``Measure``, which noise and secure aggregation
            protect.
        other_sums: whether clients are asked for sums other than those of ``Measure``, in the clear.
        matched: whether it is of equal cost where that of pruning is known: it stops there, or prunes as many channels.
        erases: whether it takes the erase step of a recipe for its own, see ``settings_by``.
    """

    name: str
    label: str
    needs: str
    run: Run
    applies: Callable[[Request], bool] = lambda request: True
    settings: Any = None
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    source: str = ""
    sums: bool = False
    measures: bool = False
    other_sums: bool = False
    matched: bool = False
    erases: bool = False


@dataclass(frozen=True)
class LocalSettings:
    """Settings of a method that trains.

    Attributes:
        lr: learning rate; that of the recipe's repair where None.
        epochs: passes over the clients' images in all rounds together, see ``passes``; those of the recipe's repair
            where None.
    """

    lr: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        in_range(self, lr=or_none(is_positive), epochs=or_none(is_positive))
        self.objective()  # refuses what is out of its range

    def objective(self) -> Objective | None:
        """Return what clients minimise, by which it is told who is drawn; None: cross-entropy of images that stay."""
        return None


@dataclass(frozen=True)
class EraseStep:
    """Settings of the erase step, see ``Erasing``."""

    complement: float = 1.0
    separation: float = 0.1
    share: float = 0.25
    until: float = 0.3
    every: int = 1

    def objective(self) -> Objective:
        """Return what clients minimise."""
        return Erasing(self.complement, self.separation, self.share, self.until, self.every)


def settings_by(method: Method, erasing: Erasing | None) -> Any:
    """Return the settings of a method, with the erase step of a recipe in the place of its own where it has one."""
    if erasing is None or not method.erases:
        return method.settings
    return replace(method.settings, **{step.name: getattr(erasing, step.name) for step in fields(EraseStep)})


def passes(settings: LocalSettings, request: Request, fed: Federation) -> float:
    """Return the epochs of a method: those of a client in a round, times the rounds that it is drawn for on average.

    What an epoch is of a method that mixes images of the class in: docs/how-to/methods.md. Where its settings do not
    say, those of the repair of the recipe.
    """
    if settings.epochs is not None:
        return settings.epochs
    epochs = request.repair.training.local_epochs
    return sum(epochs * rounds * share for share, rounds in _shares(fed, request, settings.objective()).items())


def _shares(fed: Federation, request: Request, objective: Objective | None) -> Counter[float]:
    """Return which share is drawn of those that take part in a round, and in how many rounds of the repair."""
    part, rounds = _taking_part(fed, request), max(1, request.repair.rounds)
    training = replace(request.repair.training, objective=objective)
    return Counter(part.share(training.of_round(round, rounds).objective) for round in range(rounds))


def _taking_part(fed: Federation, request: Request) -> Federation:
    return replace(fed, holders=request.holders).keeping(exclude=request.forget, clients=request.clients)


def resolved(settings: Any, request: Request, fed: Federation) -> dict[str, Any] | None:
    """Return the values that a method uses, those of the recipe in the place of None; None for a method without any.

    A share of the rounds is what whole rounds make of it.
    Epochs are left out of a method that goes on until it has cost as much as another.
    """
    if settings is None:
        return None
    used = asdict(settings)
    recipe = {"lr": request.repair.training.lr, "fraction": request.cut.fraction}
    if isinstance(settings, LocalSettings):
        recipe["epochs"] = passes(settings, request, fed)
        if settings.epochs is None and request.spent is not None:
            del used["epochs"]
    if "until" in used:
        rounds = max(1, request.repair.rounds)
        recipe["until"] = round(first_rounds(used.pop("until"), rounds) / rounds, 3)
        used["until"] = None
    return {key: recipe.get(key) if value is None else value for key, value in used.items()}


def as_many(done: Unlearned) -> float:
    """Return the share of channels by which as many go at random as ``done`` lost, or one more.

    That of its cut; where too few channels spoke for the class, the smallest by which as many go.
    """
    cut = done.cut
    speak = [int((scores > 0).sum()) for scores in done.scores.values()]
    widths = [len(scores) for scores in done.scores.values()]
    if cut.scope == "global":
        speak, widths = [sum(speak)], [sum(widths)]
    if cut.end == "lowest" or all(positive >= quota(cut.fraction, width) for positive, width in zip(speak, widths)):
        return cut.fraction
    went = round(done.removed() * sum(widths))

    def goes(fraction: float) -> int:
        return sum(quota(fraction, width) for width in widths)

    shares = {count / width for width in widths for count in range(width)}
    return min(share for share in shares if goes(share) >= went)


def prunes(request: Request) -> bool:
    """Return whether the run that controls stand beside takes any channel out."""
    return isinstance(request.unlearned, Unlearned) and request.cut.fraction > 0


def delivered(model: Classifier, request: Request) -> Subject:
    """Return ``model``, which has a row for every class, without the rows of the forgotten ones."""
    return Subject.without_rows(model, request.forget)


def trained(
    model: Classifier,
    fed: Federation,
    request: Request,
    settings: LocalSettings,
    *,
    phase: str,
) -> Classifier:
    """Return ``model`` after the rounds of the recipe's repair with a method's own objective, rate and epochs.

    Args:
        model: where training starts.
        fed: the clients.
        request: the request.
        settings: of the method; they say what clients minimise.
        phase: name of the rounds in the journal.
    """
    repair, objective = request.repair, settings.objective()
    epochs = repair.training.local_epochs
    if settings.epochs is not None:
        epochs = settings.epochs / sum(n * share for share, n in _shares(fed, request, objective).items())
    lr = repair.training.lr if settings.lr is None else settings.lr
    training = replace(repair.training, lr=lr, local_epochs=epochs, objective=objective)
    rounds = max(1, repair.rounds)
    # No target: a method that starts from the original is at it from the beginning.
    whole = replace(repair, training=training, rounds=rounds, target=None)
    return whole.of(model, _taking_part(fed, request), phase=phase)


def trained_once(
    model: Classifier, fed: Federation, request: Request, settings: LocalSettings, *, objective: Objective, phase: str
) -> Classifier:
    """Return ``model`` after one round of all clients that may hold the class: their teacher is the original.

    In a second round a client would take the average of the first for its teacher. The learning rate is constant.
    Arguments are those of ``trained``.
    """
    repair = request.repair
    epochs = passes(settings, request, fed)
    lr = repair.training.lr if settings.lr is None else settings.lr
    training = replace(repair.training, lr=lr, local_epochs=epochs, objective=objective)
    clients = request.holders if objective.share == 1 else request.clients
    all_of_them = replace(fed, participation=1.0, holders=request.holders)
    kept = all_of_them.keeping(exclude=request.forget, clients=clients)
    return train_rounds(model, kept, training, rounds=1, phase=phase, server=Server())
