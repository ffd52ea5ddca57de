"""All that a client can be asked, and how it answers.

``handle`` is the client: the same code under every engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fedunlearn.channels.plan import PruningPlan
from fedunlearn.channels.stats import measure_channels
from fedunlearn.channels.taps import Tap
from fedunlearn.data.batches import FORWARD_BATCH, batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.federation.privacy import NO_RULES, Privacy, protect
from fedunlearn.seeding import generator
from fedunlearn.training.batch_norm import batch_norm_sums
from fedunlearn.training.compute import FLOAT32, Compute, device_of
from fedunlearn.training.sgd import Training, train_locally

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


def handle(
    job: Job, model: nn.Module, data: ClientData, rules: Privacy = NO_RULES, compute: Compute = FLOAT32
) -> Reply:
    """Do ``job`` on ``data`` with ``model``, a copy that may be changed; whatever fails becomes the reply's error.

    Args:
        job: what is asked.
        model: the global model, in the memory format of ``compute``.
        data: what this client holds.
        rules: what it does to its statistics before they leave it.
        compute: precision and memory format.
    """
    started = time.perf_counter()
    try:
        tensors, images, samples = _answer(job, model, data, rules, compute)
    except Exception as error:  # one client's failure must not end the round
        return Reply(data.client, {}, seconds=time.perf_counter() - started, error=f"{type(error).__name__}: {error}")
    return Reply(data.client, tensors, images, samples, time.perf_counter() - started)


def count_correct(
    model: nn.Module,
    images: LabelledImages,
    classes: int,
    *,
    labels: Sequence[int] | None = None,
    compute: Compute = FLOAT32,
) -> tuple[Tensor, Tensor]:
    """Return right answers and images per class, int64, shape ``(classes,)`` each.

    Output row ``r`` names the class ``labels[r]``, or ``r`` where ``labels`` is None.
    """
    counts = torch.bincount(images.labels, minlength=classes)
    correct = torch.zeros_like(counts)
    if len(images) == 0:
        return correct, counts
    named = torch.tensor(list(range(classes) if labels is None else labels))
    model.eval()
    with torch.inference_mode(), compute.autocast(device_of(model)):
        for batch, truth in _in_order(images, model, compute):
            right = truth.cpu()[named[model(batch).argmax(1).cpu()] == truth.cpu()]
            correct += torch.bincount(right, minlength=classes)
    return correct, counts


def _answer(
    job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute
) -> tuple[Mapping[str, Tensor], int, int]:
    """Return the tensors, the images they stand for and the images processed."""
    match job:
        case Measure():
            if job.classes != len(data.train.classes):
                raise FederationError(
                    f"the job is for {job.classes} classes, this client has {len(data.train.classes)}"
                )
            # Noise is for sums in which one image more is one image more: another sample would be another sum.
            images = data.train if rules.noise else _sampled(job, data, data.train, job.sample)
            with compute.autocast(device_of(model)):
                stats = measure_channels(
                    model, _in_order(images, model, compute), layers=job.taps, num_classes=job.classes, clip=rules.clip
                )
            answer = protect({**stats.tensors(), "held": data.train.counts()}, rules)
            reported = int(answer["counts"].sum())
            return answer, reported, reported
        case Reestimate():
            images = _sampled(job, data, _kept(data, job.exclude), job.sample)
            draw = generator(job.seed, job.phase, "order", data.client)
            return batch_norm_sums(model, images, draw, compute), len(images), len(images)
        case Train():
            images = _kept(data, job.exclude)
            draw = generator(job.seed, job.phase, job.round, data.client)
            samples = train_locally(model, images, job.training, lr=job.lr, draw=draw, compute=compute)
            # A copy: the engine goes on to use the model for its next client.
            state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            return state, len(images), samples
        case Evaluate():
            images = data.train.take(slice(0, 0)) if data.validation is None else data.validation.without(job.exclude)
            correct, counts = count_correct(model, images, len(images.classes), labels=job.labels, compute=compute)
            return {"correct": correct.sum(), "counts": counts.sum()}, len(images), len(images)
    raise FederationError(f"a client knows Measure, Reestimate, Train and Evaluate, got {type(job).__name__}")


def _in_order(images: LabelledImages, model: nn.Module, compute: Compute) -> Iterator[tuple[Tensor, Tensor]]:
    return batches(images, FORWARD_BATCH, device=device_of(model), memory_format=compute.layout)


def _kept(data: ClientData, exclude: tuple[int, ...]) -> LabelledImages:
    images = data.train.without(exclude)
    if len(images) == 0:
        raise FederationError(f"nothing is left without the classes {list(exclude)}")
    return images


def _sampled(job: Job, data: ClientData, images: LabelledImages, sample: int | None) -> LabelledImages:
    if sample is None or sample >= len(images):
        return images
    draw = generator(job.seed, job.phase, "sample", data.client)
    return images.take(torch.randperm(len(images), generator=draw)[:sample].sort().values)
