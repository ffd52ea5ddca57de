"""SCRUB: away from the received model on the images to forget, then back to it on the images that stay, by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedunlearn.arguments import is_count, is_part, is_positive, is_weight
from fedunlearn.training.objectives.base import Seen, in_range, kl


@dataclass(frozen=True)
class Scrub:
    """``- KL(t, z)`` on the images to forget, then ``distil KL(t, z) + CE`` on those that stay; ``t`` as received.

    M. Kurmanji et al., *Towards Unbounded Machine Unlearning*, NeurIPS 2023: each epoch begins with a pass over the
    images to forget, as long as ``ascents`` last, and goes on with one over the others.

    Attributes:
        distil: weight of the divergence on the images that stay.
        temperature: of both divergences.
        turns: into how many a client's round is divided, all of the same length.
        ascents: how many of them, the first ones, begin with steps away from ``t``.
        away: share of the steps of such a turn that go away, at least one of them.
        share: the part of each batch that is of a forgotten class; of several see ``each_of``.

    Raises:
        RecipeError: a value is out of range.
    """

    distil: float
    temperature: float = 1.0
    turns: int = 3
    ascents: int = 2
    away: float = 0.1
    share: float = 0.25
    kind: Literal["scrub"] = "scrub"
    teacher: ClassVar[bool] = True
    until: ClassVar[float] = 1.0
    every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        in_range(self, distil=is_weight, temperature=is_positive, turns=is_count, ascents=is_count)
        in_range(self, away=is_part, share=is_part)

    def loss(self, seen: Seen) -> Tensor:
        """Return the loss of a batch, of which a step takes one kind of images."""
        of, t = seen.forgotten, self.temperature
        if self.turn(seen.progress, seen.earlier) is not None:
            return -kl(seen.teacher(of), seen.logits[of], t)
        return self.distil * kl(seen.teacher(~of), seen.logits[~of], t) + seen.cross_entropy(~of)

    def turn(self, progress: float, earlier: float | None) -> int | None:
        """Return the turn of a step away; None for a step on the images that stay."""
        turn, within = divmod(progress * self.turns, 1)
        # A turn of few steps, of which none is in its first share, would have none away.
        begins = earlier is None or earlier * self.turns // 1 < turn
        return int(turn) if turn < self.ascents and (begins or within < self.away) else None
