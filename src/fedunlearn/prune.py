"""Removing channels for real: smaller tensors, no masks."""

from __future__ import annotations

import copy

from torch import nn

from fedunlearn.plan import PruningPlan
from fedunlearn.slicing import slice_tensors


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of ``model`` with every tensor cut to what ``plan`` keeps.

    Raises:
        PlanError: the plan was made for another architecture.
    """
    plan.check(model)
    pruned = copy.deepcopy(model)
    slice_tensors(pruned, plan.kept)
    return pruned
