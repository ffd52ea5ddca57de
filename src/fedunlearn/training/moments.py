"""Sums over images that say where a class sits in a model: gradients, their squares, second moments of layer inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedunlearn.channels.copying import copied
from fedunlearn.channels.taps import input_of, reading, with_gradients
from fedunlearn.data.images import LabelledImages
from fedunlearn.training.compute import Compute
from fedunlearn.training.evaluation import in_order

_ROWS = 2  # for each value that a row has


def gradient_sums(
    model: nn.Module, images: LabelledImages, compute: Compute, *, squared: bool = False
) -> dict[str, Tensor]:
    """Return ``sum_i g_i`` by parameter, float64, ``g_i`` the gradient of the cross-entropy of image ``i``.

    ``squared``: ``sum_i g_i^2``, element by element: ``n`` times the diagonal of the empirical Fisher matrix. The model
    is in evaluation mode, so that no image has a part in the gradient of another.
    """
    frozen = [weight for weight in model.parameters() if weight.is_floating_point() and not weight.requires_grad]
    try:
        return _summed(with_gradients(model.eval()), images, compute, squared=squared)
    finally:  # the next job of this client trains the same copy
        for weight in frozen:
            weight.requires_grad_(False)


def _summed(model: nn.Module, images: LabelledImages, compute: Compute, *, squared: bool) -> dict[str, Tensor]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}
    for batch, labels in in_order(images, model, compute):
        size = 1 if squared else len(labels)
        for part, truth in zip(torch.split(batch, size), torch.split(labels, size)):
            loss = F.cross_entropy(model(part).float(), truth, reduction="sum")
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found):
                if gradient is not None:
                    value = gradient.detach().cpu().double()
                    sums[name] += value.square() if squared else value
    return sums


def moment_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers that ``input_moments`` reads: linear ones and convolutions that are not grouped."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def patch_width(layer: nn.Conv2d | nn.Linear) -> int:
    """Return the length ``d`` of what one output value of ``layer`` is made of."""
    return layer.weight[0].numel()


def input_moments(
    model: nn.Module, images: LabelledImages, compute: Compute, *, hide: bool = True
) -> dict[str, Tensor]:
    """Return ``sum x x^T`` of each layer over images and positions, ``x`` what one output value is made of.

    float64, shape ``(d, d)``, in the order of the layer's weights. With ``hide``, what is told of ``n`` images of ``P``
    values has at most ``(n - 1) P`` numbers, so that it leaves one image open: layers count in order, each with its
    ``d (d + 1) / 2``, and one that would exceed the bound is all zeros. So is one with less than ``2 d`` rows ``x``: of
    ``d`` rows or fewer the sum tells each but for a rotation, and that values after a ReLU are not negative can fix it.
    """
    layers = moment_layers(model)
    sums, rows = {}, dict.fromkeys(layers, 0)
    for name, layer in layers.items():
        sums[name] = torch.zeros(patch_width(layer), patch_width(layer), dtype=torch.float64)
    told = [*layers] if not hide else _told(layers, (len(images) - 1) * images.images[0].numel())

    def moment(name: str, z: Tensor) -> Tensor:
        x = patches(z.float(), layers[name])
        rows[name] += len(x)
        return (x.T @ x).double().cpu()

    model.eval()
    with torch.no_grad():
        for batch, _ in in_order(images, model, compute):
            with reading(model, {name: input_of(name) for name in told}, moment) as read:
                model(batch)
            for name, tensor in read.items():
                sums[name] += tensor
    for name, tensor in sums.items():
        if hide and rows[name] < _ROWS * len(tensor):
            tensor.zero_()
    return sums


def _told(layers: Mapping[str, nn.Conv2d | nn.Linear], most: int) -> list[str]:
    """Return the layers, in order, whose moments are at most ``most`` numbers together."""
    told, numbers = [], 0
    for name, layer in layers.items():
        d = patch_width(layer)
        if numbers + d * (d + 1) // 2 <= most:
            told.append(name)
            numbers += d * (d + 1) // 2
    return told


def moment_operations(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return the operations of the products of ``input_moments`` on one image: ``2 positions d^2`` of each layer.

    Args:
        model: the model, which is not changed.
        shape: of an image.
    """
    net = copied(model).cpu().eval()
    layers = moment_layers(net)
    with torch.no_grad(), reading(net, {name: input_of(name) for name in layers}) as read:
        net(torch.zeros(1, *shape))
    return sum(2 * len(patches(read[name], layer)) * patch_width(layer) ** 2 for name, layer in layers.items())


def patches(z: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Return the rows that ``layer`` multiplies its weights with, shape ``(positions, d)``, of its input ``z``."""
    if isinstance(layer, nn.Linear):
        return z.reshape(-1, layer.in_features)
    height, width = layer.kernel_size
    top, left = layer.padding if isinstance(layer.padding, tuple) else _same(layer)
    around = (left, left + _odd(layer, 1), top, top + _odd(layer, 0))
    z = F.pad(z, around, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    unfolded = F.unfold(z, (height, width), dilation=layer.dilation, stride=layer.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def _same(layer: nn.Conv2d) -> tuple[int, int]:
    """Return what ``padding="same"`` puts above and left of the maps; nothing for ``"valid"``."""
    if layer.padding != "same":
        return 0, 0
    top, left = (d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size))
    return top, left


def _odd(layer: nn.Conv2d, axis: int) -> int:
    """Return the row or column more that ``padding="same"`` puts at the other end where the sum is odd."""
    return layer.dilation[axis] * (layer.kernel_size[axis] - 1) % 2 if layer.padding == "same" else 0
