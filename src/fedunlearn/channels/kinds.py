"""The kinds of layers whose tensors are cut, and what beside its tensors tells such a layer its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedunlearn.errors import PlanError

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # they normalise an image over its channels
FOLLOWED = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.PReLU, *NORMS)


def blocks_of(module: nn.Module) -> int:
    """Return into how many blocks of channels ``module`` divides its input, each of which it treats on its own.

    1 of a layer that reads all its channels together, or each by itself.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def block_size(module: nn.Module) -> int:
    """Return how many channels of its output one of these blocks has."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups
    return module.out_channels // module.groups if isinstance(module, nn.Conv2d) else 0


def passes_on(module: nn.Module) -> bool:
    """Return whether ``module`` is a grouped convolution that makes of each block as many channels as it reads.

    A depthwise one, say: its channels go where those that it reads go.
    """
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.in_channels == module.out_channels


def channel_axis(module: nn.Module) -> int:
    """Return the axis of the channels in what ``module`` reads: the last one of a linear layer, say, otherwise 1.

    Layer normalisations of others' own kind, such as those of image networks, take maps as convolutions do.
    """
    last = isinstance(module, nn.Linear) or type(module) in (nn.LayerNorm, nn.RMSNorm)
    return -1 if last else 1


def resize(module: nn.Module, name: str, kept: Sequence[int] | None) -> None:
    """Bring the size that ``module`` tells in line with its tensors.

    Args:
        module: its tensors were cut.
        name: of the module, for the message.
        kept: the channels of its output that stay; None for all.

    Raises:
        PlanError: blocks would be left that differ in size.
    """
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 and (kept is None or len(kept) != len(module.weight)):
            raise PlanError(
                f"the plan cuts the grouped convolution {name} otherwise than by its blocks: it was changed"
            )
        if kept is not None and module.groups > 1:
            module.groups = _blocks(kept, module.out_channels, module.groups, whole=True, name=name)
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)):
        module.num_features = next(len(tensor) for tensor in (module.weight, module.running_mean) if tensor is not None)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.GroupNorm) and kept is not None:
        module.num_groups = _blocks(kept, module.num_channels, module.num_groups, whole=False, name=name)
        module.num_channels = len(kept)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _blocks(kept: Sequence[int], width: int, blocks: int, *, whole: bool, name: str) -> int:
    """Return how many of ``blocks`` equal blocks of ``width`` channels are left; ``whole``: only as they were."""
    size = width // blocks
    counts = torch.bincount(torch.tensor(kept, dtype=torch.int64) // size, minlength=blocks).tolist()
    left = [count for count in counts if count]
    if len(set(left)) > 1 or (whole and left[0] != size):
        raise PlanError(
            f"the plan keeps {counts} of the {size} channels in each of the {blocks} blocks of {name}: whole blocks "
            f"can go{'' if whole else ', or as many channels of each'}"
        )
    return len(left)
