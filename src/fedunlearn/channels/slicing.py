"""Cut rows and columns out of the tensors of a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.channels.kinds import resize

# tensor name -> axis -> the positions that stay
Kept = Mapping[str, Mapping[int, tuple[int, ...]]]


def parameter_layers(model: nn.Module, module: str, axis: int) -> list[tuple[str, int]]:
    """Return name and length of the tensors of ``module`` that carry channels on ``axis`` (0 output, 1 input).

    A module under two names has its tensors under both, as in the state of the model. ``module`` may also name a
    parameter that belongs to no layer of a known kind.
    """
    alone = dict(model.named_parameters(remove_duplicate=False)).get(module)
    if alone is not None:
        return [(module, alone.shape[axis])] if alone.ndim > axis else []
    owner = model.get_submodule(module)
    tensors = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
    names = [name for name, candidate in model.named_modules(remove_duplicate=False) if candidate is owner]
    return [(f"{name}.{leaf}", tensor.shape[axis]) for name in names for leaf, tensor in tensors if tensor.ndim > axis]


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
    """Keep only the named positions of each tensor of ``model`` and bring its modules' sizes in line.

    Raises:
        PlanError: blocks of a grouped layer would be left that differ in size.
    """
    owners: dict[nn.Module, tuple[str, Sequence[int] | None]] = {}  # with name and channels that stay
    done = set()
    for name, axes in kept.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if (owner, attribute) in done:  # it has two names
            continue
        done.add((owner, attribute))
        owners[owner] = path, axes.get(0, owners.get(owner, (path, None))[1])
        tensor: Tensor = getattr(owner, attribute)
        value = tensor.detach()
        for axis, positions in axes.items():
            value = value.index_select(axis, torch.tensor(positions, dtype=torch.int64, device=value.device))
        if isinstance(tensor, nn.Parameter):
            setattr(owner, attribute, nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            setattr(owner, attribute, value)
    for owner, (path, staying) in owners.items():
        resize(owner, path, staying)
