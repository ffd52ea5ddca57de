"""Cut rows and columns out of the tensors of a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

# tensor name -> axis -> the positions that stay
Kept = Mapping[str, Mapping[int, tuple[int, ...]]]


def parameter_layers(model: nn.Module, module: str, axis: int) -> list[tuple[str, int]]:
    """Return name and length of the tensors of ``module`` that carry channels on ``axis`` (0 output, 1 input).

    A module under two names has its tensors under both, as in the state of the model.
    """
    owner = model.get_submodule(module)
    tensors = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
    names = [name for name, own in model.named_modules(remove_duplicate=False) if own is owner]
    return [(f"{name}.{own}", tensor.shape[axis]) for name in names for own, tensor in tensors if tensor.ndim > axis]


def combine(parts: Iterable[Kept]) -> dict[str, dict[int, tuple[int, ...]]]:
    """Return what all ``parts`` keep: groups meet in one tensor where maps are concatenated."""
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for part in parts:
        for name, axes in part.items():
            for axis, positions in axes.items():
                before = kept.setdefault(name, {}).get(axis)
                kept[name][axis] = positions if before is None else tuple(sorted(set(before) & set(positions)))
    return kept


def slice_tensors(model: nn.Module, kept: Kept) -> None:
    """Keep only the named positions of each tensor of ``model`` and bring its modules' sizes in line."""
    owners = set()
    done = set()
    for name, axes in kept.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if (owner, attribute) in done:  # it has two names
            continue
        done.add((owner, attribute))
        owners.add(owner)
        tensor: Tensor = getattr(owner, attribute)
        value = tensor.detach()
        for axis, positions in axes.items():
            value = value.index_select(axis, torch.tensor(positions, dtype=torch.int64, device=value.device))
        if isinstance(tensor, nn.Parameter):
            setattr(owner, attribute, nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            setattr(owner, attribute, value)
    for owner in owners:
        if isinstance(owner, nn.Conv2d):
            owner.out_channels, owner.in_channels = owner.weight.shape[:2]
        elif isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif isinstance(owner, (nn.BatchNorm1d, nn.BatchNorm2d)):
            owner.num_features = next(
                len(tensor) for tensor in (owner.weight, owner.running_mean) if tensor is not None
            )
