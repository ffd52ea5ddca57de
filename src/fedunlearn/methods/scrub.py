"""SCRUB: M. Kurmanji et al., *Towards Unbounded Machine Unlearning*, NeurIPS 2023."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.arguments import is_share
from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, passes, trained_once
from fedunlearn.training.objectives.base import in_range
from fedunlearn.training.objectives.scrub import Scrub as Objective


@dataclass(frozen=True)
class Scrub(LocalSettings):
    """Settings, as the released code has them for large data.

    Away in two of three epochs, rate 5e-4, weight .001, temperature 4; for small data Adam, ten epochs, .5 and 2.

    Attributes:
        distil: weight of the divergence on the images that stay.
        temperature: of both divergences.
        ascent: share of the epochs, the first ones, that begin with steps away from the original.
        away: share of the steps of such an epoch that go away: a pass over a class among ten.
    """

    lr: float | None = 5e-4
    epochs: float | None = 3.0
    distil: float = 1e-3
    temperature: float = 4.0
    ascent: float = 2 / 3
    away: float = 0.1

    def __post_init__(self) -> None:
        in_range(self, ascent=is_share)  # first: its number of turns is made of it
        super().__post_init__()

    def objective(self, turns: int = 1) -> Objective:
        """Return what clients minimise in so many turns."""
        return Objective(self.distil, self.temperature, turns, max(1, round(self.ascent * turns)), self.away)


def scrub(model: Classifier, fed: Federation, request: Request, settings: Scrub) -> Outcome:
    """Leave the original on the images to forget and stay with it on the others, in one round."""
    turns = max(1, round(passes(settings, request, fed)))  # an epoch each
    scrubbed = trained_once(model, fed, request, settings, objective=settings.objective(turns), phase="scrub")
    return Outcome(delivered(scrubbed, request), fed.cost("scrub"))


SCRUB = Method(
    "scrub",
    "SCRUB",
    "gradients on images of all classes",
    scrub,
    settings=Scrub(),
    space={"lr": (5e-4, 5e-3, 2e-2, 5e-2), "distil": (1e-3, 0.5), "temperature": (1.0, 4.0), "away": (0.1, 0.3)},
    source="Kurmanji et al., NeurIPS 2023",
)
