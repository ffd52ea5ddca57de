"""Copies of the global model for the workers of an engine, kept from job to job."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedunlearn.compute import Compute


@dataclass(frozen=True, eq=False)
class Values:
    """The values of a model at the start of a job.

    Attributes:
        model: the model.
        tensors: its parameters and buffers.
    """

    model: nn.Module
    tensors: tuple[Tensor, ...]

    @staticmethod
    def of(model: nn.Module) -> Values:
        """Return the values of ``model``; they are not copied."""
        return Values(model, _tensors(model))


@dataclass
class _Copy:
    model: nn.Module
    source: Callable[[], nn.Module | None]
    holds: Values | None = None  # what it was filled with, where nothing has worked on it since


class Copies:
    """Copies that each serve one worker at a time; as many exist as were ever in use together.

    A copy has the values of the model's parameters and buffers; of what else a module may keep, it has its own.

    Args:
        compute: the memory format of the copies.
        device: where they are.
    """

    def __init__(self, compute: Compute, device: torch.device) -> None:
        self._compute = compute
        self._device = device
        self._idle: list[_Copy] = []

    @contextmanager
    def filled(self, values: Values) -> Iterator[_Copy]:
        """Give a copy with ``values``; who leaves it unchanged may set ``holds``, and it is not filled again."""
        own = self._idle_of(values) or _Copy(
            self._compute.placed(copy.deepcopy(values.model), self._device), weakref.ref(values.model)
        )
        if own.holds is not values:
            # Several times faster than load_state_dict, which a round of many small clients would mostly consist of.
            with torch.no_grad():
                for mine, tensor in zip(_tensors(own.model), values.tensors, strict=True):
                    mine.copy_(tensor)
        own.holds = None
        yield own
        self._idle.append(own)

    def _idle_of(self, values: Values) -> _Copy | None:
        """Return a copy that nobody uses, None where there is none; those of other models are dropped."""
        while True:
            try:
                own = self._idle.pop()
            except IndexError:
                return None
            if own.source() is values.model and _layout(_tensors(own.model)) == _layout(values.tensors):
                return own


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())


def _layout(tensors: tuple[Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
