"""All that a client can be asked, and how it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from fedunlearn.data.images import LabelledImages
from fedunlearn.plan import PruningPlan
from fedunlearn.taps import Tap
from fedunlearn.training import Training

SUM = "the secure sum"
MOST_IMAGES = 10**9  # that one client may say it holds


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """What every job has.

    Attributes:
        phase: the step of the run it belongs to; part of the key of every random draw.
        round: number within the phase, from 0; likewise.
        model: the global model; clients work on copies.
        plan: how the model's shapes follow from the unpruned architecture, for engines that send it.
        clients: who is asked; all where None.
        seed: owner of the draws.
    """

    phase: str
    round: int = 0
    model: nn.Module
    plan: PruningPlan = field(default_factory=PruningPlan)
    clients: tuple[str, ...] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Measure(Job):
    """Sum channel activations per class over training images.

    Answer: the tensors of ``ChannelStats``, and ``held``, int64, shape ``(classes,)``: the client's training images of
    each class, sampled or not.

    Attributes:
        taps: where the channels of each layer are read.
        classes: number of classes.
        sample: at most so many images per client, drawn at random; all where None.
    """

    taps: Mapping[str, Tap]
    classes: int
    sample: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Reestimate(Job):
    """Measure the inputs of the batch normalisation layers; no label is used but to leave ``exclude`` out.

    Answer: ``images`` (float64 scalar) and, per layer, ``mean:LAYER`` and ``square:LAYER``, float64, shape
    ``(channels,)``: over the batches, batch size times mean, and times variance plus squared mean.

    Attributes:
        exclude: classes whose images are not used.
        sample: at most so many images per client, drawn at random; all where None.
    """

    exclude: tuple[int, ...] = ()
    sample: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Train(Job):
    """Train a copy of the model.

    Answer: its state, under the names of the state dict. ``Reply.images`` weighs it in the average.

    Attributes:
        training: local SGD settings.
        lr: learning rate of this round.
        exclude: classes whose images are not used.
    """

    training: Training
    lr: float
    exclude: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluate(Job):
    """Count right answers on validation images, all classes together: more would tell which of them a client holds.

    Answer: ``correct`` and ``counts``, int64 scalars.

    Attributes:
        exclude: classes whose images are not used.
        labels: the class of each output row; row ``r`` is class ``r`` where None.
    """

    exclude: tuple[int, ...] = ()
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Reply:
    """One client's answer.

    Attributes:
        client: its id.
        tensors: the answer, see the job; empty after an error.
        images: how many images the client holds for this job.
        samples: how many it processed, repeats counted.
        seconds: how long it took.
        error: why there is no answer.
        members: of a sum under secure aggregation, the clients that are in it; ``client`` is then ``SUM``.
    """

    client: str
    tensors: Mapping[str, Tensor]
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
    """

    client: str
    train: LabelledImages
    validation: LabelledImages | None = None


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
