"""Federated averaging (McMahan et al., *Communication-Efficient Learning of Deep Networks*, AISTATS 2017)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def fedavg(updates: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Average states, weighted by images, batch normalisation buffers included.

    ::

        state[n] = sum_k images_k * state_k[n] / sum_k images_k

    Args:
        updates: states by tensor name, each with its number of images, which is above 0.

    Returns:
        The average: floats summed in float64 in the order given and returned in their own type; of integer buffers
        (batch counters) the largest, so that they stay integers.
    """
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    total = 0
    for state, images in updates:
        total += images
        for name, tensor in state.items():
            types[name] = tensor.dtype
            if tensor.is_floating_point():
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
                sums[name].add_(tensor, alpha=images)
            else:
                sums[name] = torch.maximum(sums[name], tensor) if name in sums else tensor
    return {
        name: (value / total).to(types[name]) if types[name].is_floating_point else value
        for name, value in sums.items()
    }
