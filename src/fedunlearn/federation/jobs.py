"""All that a client can be asked, and how it answers: the same code under every engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from fedunlearn.channels.fit import named_classes
from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy
from fedunlearn.seeding import generator
from fedunlearn.training.compute import FLOAT32, Compute

SUM = "the secure sum"

Sample = Annotated[int, Field(ge=1)] | None
# A task arrives as JSON from another process: what it has beyond its fields is refused there.
STRICT = ConfigDict(extra="forbid")
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name to shape and type


class Answer(NamedTuple):
    """What a client computes for a task.

    Attributes:
        tensors: by name, see the task.
        images: how many images they stand for.
        samples: how many were processed, repeats counted.
    """

    tensors: Mapping[str, Tensor]
    images: int
    samples: int


class Task(Protocol):
    """What a client is asked to compute: one class a kind, which pydantic reads from a message as it is."""

    @property
    def kind(self) -> str:
        """Name of the kind, in messages and in the ledger."""

    def answer(self, job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute) -> Answer:
        """Compute the answer to ``job``, whose task this is, with a copy of its model that may be changed."""

    def layout(self, model: Classifier) -> Layout:
        """Return shape and type of each tensor that answers."""

    def operations(self, model: Classifier, forward: int, training: int) -> int:
        """Return the operations on an image, of the operations that a forward pass and a step of training take."""

    def flaw(self, reply: Reply) -> str | None:
        """Return what no honest answer of the right layout says, or None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A task for clients.

    Attributes:
        task: what they compute.
        model: the global model; clients work on copies.
        phase: the step of the run it belongs to; part of the key of every random draw.
        round: number within the phase, from 0; likewise.
        clients: who is asked; all where None.
        seed: owner of the draws.
    """

    task: Task
    model: Classifier
    phase: str
    round: int = 0
    clients: tuple[str, ...] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Reply:
    """One client's answer.

    Attributes:
        client: its id.
        tensors: the answer, see the task.
        images: how many images they stand for.
        samples: how many were processed, repeats counted.
        seconds: how long it took; 0 of ``Measure`` where the client's rules hide images.
        error: why there is no answer.
        members: of a sum under secure aggregation, the clients that are in it; ``client`` is then ``SUM``.
    """

    client: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    images: int = 0
    samples: int = 0
    seconds: float = 0.0
    error: str | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ClientData:
    """What one client holds.

    Attributes:
        client: its id.
        train: training images.
        validation: images for ``Evaluate``, never trained on.

    Raises:
        FederationError: the id is no text in one line.
    """

    client: str
    train: LabelledImages
    validation: LabelledImages | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.client, str) or not self.client or not self.client.isprintable():
            raise FederationError(
                f"ClientData(client) must be text in one line, got {self.client!r}: give a name, such as "
                "f'client-{number}'"
            )


class Engine(Protocol):
    """Runs one job on clients and gives a reply of each that was asked, in client-id order."""

    @property
    def clients(self) -> Sequence[str]:
        """Ids of all clients, sorted."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(colours, height, width)`` of the images."""

    @property
    def classes(self) -> int:
        """Number of classes that labels count."""

    def run(self, job: Job) -> Iterable[Reply]:
        """Run ``job``; a client that fails gives a reply with ``error``, not an exception.

        Replies may come while later clients still work: a server that adds them up never holds all of them.
        """


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def handle(
    job: Job,
    model: nn.Module,
    data: ClientData,
    rules: Privacy = DEFAULT_RULES,
    compute: Compute = FLOAT32,
    *,
    told: Callable[[Exception], str] = _told,
) -> Reply:
    """Do ``job`` on ``data`` with ``model``, a copy that may be changed; whatever fails becomes the reply's error.

    Args:
        job: what is asked.
        model: the module of its classifier, in the memory format of ``compute``.
        data: what this client holds.
        rules: what it does to its statistics before they leave it.
        compute: precision and memory format.
        told: what the reply says of an exception.
    """
    started = time.perf_counter()
    try:
        answer = job.task.answer(job, model, data, rules, compute)
    except Exception as error:  # one client's failure must not end the round
        return Reply(data.client, seconds=_seconds(job, rules, started), error=told(error))
    return Reply(data.client, *answer, _seconds(job, rules, started))


def _seconds(job: Job, rules: Privacy, started: float) -> float:
    """Return the time since ``started``; of ``Measure`` 0 where rules hide images, whose number it would tell."""
    hidden = job.task.kind == "measure" and (rules.noise > 0 or rules.min_count > 1)
    return 0.0 if hidden else time.perf_counter() - started


# What a value of one image cannot exceed, in sums as in float32; and what rounding may leave.
BEYOND, LITTLE = float(torch.finfo(torch.float32).max), 1e-9
BY_RULES = "this client's rules (min_images)"  # in what a client says that refuses for ever: it holds too few images


def enough(images: LabelledImages, rules: Privacy) -> LabelledImages:
    """Refuse to answer for fewer images than ``rules`` allow; not how many: of one class that is what they hide."""
    if len(images) < rules.min_images:
        raise FederationError(
            f"the answer would stand for fewer than {rules.min_images} images, and {BY_RULES} let none do so: ask for "
            "a larger sample or leave this client out"
        )
    return images


def no_image(reply: Reply) -> str | None:
    """Return what is wrong with an answer that stands for no image."""
    return f"it reports {reply.images} images" if reply.images < 1 else None


def check_rows(job: Job, model: nn.Module, labels: Sequence[int] | None, data: ClientData) -> None:
    """Refuse a model in which some class of this client, or some answer, has no place: to fail there would tell which.

    Args:
        job: what is asked.
        model: this client's copy of its module: hooks on the module itself would go into copies that others make.
        labels: the class of each output row, where they are not the classes in order.
        data: what this client holds.

    Raises:
        ModelError: see ``named_classes``.
    """
    with _counting:
        if job.model not in _rows:
            _rows[job.model] = replace(job.model, module=model).rows
    named_classes(labels, _rows[job.model], len(data.train.classes))


_rows: WeakKeyDictionary[Classifier, int] = WeakKeyDictionary()  # to find the last layer takes a pass
_counting = threading.Lock()


def kept_images(data: ClientData, exclude: tuple[int, ...], rules: Privacy) -> LabelledImages:
    """Return the client's training images of the other classes; refuse where they are fewer than ``rules`` allow."""
    images = data.train.without(exclude)
    if len(images) == 0 and rules.min_images <= 1:  # otherwise it would tell none from few
        raise FederationError(f"nothing is left without the classes {list(exclude)}")
    return enough(images, rules)


def kept_sample(
    job: Job, data: ClientData, exclude: tuple[int, ...], sample: int | None, rules: Privacy
) -> LabelledImages:
    """Return at most ``sample`` of ``kept_images``; refuse where they are fewer than ``rules`` allow."""
    return enough(sampled(job, data, kept_images(data, exclude, rules), sample), rules)


def sampled(job: Job, data: ClientData, images: LabelledImages, sample: int | None) -> LabelledImages:
    """Return at most ``sample`` of ``images``, drawn by the job's seed; all where None."""
    if sample is None or sample >= len(images):
        return images
    draw = generator(job.seed, job.phase, "sample", data.client)
    return images.take(torch.randperm(len(images), generator=draw)[:sample].sort().values)
