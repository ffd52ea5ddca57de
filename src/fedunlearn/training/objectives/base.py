"""What a local objective is: a loss that is made of one batch, and the part of it that is of the forgotten classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedunlearn.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Seen:
    """What a step of local training sees.

    Attributes:
        logits: float32, shape ``(images, classes)``.
        labels: shape ``(images,)``.
        features: what the last layer receives, shape ``(images, width)``.
        forgotten: which images are of the forgotten classes, bool, shape ``(images,)``.
        forget: the forgotten classes.
        before: logits of the model as the client received it, for an objective with ``teacher``.
        weights: the trained parameters.
        smoothing: label smoothing of the recipe.
        progress: share of the client's steps in this round that are done.
        earlier: what it was one step before; None in the first.
        draw: owner of random choices.
    """

    logits: Tensor
    labels: Tensor
    features: Tensor
    forgotten: Tensor
    forget: Sequence[int]
    before: Tensor | None
    weights: Sequence[Tensor]
    smoothing: float
    progress: float
    earlier: float | None
    draw: torch.Generator

    def cross_entropy(self, which: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of the images that the mask ``which`` picks, 0 where it picks none.

        Args:
            which: bool, shape ``(images,)``.
            labels: in the place of the images' own, shape ``(picked,)``.
        """
        if not bool(which.any()):
            return self.logits.sum() * 0
        wanted = self.labels[which] if labels is None else labels
        return F.cross_entropy(self.logits[which], wanted, label_smoothing=self.smoothing)

    def teacher(self, which: Tensor, *, without_forgotten: bool = False) -> Tensor:
        """Return the logits that the received model gives the images of the mask ``which``.

        Args:
            which: bool, shape ``(images,)``.
            without_forgotten: those of the forgotten classes are minus infinity.
        """
        assert self.before is not None  # the objective says that it needs them
        logits = self.before[which]
        if without_forgotten:
            logits = logits.clone()
            logits[:, list(self.forget)] = float("-inf")
        return logits


class Local(Protocol):
    """A local objective: a frozen dataclass of numbers and names, which pydantic reads from a message as it is."""

    @property
    def kind(self) -> str:
        """Its name in messages."""

    @property
    def share(self) -> float:
        """The part of each batch that is of a forgotten class, at least an image; 0: none, 1: all of it."""

    @property
    def until(self) -> float:
        """Share of the rounds, the first ones, in which it is used; the others minimise the cross-entropy alone."""

    @property
    def every(self) -> int:
        """Of these rounds it is used in the first and then in every ``every``-th."""

    @property
    def teacher(self) -> bool:
        """Whether it needs what the model as received makes of the batch."""

    def loss(self, seen: Seen) -> Tensor:
        """Return the loss of a batch."""


@runtime_checkable
class ByTurns(Protocol):
    """A local objective of which each step takes images of one kind alone, to forget or not."""

    def turn(self, progress: float, earlier: float | None) -> int | None:
        """Return to which turn a step on images to forget belongs; None for a step on the others.

        Args:
            progress: share of the client's steps in this round that are done.
            earlier: what it was one step before; None in the first.
        """


@runtime_checkable
class Fading(Protocol):
    """A local objective that is weaker from round to round."""

    def faded(self, progress: float) -> Local:
        """Return the objective of a round.

        Args:
            progress: share of the rounds in which it is used that are done.
        """


def first_rounds(until: float, rounds: int) -> int:
    """Return how many of ``rounds`` the share ``until`` is: whole ones, and at least one."""
    return max(1, int(until * rounds + 0.5))


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean ``T^2 KL(softmax(teacher / T), softmax(student / T))`` of logits, shape ``(images, classes)``.

    Example:
        >>> kl(torch.tensor([[0.0, float("-inf")]]), torch.tensor([[0.0, 0.0]]))  # -log(1/2)
        tensor(0.6931)
    """
    p = (teacher / temperature).softmax(1)
    gained = torch.special.xlogy(p, p) - p * (student / temperature).log_softmax(1)
    loss: Tensor = temperature**2 * gained.sum(1).mean()
    return loss


def in_range(settings: Any, **checks: Callable[[Any], bool]) -> None:
    """Refuse settings of which a value fails its check.

    Raises:
        RecipeError: names the value.
    """
    for name, valid in checks.items():
        value = getattr(settings, name)
        if not valid(value):
            raise RecipeError(f"{type(settings).__name__}({name}=...) is out of range: got {value!r}")
