"""Batch normalisation: the sums that clients measure, and the statistics they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.data.batches import batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.training.compute import FLOAT32, Compute, device_of

_Norm = nn.BatchNorm1d | nn.BatchNorm2d
_NORM_BATCH = 256  # not for speed: what batch normalisation is estimated from


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
    With a momentum of 1 the running statistics after a call are those of the call. Of a layer that a pass calls more
    than once all calls count alike, as in training; one that no pass calls keeps the statistics it has.
    """
    layers = batch_norm_layers(model)
    sums = {
        f"{kind}:{name}": torch.zeros(layer.num_features, dtype=torch.float64)
        for name, layer in layers.items()
        for kind in ("mean", "square")
    }
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    momenta = {name: layer.momentum for name, layer in layers.items()}
    handles = [layer.register_forward_hook(_keep(calls[name])) for name, layer in layers.items()]
    model.eval()
    for layer in layers.values():
        layer.momentum = 1.0
        layer.train()
    device = device_of(model)
    try:
        with torch.inference_mode(), compute.autocast(device):
            for batch, _ in batches(images, _NORM_BATCH, draw=draw, device=device, memory_format=compute.layout):
                model(batch)
                for name, layer in layers.items():
                    seen = calls[name] or [_statistics(layer)]
                    for mean, variance in seen:
                        sums[f"mean:{name}"] += len(batch) * mean / len(seen)
                        sums[f"square:{name}"] += len(batch) * (variance + mean**2) / len(seen)
                    calls[name].clear()
    finally:  # the model may serve other jobs after this one
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.momentum = momenta[name]
    return {"images": torch.tensor(float(len(images)), dtype=torch.float64), **sums}


def _keep(seen: list[tuple[Tensor, Tensor]]) -> Callable[[_Norm, tuple[Tensor, ...], Tensor], None]:
    """Return a hook that adds mean and biased variance of each call of a layer to ``seen``."""

    def after(layer: _Norm, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        mean, variance = _statistics(layer)
        values = inputs[0].numel() // inputs[0].shape[1]
        # torch keeps sum (x - m)^2 / (n - 1): means of squares add up over batches of any size, that does not.
        seen.append((mean, variance * (values - 1) / values))

    return after


def _statistics(layer: _Norm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None  # batch_norm_layers chose it so
    mean, variance = (tensor.to("cpu", torch.float64, copy=True) for tensor in (layer.running_mean, layer.running_var))
    return mean, variance


def fit_batch_norm(model: nn.Module, sums: Sequence[Mapping[str, Tensor]]) -> None:
    """Set the batch normalisation statistics of ``model``, in place, from the ``sums`` of one or more clients."""
    total = sum(float(part["images"]) for part in sums)
    for name, layer in batch_norm_layers(model).items():
        mean = torch.stack([part[f"mean:{name}"] for part in sums]).sum(0) / total
        square = torch.stack([part[f"square:{name}"] for part in sums]).sum(0) / total
        assert layer.running_mean is not None and layer.running_var is not None  # batch_norm_layers chose it so
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((square - mean**2).clamp_min(0))
