"""What is audited: a model as delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedunlearn.groups import head_layer
from fedunlearn.plan import plan_without_rows
from fedunlearn.prune import prune


@dataclass(frozen=True, eq=False)
class Subject:
    """A model as delivered.

    Attributes:
        model: the CNN.
        labels: the class of each of its output rows.
        row_kept: the same model with a row for every class, where it is known; it can show what the missing rows hide.
    """

    model: nn.Module
    labels: tuple[int, ...]
    row_kept: nn.Module | None = None


def without_rows(
    model: nn.Module, forget: Sequence[int], *, classes: int, shape: tuple[int, int, int], row_known: bool = True
) -> Subject:
    """Return ``model``, which has a row for every class, delivered without those of ``forget``.

    Args:
        model: the CNN.
        forget: classes whose rows go.
        classes: number of classes.
        shape: ``(colours, height, width)`` of the images.
        row_known: keep the model with all its rows for the audits that need one; not so for a model whose only edit
            is that its rows are gone.
    """
    head = head_layer(model, torch.zeros((1, *shape)))
    labels = tuple(label for label in range(classes) if label not in forget)
    delivered = prune(model, plan_without_rows(model, head, forget))
    return Subject(delivered, labels, model if row_known else None)
