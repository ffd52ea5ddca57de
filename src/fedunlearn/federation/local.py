"""The in-process engine: one worker thread per core, one torch thread each, one model copy per worker.

``Copies`` holds copies of the global model for the workers, kept from job to job.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedunlearn.arguments import must_be
from fedunlearn.channels.copying import copied
from fedunlearn.channels.plan import Classifier
from fedunlearn.data.datasets import DatasetImages
from fedunlearn.data.images import LabelledImages, Meaning
from fedunlearn.errors import FederationError, listed
from fedunlearn.federation.jobs import ClientData, Job, Reply, handle
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy, check_noise
from fedunlearn.training.compute import FLOAT32, Compute, one_torch_thread, own_device, workers_on


class LocalEngine:
    """Clients inside this process.

    Results do not depend on the number of workers: each client's draws have their own generator, those of its layers
    (dropout) too, and replies are merged in client-id order. Layers that draw again in the backward pass, as under
    ``torch.utils.checkpoint``, do not repeat.

    Args:
        clients: client id to training images.
        validation: client id to validation images, for the clients that have some.
        compute: how clients compute; float32 with a worker per core where None, one worker on a GPU.
        rules: what each client does to its statistics before they leave it.
        device: ``"cpu"`` or ``"cuda"``; the GPU where None and one is present.

    Raises:
        FederationError: fewer than two clients, an empty client, an entry of ``validation`` that is no client,
            or images that differ in shape, class names or normalisation; an argument of another kind.
        RecipeError: the rules ask for noise and OpenDP is not installed.

    Example:
        >>> import fedunlearn as fu
        >>> train, test = fu.read_digits()
        >>> engine = fu.LocalEngine(fu.partition(train, by="iid", clients=3, seed=0))
        >>> engine.clients, engine.shape, engine.classes
        (('client-0', 'client-1', 'client-2'), (1, 8, 8), 10)
    """

    def __init__(
        self,
        clients: Mapping[str, LabelledImages],
        *,
        validation: Mapping[str, LabelledImages] | None = None,
        compute: Compute | None = None,
        device: str | None = None,
        rules: Privacy = DEFAULT_RULES,
    ) -> None:
        for where, given in (("LocalEngine(clients)", clients), ("LocalEngine(validation=...)", validation or {})):
            must_be(Mapping, given, where, "client names to LabelledImages, as partition gives", FederationError)
            for name, images in given.items():
                if not isinstance(name, str) or not name or not name.isprintable():
                    raise FederationError(f"{where} must name each client by text in one line, got {name!r}: rename it")
                must_be(LabelledImages, images, f"{where}[{name!r}]", "LabelledImages", FederationError)
        must_be(Compute, compute or FLOAT32, "LocalEngine(compute=...)", "a Compute, or None", FederationError)
        must_be(Privacy, rules, "LocalEngine(rules=...)", "a Privacy, such as Privacy(min_count=5)", FederationError)
        if len(clients) < 2:
            raise FederationError(f"a federation needs at least two clients, got {len(clients)}: share the images out")
        first = next(iter(clients.values()))
        for name, images in clients.items():
            if len(images) == 0:
                raise FederationError(f"{name} holds no images: leave it out or give it some")
        check_noise(rules)
        held = validation or {}
        for name in held:
            if name not in clients:
                raise FederationError(
                    f"validation has images of {name!r}, which is no client; the clients are {listed(clients)}"
                )
        meaning = Meaning.of(first)
        for what, parts in (("", clients), ("validation ", held)):
            for name, images in parts.items():
                why = Meaning.of(images).difference(meaning)
                if why is not None:
                    raise FederationError(f"{name} holds {what}{why}: all must agree, the first client counts")
        self._data = {name: ClientData(name, clients[name], held.get(name)) for name in sorted(clients)}
        place = _device(device)
        self._rules = rules
        self._compute = compute or Compute(workers=workers_on(place))
        self._place = place
        self._copies: dict[str, Copies] = {}  # by memory format
        self._asked: tuple[Callable[[], nn.Module | None], Compute] | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the clients hold; of images that a data set draws, of the rows: it may draw them anew."""
        digest = hashlib.sha256()
        for name, data in self._data.items():
            for images in (data.train, data.validation):
                if images is None:
                    continue
                drawn = isinstance(images, DatasetImages)
                kept = images.rows if isinstance(images, DatasetImages) else images.images
                about = [name, images.classes, images.mean, images.std, list(images.shape), len(images), drawn]
                digest.update(json.dumps(about).encode())
                digest.update(images.labels.contiguous().numpy().tobytes())
                digest.update(kept.contiguous().numpy().tobytes())
        return digest.hexdigest()

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

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, in the order of the labels."""
        return next(iter(self._data.values())).train.classes

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
            raise FederationError(f"there is no client {unknown[0]!r}; the clients are {listed(self.clients)}")
        return self._replies(job, names)

    def _able(self, model: Classifier) -> Compute:
        """Return how clients compute with ``model``, which is asked once as long as it is the same."""
        if self._asked is None or self._asked[0]() is not model.module:
            self._asked = weakref.ref(model.module), self._compute.able(model.module, model.example)
        return self._asked[1]

    def _replies(self, job: Job, names: Sequence[str]) -> Iterator[Reply]:
        values, compute = Values.of(job.model.module), self._able(job.model)
        copies = self._copies.setdefault(compute.memory_format, Copies(compute, self._place))

        def answer(name: str) -> Reply:
            with copies.filled(values) as copy:
                reply = handle(job, copy.model, self._data[name], self._rules, compute)
                if reply.error is None and reply.samples == 0:  # nothing has passed through it
                    copy.holds = values
                return reply

        workers = min(compute.workers, len(names)) or 1
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


def _device(name: str | None) -> torch.device:
    if name is None:
        return own_device()
    wrong = FederationError(f"LocalEngine(device=...) must be 'cpu', or 'cuda' where there is a GPU, got {name!r}")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise wrong from error
    if device.type not in ("cpu", "cuda"):
        raise wrong
    return device


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
        copy = self._idle_of(values) or _Copy(
            self._compute.placed(copied(values.model), self._device), weakref.ref(values.model)
        )
        if copy.holds is not values:
            # Several times faster than load_state_dict, which a round of many small clients would mostly consist of.
            with torch.no_grad():
                for mine, tensor in zip(_tensors(copy.model), values.tensors, strict=True):
                    mine.copy_(tensor)
        copy.holds = None
        yield copy
        self._idle.append(copy)

    def _idle_of(self, values: Values) -> _Copy | None:
        """Return a copy that nobody uses, None where there is none; those of other models are dropped."""
        while True:
            try:
                copy = self._idle.pop()
            except IndexError:
                return None
            if copy.source() is values.model and _layout(_tensors(copy.model)) == _layout(values.tensors):
                return copy


@dataclass
class _Copy:
    model: nn.Module
    source: Callable[[], nn.Module | None]
    holds: Values | None = None  # what it was filled with, where nothing has worked on it since


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())


def _layout(tensors: tuple[Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
