"""A group: layers that lose channels together, and every tensor that this cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedunlearn.channels.slicing import Kept, parameter_layers


@dataclass(frozen=True)
class Member:
    """One side of one module in a group.

    Attributes:
        module: its name.
        axis: of its tensors: 0 for the output side, 1 for the input side.
        positions: of all the group's channels, ascending; ``k`` in a row per channel where maps were flattened.
    """

    module: str
    axis: int
    positions: tuple[int, ...]

    def of(self, channels: Sequence[int], width: int) -> list[int]:
        """Return the positions of these ``channels``, in a group of ``width`` channels."""
        k = len(self.positions) // width
        return [self.positions[c * k + i] for c in channels for i in range(k)]


@dataclass(frozen=True)
class Group:
    """Convolutions whose output channels can only be removed together, and all that consumes them.

    Attributes:
        layers: the convolutions, in the order of the model.
        width: their channels.
        members: every module side that carries these channels (axis 0 output, axis 1 input).
    """

    layers: tuple[str, ...]
    width: int
    members: tuple[Member, ...]

    def kept(self, model: nn.Module, removed: Sequence[int]) -> Kept:
        """Return ``tensor -> axis -> kept positions`` when the channels ``removed`` go."""
        gone: dict[tuple[str, int], set[int]] = {}
        for member in self.members:
            gone.setdefault((member.module, member.axis), set()).update(member.of(removed, self.width))
        kept: dict[str, dict[int, tuple[int, ...]]] = {}
        for (name, axis), positions in gone.items():
            for tensor, size in parameter_layers(model, name, axis):
                kept.setdefault(tensor, {})[axis] = tuple(i for i in range(size) if i not in positions)
        return kept
