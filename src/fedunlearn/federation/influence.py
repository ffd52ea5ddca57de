"""A cap on how much one client's statistics can weigh."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedunlearn.stats import ChannelStats


def limit_influence(parts: Sequence[ChannelStats], cap: float) -> list[ChannelStats]:
    """Return the clients' statistics with those that stand out scaled down, class by class.

    With ``n_k`` the images of a class at client ``k``, ``a_k`` its mean activations in a layer, and medians over the
    clients that hold the class::

        n_k' = min(n_k, cap * median(n))        (rounded down, at least 1)
        a_k' = a_k * min(1, cap * median(|a|) / |a_k|)        sums_k' = n_k' a_k'

    Norm clipping, as Sun et al., *Can You Really Backdoor Federated Learning?* (2019), do it to updates. It bounds how
    much a client weighs, not in which direction, as long as most that hold a class are honest.

    Args:
        parts: one per client.
        cap: how many times the median a client may weigh, at least 1.
    """
    counts = torch.stack([part.counts for part in parts])
    held = counts > 0
    limit = (cap * _median(counts.double(), held)).floor().clamp_min(1)
    fewer = torch.minimum(counts.double(), limit).long()
    sums: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    for layer in parts[0].sums:
        means = torch.stack([part.sums[layer] for part in parts]) / counts.clamp_min(1)[:, :, None]
        norms = means.norm(dim=2)
        scale = (cap * _median(norms, held) / norms.clamp_min(1e-300)).clamp_max(1)
        for own, limited in zip(sums, means * (scale * fewer)[:, :, None]):
            own[layer] = limited
    return [ChannelStats(own, count) for own, count in zip(sums, fewer)]


def _median(values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Return the median over clients that hold the class, the lower of two, shape ``(classes,)``; 0 where none does."""
    return values.where(held, torch.nan).nanmedian(dim=0).values.nan_to_num(0.0)
