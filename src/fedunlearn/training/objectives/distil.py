"""DELETE: distillation from the received model without the forgotten classes, on their images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedunlearn.training.objectives.base import Seen, kl


@dataclass(frozen=True)
class Distil:
    """``KL(softmax(t with t_c = -inf), softmax(z))`` on images of the forgotten classes ``c``; ``t`` as received.

    Y. Zhou et al., *Decoupled Distillation to Erase*, CVPR 2025.
    """

    kind: Literal["distil"] = "distil"
    share: ClassVar[float] = 1.0
    teacher: ClassVar[bool] = True
    until: ClassVar[float] = 1.0
    every: ClassVar[int] = 1

    def loss(self, seen: Seen) -> Tensor:
        """Return the loss of a batch, all of it of the forgotten classes."""
        return kl(seen.teacher(seen.forgotten, without_forgotten=True), seen.logits[seen.forgotten])
