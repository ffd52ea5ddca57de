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
        module: its name; that of a parameter which belongs to no layer of a known kind.
        axis: of its tensors: 0 for the output side, 1 for the input side.
        positions: of all the group's channels, ascending; ``k`` in a row per channel where maps were flattened.
        reads: whether it mixes the channels into others; a normalisation or a depthwise convolution hands them on.
    """

    module: str
    axis: int
    positions: tuple[int, ...]
    reads: bool

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
        block: so many neighbouring channels can only go together, a block of a grouped convolution.
        shares: as many channels go of each of so many equal parts, those of a group normalisation.
    """

    layers: tuple[str, ...]
    width: int
    members: tuple[Member, ...]
    block: int = 1
    shares: int = 1

    @property
    def unit(self) -> int:
        """How many channels go at least."""
        return self.block * self.shares

    def units(self, scores: Sequence[float]) -> list[tuple[float, tuple[int, ...]]]:
        """Return the channels that go together, with the mean of their scores.

        Of a group in shares, the best of each share go together, then the second of each, and so on.

        Args:
            scores: one per channel.
        """
        if self.block > 1:
            together = [tuple(range(first, first + self.block)) for first in range(0, self.width, self.block)]
        else:
            part = self.width // self.shares
            ranked = [
                sorted(range(first, first + part), key=lambda channel: -scores[channel])
                for first in range(0, self.width, part)
            ]
            together = [tuple(sorted(channels)) for channels in zip(*ranked)]
        return [(sum(scores[channel] for channel in group) / len(group), group) for group in together]

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
