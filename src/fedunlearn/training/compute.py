"""How clients compute: precision, memory format, and how many work side by side, one torch thread each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedunlearn.arguments import is_whole
from fedunlearn.channels.copying import copied
from fedunlearn.errors import RecipeError
from fedunlearn.seeding import drawing
from fedunlearn.training.small_maps import SmallMaps

PRECISIONS = ("float32", "bfloat16")
_MAPS = 4  # axes of feature maps and of kernels
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Compute:
    """How clients of one process compute; precision and memory format change results within rounding, workers do not.

    Attributes:
        precision: ``"float32"``, or ``"bfloat16"``: convolutions and matrix products on bfloat16 (8 bits of
            mantissa), by ``torch.autocast``; weights, sums and the averages of clients stay as they are.
        memory_format: ``"channels_last"`` or ``"contiguous"``: how images and maps lie in memory.
        workers: clients that work at the same time, one torch thread each.
        optimiser: makes the optimiser of a client's round of its parameters and the learning rate, such as
            ``lambda parameters, lr: torch.optim.AdamW(parameters, lr)``; SGD by ``Training`` where None. A journal
            does not know it: go on with the same one.
        train: trains a client's model in place of all that ``Training`` says of a round: called with the model, in
            training mode, a ``torch.utils.data.Dataset`` of ``(image, label)`` without the classes to leave out, and
            the learning rate; returns how many images it saw, repeats counted, from which costs follow. The model is a
            copy for this round, of which the values of its tensors are taken, nothing else. The function's draws are
            its own: a run repeats bit for bit only if they do, whichever thread runs it.
        draws: whether layers of the model draw in training, as dropout does: ``able`` finds out. Each step of a client
            has a seed of its own then, and the forward passes of clients side by side wait for each other.

    Raises:
        RecipeError: a value is none of these, or both an optimiser and a train function are given.
    """

    precision: str = "float32"
    memory_format: str = "channels_last"
    workers: int = 1
    optimiser: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] | None = None
    train: Callable[[nn.Module, Dataset[Any], float], int] | None = None
    draws: bool = False

    def __post_init__(self) -> None:
        if (
            self.precision not in PRECISIONS
            or self.memory_format not in MEMORY_FORMATS
            or not is_whole(self.workers, 1)
        ):
            raise RecipeError(
                f"expected a precision among {', '.join(PRECISIONS)}, a memory format among "
                f"{', '.join(MEMORY_FORMATS)} and at least one worker, got {self}"
            )
        if self.optimiser is not None and not callable(self.optimiser):
            raise RecipeError(
                "Compute(optimiser=...) must make an optimiser of parameters and a learning rate, such as lambda "
                f"parameters, lr: torch.optim.AdamW(parameters, lr); got {self.optimiser!r}"
            )
        if self.train is not None and (not callable(self.train) or self.optimiser is not None):
            raise RecipeError(
                "Compute(train=...) must be a function of a model, a data set and a learning rate, which makes its own "
                f"optimiser; got {self.train!r} and the optimiser {self.optimiser!r}"
            )

    @property
    def layout(self) -> torch.memory_format:
        """The memory format as torch names it."""
        return MEMORY_FORMATS[self.memory_format]

    @contextmanager
    def autocast(self, device: torch.device | str = "cpu") -> Iterator[None]:
        """Run a forward pass inside it."""
        kind, rounded = torch.device(device).type, self.precision == "bfloat16"
        small = SmallMaps() if rounded and kind == "cpu" else nullcontext()
        # No cache: it would keep casts of weights that the optimiser has changed since.
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=rounded, cache_enabled=False), small:
            yield

    def placed(self, model: nn.Module, device: torch.device | None = None) -> nn.Module:
        """Return ``model`` in the memory format, and on ``device`` where one is given; it is changed in place."""
        model = model.to(device=device)
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.ndim == _MAPS:  # the formats are of these alone
                tensor.data = tensor.data.contiguous(memory_format=self.layout)
        return model

    def able(self, model: nn.Module, example: Tensor) -> Compute:
        """Return this as ``model`` needs it: whether it draws, and contiguous maps where its code takes no others.

        (``view`` joins axes only there.)

        Args:
            model: left as it was.
            example: images that it takes.
        """
        for compute in (self, replace(self, memory_format="contiguous")):
            draws = compute._tried(model, example)
            if draws is not None:
                return replace(compute, draws=draws)
        return self

    def _tried(self, model: nn.Module, example: Tensor) -> bool | None:
        """Return whether a copy of ``model`` draws; None where it does not take the example.

        It is asked in evaluation and in training, there and back.
        """
        net = self.placed(copied(model))
        device = device_of(net)
        images = example.to(device, memory_format=self.layout)
        try:
            with drawing(0, device), torch.enable_grad():
                before = _generators(device)
                for training in (False, True):
                    logits = net.train(training)(images)
                    if logits.requires_grad:
                        logits.sum().backward()
                return not before.equal(_generators(device))
        except Exception:  # the user's own code can fail in any way, and does so again where it is told
            return None


def _generators(device: torch.device) -> Tensor:
    """Return the state of all that layers draw from."""
    own = torch.get_rng_state()
    return torch.cat([own, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else own


FLOAT32 = Compute()


def own_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def workers_on(device: torch.device) -> int:
    """Return how many clients work side by side: one per core, one on a GPU."""
    return cores() if device.type == "cpu" else 1


def has_bfloat16() -> bool:
    """Return whether torch has convolutions in bfloat16 for this CPU."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass
class _Users:
    """Who keeps torch to one thread now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    number: int = 0
    threads: int = 1  # as many as torch had before the first


_users = _Users()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread per calling thread while the context lasts.

    OpenMP threads that find their core taken wait by spinning: beside other work, small batches on two such threads
    were measured 30 times slower than on one. Contexts may overlap in any order; the last to end restores the number.
    """
    with _users.lock:
        if _users.number == 0:
            _users.threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _users.number += 1
    try:
        yield
    finally:
        with _users.lock:
            _users.number -= 1
            if _users.number == 0:
                torch.set_num_threads(_users.threads)


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of ``model`` are."""
    return next(model.parameters()).device
