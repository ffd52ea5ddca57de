"""How clients compute: precision, memory format, and how many work side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from fedunlearn.errors import RecipeError
from fedunlearn.threads import cores

PRECISIONS = ("float32", "bfloat16")
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Compute:
    """How clients of one process compute; precision and memory format change results within rounding, workers do not.

    Attributes:
        precision: ``"float32"``, or ``"bfloat16"``: convolutions and matrix products on bfloat16 (8 bits of
            mantissa), by ``torch.autocast``; weights, sums and the averages of clients stay as they are.
        memory_format: ``"channels_last"`` or ``"contiguous"``: how images and maps lie in memory.
        workers: clients that work at the same time, one torch thread each.

    Raises:
        RecipeError: a value is none of these.
    """

    precision: str = "float32"
    memory_format: str = "channels_last"
    workers: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS or self.memory_format not in MEMORY_FORMATS or self.workers < 1:
            raise RecipeError(
                f"expected a precision among {', '.join(PRECISIONS)}, a memory format among "
                f"{', '.join(MEMORY_FORMATS)} and at least one worker, got {self}"
            )

    @property
    def layout(self) -> torch.memory_format:
        """The memory format as torch names it."""
        return MEMORY_FORMATS[self.memory_format]

    def autocast(self, device: torch.device | str = "cpu") -> AbstractContextManager[object]:
        """Return what a forward pass runs in."""
        # No cache: it would keep casts of weights that the optimiser has changed since.
        return torch.autocast(
            torch.device(device).type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bfloat16",
            cache_enabled=False,
        )

    def placed(self, model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
        """Return ``model``, moved to ``device`` and brought into the memory format, in place."""
        return model.to(device).to(memory_format=self.layout)  # type: ignore[call-overload,no-any-return]


FLOAT32 = Compute()


def one_worker_per_core() -> Compute:
    """Return what every machine can do: float32, channels_last, a worker per core."""
    return Compute(workers=cores())
