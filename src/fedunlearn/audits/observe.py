"""What a model makes of images: logits, penultimate features, and the activations of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedunlearn.channels.checks import check_evaluation, placed
from fedunlearn.channels.fit import finite
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.taps import Tap, channel_means, head_input, input_of, reading
from fedunlearn.data.batches import FORWARD_BATCH, batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.training.evaluation import in_parts

_HEAD = ""  # no convolution has this name
_SMALLEST_PART = 128  # images


@dataclass(frozen=True, eq=False)
class Observed:
    """What a model makes of images, on the CPU.

    Attributes:
        logits: shape ``(images, rows)``.
        features: what the last layer receives, shape ``(images, width)``, see ``head_input``.
        layers: per layer, the mean positive activation of its channels, shape ``(images, channels)``.
    """

    logits: Tensor
    features: Tensor
    layers: Mapping[str, Tensor]


def observe(model: nn.Module | Classifier, images: LabelledImages, *, layers: bool = False) -> Observed:
    """Return what ``model`` makes of ``images`` in evaluation mode, each core observing a part of them.

    Args:
        model: the CNN; left as it was.
        images: at least one.
        layers: also read the activations of every layer that can be pruned.

    Raises:
        ModelError: the model has no layer with a row per class, or its outputs are not finite.
    """
    classifier = Classifier.of(model, images.shape)
    module, example = classifier.module, classifier.example
    check_evaluation(module, placed(example, module))
    taps = {_HEAD: input_of(head_layer(module, example))}
    if layers:
        taps |= {name: tap for name, tap in find_channels(module, example).taps.items() if tap.module}
    return _in_parts(module, images, taps)


def logits_of(model: nn.Module, images: LabelledImages) -> Tensor:
    """Return the logits that ``model``, checked before, gives ``images`` in evaluation mode, on the CPU.

    Raises:
        ModelError: they are not finite.
    """
    return _in_parts(model, images, {}).logits


def _in_parts(model: nn.Module, images: LabelledImages, taps: Mapping[str, Tap]) -> Observed:
    return _joined(in_parts(model, images, lambda net, some: _observe(net, some, taps), least=_SMALLEST_PART))


def _observe(model: nn.Module, images: LabelledImages, taps: Mapping[str, Tap]) -> Observed:
    """Observe ``images`` with a copy of the model that no other thread uses: its hooks collect into one place."""
    seen = []
    device = next(model.parameters()).device

    def made(name: str, z: Tensor) -> Tensor:
        if name == _HEAD:
            return head_input(z).float().cpu().clone()
        return channel_means(z, taps[name], model.get_submodule(name).get_parameter("weight").shape[0]).cpu()

    with torch.inference_mode():
        for batch, _ in batches(images, FORWARD_BATCH, device=device):
            with reading(model, taps, made) as found:
                logits = finite(model(batch)).float().cpu()
            features = found.get(_HEAD, logits[:, :0])
            seen.append(Observed(logits, features, {name: found[name] for name in taps if name != _HEAD}))
    return _joined(seen)


def _joined(parts: Sequence[Observed]) -> Observed:
    return Observed(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.features for part in parts]),
        {name: torch.cat([part.layers[name] for part in parts]) for name in parts[0].layers},
    )
