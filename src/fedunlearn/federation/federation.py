"""A federation: who takes part, who keeps the record, and who owns the draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fedunlearn.arguments import is_share, is_whole, must_be
from fedunlearn.channels.plan import Classifier
from fedunlearn.errors import FederationError, ModelError
from fedunlearn.federation.about import asked
from fedunlearn.federation.jobs import Engine, Job, Task
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.ledger import Cost
from fedunlearn.training.objectives.base import Local


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
        holders: those of the clients that may hold images of ``exclude``: they alone take part in a round whose
            objective needs them, or an average with all others would undo their work. All where None.
        request: what the steps are done for, which the journal holds them to, see ``asked``.
        measured: whether ``clients`` and ``holders`` are those that a measurement found, and nobody's choice.

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
    holders: tuple[str, ...] | None = None
    request: Mapping[str, str] = field(default_factory=dict)
    measured: bool = False

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
        if not is_share(self.participation):
            raise FederationError(
                f"Federation(participation=...) must lie above 0 and at most at 1, got {self.participation!r}"
            )
        for part, names in (("clients", self.clients), ("holders", self.holders)):
            if names is not None and not _several(names, lambda name: isinstance(name, str)):
                raise FederationError(f"Federation({part}=...) must be names in a tuple, or None, got {names!r}")
            if names is not None and len(set(names)) < len(names):
                raise FederationError(f"Federation({part}=...) must name each client once, got {names!r}")
        if not _several(self.exclude, lambda label: is_whole(label, 0)):
            raise FederationError(
                f"Federation(exclude=...) must be numbers of classes in a tuple, got {self.exclude!r}"
            )
        # NumPy's numbers are told otherwise in the journal, and not at all in a message.
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "exclude", tuple(int(label) for label in self.exclude))

    def keeping(self, *, exclude: Sequence[int] = (), clients: Sequence[str] | None = None) -> Federation:
        """Return the federation without ``exclude`` either; only ``clients`` take part where they are given."""
        able = self.clients if clients is None else tuple(clients)
        return replace(self, exclude=tuple(sorted({*self.exclude, *exclude})), clients=able)

    def besides(self, classes: Collection[int]) -> tuple[int, ...]:
        """Return the clients' other classes."""
        return tuple(label for label in range(self.engine.classes) if label not in classes)

    def able(self, objective: Local | None = None) -> list[str]:
        """Return the clients that take part in training, sorted; with an objective those that may hold its images.

        All of them where none of the holders takes part.
        """
        clients = sorted(self.engine.clients if self.clients is None else self.clients)
        if objective is None or not objective.share or self.holders is None:
            return clients
        return [name for name in clients if name in self.holders] or clients

    def drawn(self, objective: Local | None = None) -> int:
        """Return how many of ``able`` are drawn in a round: ``participation`` of them, rounded, and one at least."""
        return max(1, int(self.participation * len(self.able(objective)) + 0.5))

    def share(self, objective: Local | None = None) -> float:
        """Return which share of ``able`` is drawn in a round; of a few clients that is not ``participation``."""
        return self.drawn(objective) / max(1, len(self.able(objective)))

    def named(self, objective: Local | None = None) -> list[str] | None:
        """Return ``able``; None where others may join, whom nobody chose: who takes part may change meanwhile."""
        open_to_all = self.measured or (self.clients is None and self.holders is None)
        return None if open_to_all and self.grows() else self.able(objective)

    def grows(self) -> bool:
        """Return whether clients may join that nobody named."""
        return bool(getattr(self.engine, "grows", False))

    def has_holders(self) -> bool:
        """Return whether somebody takes part who may hold images of ``exclude``."""
        return self.holders is None or not set(self.holders).isdisjoint(self.able())

    def about(self, **values: object) -> dict[str, str]:
        """Return what a step of these values is about: the request, the values, and the owner of its draws.

        Where the journal lasts, also the images of an engine that has them here: with others it is another step.
        """
        digest = getattr(self.engine, "digest", None) if self.journal.lasts else None
        images = {} if digest is None else {"images": digest}
        return {**self.request, **asked(**values, seed=self.seed, **images)}

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


def whole_model(model: nn.Module | Classifier, fed: Federation) -> Classifier:
    """Return ``model`` as a classifier of the clients' images; refuse one without a row for every class, in order.

    Raises:
        ModelError: it is no such model, or its weights are not finite.
        FederationError: ``fed`` is no federation, or excludes a class that there is not.
    """
    must_be(Federation, fed, "the federation", "a Federation, such as Federation(engine)", FederationError)
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


def check_somebody(fed: Federation) -> None:
    """Refuse a federation of which nobody takes part in training.

    Raises:
        FederationError: no client is able to.
    """
    if not fed.able():
        raise FederationError("no client has images of the kept classes: there is nobody to train with")
