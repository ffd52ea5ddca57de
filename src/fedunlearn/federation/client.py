"""The client: the same code under every engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.compute import FLOAT32, Compute
from fedunlearn.data.batches import FORWARD_BATCH, batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.federation.jobs import ClientData, Evaluate, Job, Measure, Reestimate, Reply, Train
from fedunlearn.federation.privacy import NO_RULES, Privacy, protect
from fedunlearn.seeding import generator
from fedunlearn.stats import measure_channels
from fedunlearn.training import train_locally

_NORM_BATCH = 256  # not for speed: what batch normalisation is estimated from


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
            with compute.autocast(_device(model)):
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
    with torch.inference_mode(), compute.autocast(_device(model)):
        for batch, truth in _in_order(images, model, compute):
            right = truth.cpu()[named[model(batch).argmax(1).cpu()] == truth.cpu()]
            correct += torch.bincount(right, minlength=classes)
    return correct, counts


def batch_norm_layers(model: nn.Module) -> dict[str, nn.BatchNorm1d | nn.BatchNorm2d]:
    """Return the batch normalisation layers that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.track_running_stats
    }


def batch_norm_sums(
    model: nn.Module, images: LabelledImages, draw: torch.Generator, compute: Compute = FLOAT32
) -> dict[str, Tensor]:
    """Return the sums that ``Reestimate`` describes; each layer normalises by the batch, as in training.

    Batches are drawn at random: images in the order of their classes would give batches unlike those of training.
    With a momentum of 1 the running statistics after a batch are those of the batch.
    """
    layers = batch_norm_layers(model)
    sums = {
        f"{kind}:{name}": torch.zeros(layer.num_features, dtype=torch.float64)
        for name, layer in layers.items()
        for kind in ("mean", "square")
    }
    momenta = {name: layer.momentum for name, layer in layers.items()}
    model.eval()
    for layer in layers.values():
        layer.momentum = 1.0
        layer.train()
    device = _device(model)
    try:
        with torch.inference_mode(), compute.autocast(device):
            for batch, _ in batches(images, _NORM_BATCH, draw=draw, device=device, memory_format=compute.layout):
                model(batch)
                for name, layer in layers.items():
                    assert layer.running_mean is not None and layer.running_var is not None  # track_running_stats
                    mean, variance = layer.running_mean.double().cpu(), layer.running_var.double().cpu()
                    sums[f"mean:{name}"] += len(batch) * mean
                    sums[f"square:{name}"] += len(batch) * (variance + mean**2)
    finally:  # the model may serve other jobs after this one
        for name, layer in layers.items():
            layer.momentum = momenta[name]
    return {"images": torch.tensor(float(len(images)), dtype=torch.float64), **sums}


def _in_order(images: LabelledImages, model: nn.Module, compute: Compute) -> Iterator[tuple[Tensor, Tensor]]:
    return batches(images, FORWARD_BATCH, device=_device(model), memory_format=compute.layout)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
