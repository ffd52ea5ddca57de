"""NegGrad+: up the loss of the images to forget, down that of the images that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedunlearn.arguments import is_part
from fedunlearn.training.objectives.base import Seen, in_range


@dataclass(frozen=True)
class Ascend:
    """``b CE(kept) - (1 - b) CE(forgotten)``: it has no lower end, and a small ``b`` ends in infinity.

    M. Kurmanji et al., *Towards Unbounded Machine Unlearning*, NeurIPS 2023, section 4 (NegGrad+).

    Attributes:
        kept: ``b``.
        share: the part of each batch that is of a forgotten class; of several see ``each_of``.

    Raises:
        RecipeError: a value is out of range.
    """

    kept: float
    share: float = 0.25
    kind: Literal["ascend"] = "ascend"
    teacher: ClassVar[bool] = False
    until: ClassVar[float] = 1.0
    every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        in_range(self, kept=is_part, share=is_part)

    def loss(self, seen: Seen) -> Tensor:
        """Return the loss of a batch."""
        up = seen.cross_entropy(seen.forgotten)
        return self.kept * seen.cross_entropy(~seen.forgotten) - (1 - self.kept) * up
