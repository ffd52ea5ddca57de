"""SCRUB: M. Kurmanji et al., *Towards Unbounded Machine Unlearning*, NeurIPS 2023."""

from __future__ import annotations

from dataclasses import dataclass

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained_once
from fedunlearn.training.objectives.base import in_range, is_positive, is_share, is_weight
from fedunlearn.training.objectives.scrub import Scrub as Objective


@dataclass(frozen=True)
class Scrub(LocalSettings):
    """Settings, see the objective; published: two of three epochs go up, rate 5e-4, weight .5, temperature 4."""

    lr: float | None = 5e-4
    epochs: float | None = 3.0
    distil: float = 0.5
    temperature: float = 4.0
    ascent: float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, distil=is_weight, temperature=is_positive, ascent=is_share)


def scrub(model: Classifier, fed: Federation, request: Request, settings: Scrub) -> Outcome:
    """Leave the original on the images to forget and stay with it on the others, in one round."""
    objective = Objective(settings.distil, settings.temperature, settings.ascent)
    scrubbed = trained_once(model, fed, request, settings, objective=objective, phase="scrub")
    return Outcome(delivered(scrubbed, request), fed.cost("scrub"))


SCRUB = Method(
    "scrub",
    "SCRUB",
    "gradients on images of all classes",
    scrub,
    settings=Scrub(),
    space={"lr": (5e-4, 2e-3, 5e-3, 1e-2), "epochs": (None, 3.0), "temperature": (1.0, 4.0)},
    source="Kurmanji et al., NeurIPS 2023",
)
