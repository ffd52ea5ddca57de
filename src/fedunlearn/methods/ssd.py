"""SSD: J. Foster et al., *Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening*, 2024."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedunlearn.arguments import is_positive
from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.measuring import summed
from fedunlearn.federation.sums import Gradients
from fedunlearn.methods.base import Method, Outcome, Request, delivered
from fedunlearn.training.objectives.base import in_range


@dataclass(frozen=True)
class Ssd:
    """Settings: weights ``above`` times as important for the class as for all are damped, by ``damping``.

    Images of the class are among all, so that no weight is more than ``n / n_forgotten`` times as important: 10 of ten
    equal classes, where the published 10, of 20 and of 100 classes, damps nothing.
    """

    above: float = 10.0
    damping: float = 1.0

    def __post_init__(self) -> None:
        in_range(self, above=is_positive, damping=is_positive)


def ssd(model: Classifier, fed: Federation, request: Request, settings: Ssd) -> Outcome:
    """Damp the weights whose Fisher diagonal is larger on the forgotten classes than on all images, these among them.

    All images are used: of two samples, one with more of the class, ratios are chance.
    """
    stay = fed.besides(request.forget)
    holders, able = fed.keeping(clients=request.holders), fed.keeping(clients=request.clients)
    gone, own = summed(model, holders, Gradients(squared=True, exclude=stay), phase="ssd-forgotten")
    kept, others = summed(model, able, Gradients(squared=True, exclude=request.forget), phase="ssd-kept")
    damped = model.copy()
    factors = dampening(
        {name: value / own for name, value in gone.items()},
        {name: (value + kept[name]) / (own + others) for name, value in gone.items()},
        settings,
    )
    with torch.no_grad():
        weights = dict(damped.module.named_parameters())
        for name, factor in factors.items():
            weights[name].mul_(factor)
    return Outcome(delivered(damped, request), fed.cost("ssd"))


def dampening(forgotten: Mapping[str, Tensor], everything: Mapping[str, Tensor], settings: Ssd) -> dict[str, Tensor]:
    """Return the factor of each weight: ``min(l F / F_f, 1)`` where ``F_f > a F``, 1 elsewhere.

    Args:
        forgotten: ``F_f``, the mean squared gradient on images of the forgotten classes.
        everything: ``F``, that on all images.
        settings: ``a`` and ``l``.
    """
    factors = {}
    for name, f in forgotten.items():
        factor = (settings.damping * everything[name] / f).clamp_max(1)
        factors[name] = torch.where(f > settings.above * everything[name], factor, torch.ones_like(f))
    return factors


SSD = Method(
    "ssd",
    "SSD",
    "squared gradients on images of all classes, one pass",
    ssd,
    settings=Ssd(),
    space={"above": (2.0, 3.0, 4.0, 5.0, 7.0, 10.0), "damping": (0.3, 1.0)},
    source="Foster et al., AAAI 2024",
    other_sums=True,
    sums=True,
)
