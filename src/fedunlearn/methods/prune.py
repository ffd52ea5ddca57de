"""The method of this project, by each of its rankings, and with the erase step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedunlearn.arguments import is_fraction, is_positive, or_none
from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.scores import Criterion, contrast, tf_idf
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import EraseStep, Method, Outcome, Request, as_many
from fedunlearn.methods.erase_only import ERASE_SPACE
from fedunlearn.training.objectives.base import in_range
from fedunlearn.training.objectives.table import Objective
from fedunlearn.unlearn import unlearn

_NEEDS = "forward passes over all images, then gradients on kept images"


@dataclass(frozen=True)
class Prune:
    """Settings: those of the recipe where None."""

    fraction: float | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        in_range(self, fraction=or_none(is_fraction), lr=or_none(is_positive))


@dataclass(frozen=True)
class PruneAndErase(EraseStep, Prune):
    """Settings: also those of the erase step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # refuses what is out of range


def prune(model: Classifier, fed: Federation, request: Request, settings: Prune) -> Outcome:
    """Measure, rank by the request's criterion, prune and repair."""
    training = request.repair.training
    training = replace(training, lr=training.lr if settings.lr is None else settings.lr)
    done = unlearn(
        model,
        fed,
        forget=request.forget,
        cut=request.cut if settings.fraction is None else replace(request.cut, fraction=settings.fraction),
        repair=replace(request.repair, training=training),
        rank=request.rank,
        jointly=request.jointly,
    )
    return Outcome(Subject(done.model, done.repaired), done.cost, as_many(done))


def by_tf_idf(model: Classifier, fed: Federation, request: Request, settings: Prune) -> Outcome:
    """Rank channels by TF-IDF as the paper does; the rest is the recipe's."""
    return prune(model, fed, _ranked(request, tf_idf, None), settings)


def by_contrast(model: Classifier, fed: Federation, request: Request, settings: Prune) -> Outcome:
    """Rank channels by their contrast; the rest is the recipe's."""
    return prune(model, fed, _ranked(request, contrast, None), settings)


def and_erase(model: Classifier, fed: Federation, request: Request, settings: PruneAndErase) -> Outcome:
    """Prune by contrast, and erase in the first rounds of the repair."""
    return prune(model, fed, _ranked(request, contrast, settings.objective()), settings)


def _ranked(request: Request, criterion: Criterion, objective: Objective | None) -> Request:
    """Return the request with another criterion and another objective in the repair."""
    training = replace(request.repair.training, objective=objective)
    chosen = request.rank.criterion
    same = getattr(chosen, "func", chosen) is criterion  # with the options that the recipe gives it
    rank = request.rank if same else replace(request.rank, criterion=criterion)
    return replace(request, rank=rank, repair=replace(request.repair, training=training))


_SPACE: dict[str, tuple[float, ...]] = {"fraction": (0.05, 0.1, 0.15, 0.2, 0.3), "lr": (0.01, 0.02, 0.05)}
TF_IDF = Method(
    "tf_idf",
    "TF-IDF pruning",
    _NEEDS,
    by_tf_idf,
    settings=Prune(),
    space=_SPACE,
    source="Wang et al., WWW 2022",
    measures=True,
)
CONTRAST = Method("contrast", "contrast pruning", _NEEDS, by_contrast, settings=Prune(), space=_SPACE, measures=True)
ERASE = Method(
    "erase",
    "pruning + erase step",
    "forward passes, then gradients on images of all classes",
    and_erase,
    settings=PruneAndErase(),
    space=_SPACE | ERASE_SPACE,
    measures=True,
    erases=True,
)
