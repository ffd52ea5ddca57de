"""What a method is: how it is named, what it needs, and what it makes of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier, Cut
from fedunlearn.channels.scores import Ranking
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.rounds import Repair
from fedunlearn.unlearn import Unlearned


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be forgotten, and the settings of the run that methods share.

    Attributes:
        forget: classes to forget.
        rank: how channels are measured and ranked.
        cut: how many channels go.
        repair: local settings and rounds after an edit.
        jointly: whether several classes are scored as one.
        unlearned: what pruning and repair made of the model: methods of equal cost stop at its cost.
        images: images of the kept classes that the clients of one round hold, on average.
    """

    forget: tuple[int, ...]
    rank: Ranking
    cut: Cut
    repair: Repair
    jointly: bool
    unlearned: Unlearned
    images: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method made of a model.

    Attributes:
        subject: the model as it would be delivered.
        cost: what it cost the clients; None where that is nothing beyond what unlearning did.
    """

    subject: Subject
    cost: Cost | None = None


@dataclass(frozen=True)
class Method:
    """A way to make a model forget, or a control that only seems to be one.

    Attributes:
        name: in files and recipes.
        label: in tables.
        needs: what it asks of the clients.
        run: makes the model forget: ``run(original, federation, request)``.
        applies: whether it differs from unlearning itself, and from the other controls.
    """

    name: str
    label: str
    needs: str
    run: Callable[[Classifier, Federation, Request], Outcome]
    applies: Callable[[Request], bool] = lambda request: True


def prunes(request: Request) -> bool:
    """Return whether any channel is to go."""
    return request.cut.fraction > 0


def delivered(model: Classifier, request: Request) -> Subject:
    """Return ``model``, which has a row for every class, without the rows of the forgotten ones."""
    return Subject(model.without_rows(request.forget), model)
