"""SCRUB: away from the received model on the images to forget, with it on the images that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedunlearn.training.objectives.base import Seen, in_range, is_part, is_positive, is_share, is_weight, kl


@dataclass(frozen=True)
class Scrub:
    """``distil KL(t, z) + CE`` on the images that stay, ``- KL(t, z)`` on those to forget; ``t`` as received.

    M. Kurmanji et al., *Towards Unbounded Machine Unlearning*, NeurIPS 2023. Published are turns: an epoch away from
    ``t``, an epoch back. Here both are in one step, as long as ``ascent`` lasts; the rest of the steps only goes back.

    Attributes:
        distil: weight of the divergence on the images that stay.
        temperature: of both divergences.
        ascent: share of the client's steps in a round that go away from ``t``.
        share: the part of each batch that is of the forgotten classes.
        until: share of the rounds with it.

    Raises:
        RecipeError: a value is out of range.
    """

    distil: float
    temperature: float = 1.0
    ascent: float = 1.0
    share: float = 0.25
    until: float = 1.0
    kind: Literal["scrub"] = "scrub"
    teacher: ClassVar[bool] = True
    every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        in_range(self, distil=is_weight, temperature=is_positive, ascent=is_share, share=is_part, until=is_share)

    def loss(self, seen: Seen) -> Tensor:
        """Return the loss of a batch."""
        of, t = seen.forgotten, self.temperature
        loss = self.distil * kl(seen.teacher(~of), seen.logits[~of], t) + seen.cross_entropy(~of)
        if seen.progress < self.ascent:
            loss = loss - kl(seen.teacher(of), seen.logits[of], t)
        return loss
