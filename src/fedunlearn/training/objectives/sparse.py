"""l1-sparse: an L1 penalty on all weights while the images that stay are learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedunlearn.arguments import is_share, is_weight
from fedunlearn.training.objectives.base import Seen, in_range


@dataclass(frozen=True)
class Sparse:
    """``CE(kept) + penalty * sum |w|``, the penalty going to 0 in a straight line over the rounds that have it.

    J. Jia et al., *Model Sparsity Can Simplify Machine Unlearning*, NeurIPS 2023.

    Attributes:
        penalty: its weight, in the first of ``n`` such rounds; ``1 - r / n`` of it in round ``r``.
        until: share of the rounds with it.

    Raises:
        RecipeError: a value is out of range.
    """

    penalty: float
    until: float = 1.0
    kind: Literal["sparse"] = "sparse"
    share: ClassVar[float] = 0.0
    teacher: ClassVar[bool] = False
    every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        in_range(self, penalty=is_weight, until=is_share)

    def faded(self, progress: float) -> Sparse:
        """Return the objective of a round."""
        return replace(self, penalty=self.penalty * (1 - progress))

    def loss(self, seen: Seen) -> Tensor:
        """Return the loss of a batch."""
        size = torch.stack([weight.abs().sum() for weight in seen.weights]).sum()
        return seen.cross_entropy(~seen.forgotten) + self.penalty * size
