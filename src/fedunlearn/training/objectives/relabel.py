"""Other labels for the images to forget: random ones (SalUn) or the likeliest of the classes that stay (FUCRT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedunlearn.arguments import is_part
from fedunlearn.training.objectives.base import Seen, in_range


@dataclass(frozen=True)
class Relabel:
    """Cross-entropy, the images to forget with labels among the classes that stay.

    Attributes:
        to: ``"random"``: drawn anew for each step; ``"likeliest"``: what the model as received says of the image when
            the forgotten classes are left out.
        share: the part of each batch that is of a forgotten class; of several see ``each_of``.

    Raises:
        RecipeError: a value is out of range.
    """

    to: Literal["random", "likeliest"]
    share: float = 0.25
    kind: Literal["relabel"] = "relabel"
    until: ClassVar[float] = 1.0
    every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        in_range(self, to=lambda value: value in ("random", "likeliest"), share=is_part)

    @property
    def teacher(self) -> bool:
        """The likeliest class is that of the received model."""
        return self.to == "likeliest"

    def loss(self, seen: Seen) -> Tensor:
        """Return the loss of a batch."""
        of = seen.forgotten
        share = float(of.float().mean())
        if self.to == "likeliest":
            labels = seen.teacher(of, without_forgotten=True).argmax(1)
        else:
            kept = torch.tensor([k for k in range(seen.logits.shape[1]) if k not in seen.forget])
            drawn = torch.randint(len(kept), (int(of.sum()),), generator=seen.draw)
            labels = kept[drawn].to(seen.labels.device)
        return (1 - share) * seen.cross_entropy(~of) + share * seen.cross_entropy(of, labels)
