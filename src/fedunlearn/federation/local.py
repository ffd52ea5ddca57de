"""The in-process engine: one worker thread per core, one torch thread each, one model copy per worker."""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedunlearn.compute import FLOAT32, Compute, one_worker_per_core
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.federation.client import handle
from fedunlearn.federation.jobs import ClientData, Job, Reestimate, Reply, Train
from fedunlearn.federation.privacy import NO_RULES, Privacy
from fedunlearn.threads import one_torch_thread


class LocalEngine:
    """Clients inside this process.

    Results do not depend on the number of workers: each client's draws have their own generator, and replies are
    merged in client-id order. A model with dropout draws from torch's global generator and does not repeat.

    Args:
        clients: client id to training images.
        validation: client id to validation images, for the clients that have some.
        compute: how clients compute; float32 with a worker per core where None, one worker on a GPU.
        rules: what each client does to its statistics before they leave it.
        device: ``"cpu"`` or ``"cuda"``; the GPU where None and one is present.

    Raises:
        FederationError: fewer than two clients, an empty client, or clients whose images differ in shape or classes.
    """

    def __init__(
        self,
        clients: Mapping[str, LabelledImages],
        *,
        validation: Mapping[str, LabelledImages] | None = None,
        compute: Compute | None = None,
        device: str | None = None,
        rules: Privacy = NO_RULES,
    ) -> None:
        if len(clients) < 2:
            raise FederationError(f"a federation needs at least two clients, got {len(clients)}: share the images out")
        first = next(iter(clients.values()))
        for name, images in clients.items():
            if len(images) == 0:
                raise FederationError(f"{name} holds no images: leave it out or give it some")
            if images.shape != first.shape or images.classes != first.classes:
                raise FederationError(
                    f"{name} holds images of shape {images.shape} in {len(images.classes)} classes, "
                    f"the first client {first.shape} in {len(first.classes)}: all must agree"
                )
        held = validation or {}
        self._data = {name: ClientData(name, clients[name], held.get(name)) for name in sorted(clients)}
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._rules = rules
        self._compute = compute or (one_worker_per_core() if self._device.type == "cpu" else FLOAT32)
        self._copies = _Copies(self._compute, self._device)

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids of all clients, sorted."""
        return tuple(self._data)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(colours, height, width)`` of the images."""
        return next(iter(self._data.values())).train.shape

    @property
    def classes(self) -> int:
        """Number of classes that labels count."""
        return len(next(iter(self._data.values())).train.classes)

    def run(self, job: Job) -> Iterator[Reply]:
        """Run ``job`` on its clients and yield their replies in client-id order.

        At most two clients per worker are ahead of the reply that is yielded, so the memory does not grow with the
        number of clients.

        Raises:
            FederationError: the job names a client that is not here.
        """
        names = self.clients if job.clients is None else tuple(sorted(job.clients))
        unknown = [name for name in names if name not in self._data]
        if unknown:
            raise FederationError(f"there is no client {unknown[0]!r}; the clients are {', '.join(self.clients)}")
        copies = self._copies.of(job)

        def answer(name: str) -> Reply:
            with copies.one() as model:
                return handle(job, model, self._data[name], self._rules, self._compute)

        workers = min(self._compute.workers, len(names)) or 1
        ahead: deque[Future[Reply]] = deque()
        with one_torch_thread(), ThreadPoolExecutor(workers) as pool:
            try:
                for name in names:
                    ahead.append(pool.submit(answer, name))
                    if len(ahead) > 2 * workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            except BaseException:  # Ctrl-C, or nobody wants the rest: do not finish the round first
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@dataclass
class _Copy:
    model: nn.Module
    tensors: list[Tensor]  # its state
    fresh: bool = False  # whether they have the values of the job's model


class _Copies:
    """Copies of the model that jobs bring, one per worker, kept while jobs bring the same one."""

    def __init__(self, compute: Compute, device: torch.device) -> None:
        self._compute = compute
        self._device = device
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._state: dict[str, Tensor] = {}
        self._idle: list[_Copy] = []
        self._changed = True

    def of(self, job: Job) -> _Copies:
        """Return the copies, from now on of the job's model as it is now."""
        state = job.model.state_dict()
        if self._model() is not job.model or _layout(state) != _layout(self._state):
            self._idle = []
        for idle in self._idle:
            idle.fresh = False
        self._model, self._state = weakref.ref(job.model), state
        self._changed = isinstance(job, (Train, Reestimate))
        return self

    @contextmanager
    def one(self) -> Iterator[nn.Module]:
        """Give a copy that no other worker uses, with the values of the job's model."""
        try:
            own = self._idle.pop()
        except IndexError:
            own = self._another()
        if not own.fresh:
            # Several times faster than load_state_dict, which a round of many small clients would mostly consist of.
            for mine, tensor in zip(own.tensors, self._state.values()):
                mine.copy_(tensor)
        own.fresh = not self._changed
        yield own.model
        self._idle.append(own)

    def _another(self) -> _Copy:
        model = self._model()
        assert model is not None  # the job holds it
        copied = self._compute.placed(copy.deepcopy(model), self._device)
        return _Copy(copied, list(copied.state_dict().values()))


def _layout(state: Mapping[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in state.items()]
