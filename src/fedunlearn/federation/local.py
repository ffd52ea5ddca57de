"""The in-process engine: one worker thread per core, one torch thread each, one model copy per worker."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.federation.client import handle
from fedunlearn.federation.jobs import ClientData, Job, Reply
from fedunlearn.federation.privacy import NO_RULES, Privacy
from fedunlearn.threads import cores, one_torch_thread


class LocalEngine:
    """Clients inside this process.

    Results do not depend on ``workers``: each client's draws have their own generator, and replies are merged in
    client-id order. A model with dropout draws from torch's global generator and does not repeat.

    Args:
        clients: client id to training images.
        validation: client id to validation images, for the clients that have some.
        workers: threads; one per core where None, one on a GPU.
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
        workers: int | None = None,
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
        self._workers = workers or (cores() if self._device.type == "cpu" else 1)

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

    def run(self, job: Job) -> list[Reply]:
        """Run ``job`` on its clients and return their replies in client-id order.

        Raises:
            FederationError: the job names a client that is not here.
        """
        names = self.clients if job.clients is None else tuple(sorted(job.clients))
        unknown = [name for name in names if name not in self._data]
        if unknown:
            raise FederationError(f"there is no client {unknown[0]!r}; the clients are {', '.join(self.clients)}")
        state = job.model.state_dict()
        mine = threading.local()

        def answer(name: str) -> Reply:
            if not hasattr(mine, "model"):
                mine.model = copy.deepcopy(job.model).to(self._device)
                mine.model.to(memory_format=torch.channels_last)
            mine.model.load_state_dict(state)
            return handle(job, mine.model, self._data[name], self._rules)

        workers = min(self._workers, len(names)) or 1
        with one_torch_thread(), ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(answer, names))
            except BaseException:  # Ctrl-C: do not finish the round first
                pool.shutdown(wait=False, cancel_futures=True)
                raise
