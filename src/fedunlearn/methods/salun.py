"""SalUn: C. Fan et al., *SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency*, ICLR 2024."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedunlearn.arguments import is_share
from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.measuring import summed
from fedunlearn.federation.sums import Gradients
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained
from fedunlearn.training.objectives.base import in_range
from fedunlearn.training.objectives.relabel import Relabel


@dataclass(frozen=True)
class SalUn(LocalSettings):
    """Settings: the share ``salient`` of all weights, those with the largest gradients, may change."""

    lr: float | None = 0.013
    epochs: float | None = 10.0
    salient: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, salient=is_share)

    def objective(self) -> Relabel:
        """Return what clients minimise."""
        return Relabel("random")


def salun(model: Classifier, fed: Federation, request: Request, settings: SalUn) -> Outcome:
    """Train with random labels for the images to forget, then put all weights back that are not salient.

    Published is a mask on each step. Here the server puts back what is outside the mask after the rounds, so that
    clients need not know it.
    """
    stay = fed.besides(request.forget)
    task = Gradients(exclude=stay, sample=request.rank.sample)
    sums, _ = summed(model, fed.keeping(clients=request.holders), task, phase="salun-gradients")
    moved = trained(model, fed, request, settings, phase="salun")
    before = dict(model.module.named_parameters())
    # In the order of the model: of equal gradients the first are chosen, and what a journal gives back is sorted.
    masks = largest({name: sums[name] for name in before if name in sums}, settings.salient)
    with torch.no_grad():
        weights = dict(moved.module.named_parameters())
        for name, salient in masks.items():
            weights[name].copy_(torch.where(salient, weights[name], before[name]))
    return Outcome(delivered(moved, request), fed.cost("salun"))


def largest(sums: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return masks of the ``share`` of all values, over all tensors, that are largest by absolute value."""
    sizes = torch.cat([gradient.abs().flatten() for gradient in sums.values()])
    count = max(1, round(share * len(sizes)))
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[sizes.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(chosen, [gradient.numel() for gradient in sums.values()])
    return {name: part.reshape(gradient.shape) for (name, gradient), part in zip(sums.items(), parts)}


SALUN = Method(
    "salun",
    "SalUn",
    "gradients on images of all classes",
    salun,
    settings=SalUn(),
    space={"lr": (0.005, 0.013, 0.03), "epochs": (None, 10.0), "salient": (0.3, 0.5, 0.8)},
    source="Fan et al., ICLR 2024",
    other_sums=True,
)
