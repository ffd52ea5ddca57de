"""The in-process engine: one worker thread per core, one torch thread each, one model copy per worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fedunlearn.compute import Compute, own_device, workers_on
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.federation.client import handle
from fedunlearn.federation.copies import Copies, Values
from fedunlearn.federation.jobs import ClientData, Job, Reply
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
        place = own_device() if device is None else torch.device(device)
        self._rules = rules
        self._compute = compute or Compute(workers=workers_on(place))
        self._copies = Copies(self._compute, place)

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
        """Run ``job`` on its clients and give their replies in client-id order.

        At most two clients per worker are ahead of the reply that is read, so the memory does not grow with the number
        of clients.

        Raises:
            FederationError: the job names a client that is not here.
        """
        names = self.clients if job.clients is None else tuple(sorted(job.clients))
        unknown = [name for name in names if name not in self._data]
        if unknown:
            raise FederationError(f"there is no client {unknown[0]!r}; the clients are {', '.join(self.clients)}")
        return self._replies(job, names)

    def _replies(self, job: Job, names: Sequence[str]) -> Iterator[Reply]:
        values = Values.of(job.model)

        def answer(name: str) -> Reply:
            with self._copies.filled(values) as own:
                reply = handle(job, own.model, self._data[name], self._rules, self._compute)
                if reply.error is None and reply.samples == 0:  # nothing has passed through it
                    own.holds = values
                return reply

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
