"""What channels saw: feature maps of the original for the channels ranked highest and lowest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.taps import reading
from fedunlearn.data.batches import batches
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import RunError
from fedunlearn.files import write_tensors

_EACH = 4  # channels of each end, images of forgotten and of kept classes
_FEWEST_PIXELS = 16


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """Images and what channels of one layer make of them, in grey values.

    Attributes:
        layer: its name.
        rows: the class of each image, forgotten ones first.
        columns: the channel of each map, those ranked highest first.
        pictures: uint8, shape ``(images, colours, height, width)``.
        maps: uint8, shape ``(images, channels, height, width)``; black is 0, white a channel's largest value.
    """

    layer: str
    rows: tuple[str, ...]
    columns: tuple[int, ...]
    pictures: NDArray[np.uint8]
    maps: NDArray[np.uint8]

    @staticmethod
    def load(path: Path) -> FeatureMaps:
        """Return what ``save_feature_maps`` wrote.

        Raises:
            RunError: the file cannot be read.
        """
        try:
            with safetensors.safe_open(path, "np") as file:
                about = json.loads(file.metadata()["maps"])
                pictures, maps = file.get_tensor("pictures"), file.get_tensor("maps")
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: expected feature maps, but {error}: delete the file") from error
        return FeatureMaps(about["layer"], tuple(about["rows"]), tuple(about["columns"]), pictures, maps)


def save_feature_maps(
    path: Path,
    model: nn.Module | Classifier,
    images: LabelledImages,
    scores: Mapping[str, Tensor],
    *,
    forget: Sequence[int],
) -> None:
    """Write feature maps of the layer with the most telling channel, of those whose maps are still pictures.

    Args:
        path: the file.
        model: the original.
        images: test images.
        scores: per layer, of the original's channels.
        forget: the forgotten classes.
    """
    classifier = Classifier.of(model, images.shape)
    module = classifier.module
    taps = {name: tap for name, tap in find_channels(module, classifier.example).taps.items() if name in scores}
    shown = [(some, row) for some in (images.only(forget), images.without(forget)) for row in _spread(some.labels)]
    picked = [some.take(torch.tensor([row])) for some, row in shown]
    rows = [image.classes[int(image.labels[0])] for image in picked]
    device = next(module.parameters()).device
    module.eval()
    with torch.inference_mode():
        seen: dict[str, list[Tensor]] = {layer: [] for layer in taps}
        for image in picked:
            with reading(module, taps, lambda _, z: z.clamp_min(0).cpu()) as maps:
                module(next(iter(batches(image, 1, device=device)))[0])
            for layer, tap in taps.items():
                seen[layer].append(maps[layer] if tap.module else torch.zeros(1, 1))
    pictures = [name for name in taps if seen[name][0].ndim == 4 and seen[name][0][0, 0].numel() >= _FEWEST_PIXELS]
    if not pictures:
        return
    layer = max(pictures, key=lambda name: float(scores[name].max()))
    order = scores[layer].argsort(descending=True, stable=True)
    columns = [int(c) for c in torch.cat([order[:_EACH], order[-_EACH:]])]
    start = taps[layer].start
    values = torch.cat(seen[layer])[:, [start + c for c in columns]]
    scale = values.amax((0, 2, 3), keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    tensors = {
        "pictures": torch.cat([image.images for image in picked]),
        "maps": (255 * values / scale).round().to(torch.uint8),
    }
    write_tensors(path, tensors, {"maps": json.dumps({"layer": layer, "rows": rows, "columns": columns})})


def _spread(labels: Tensor) -> list[int]:
    """Return rows of a few images, of as many classes as there are."""
    first = {int(label): row for row, label in reversed(list(enumerate(labels)))}
    rows = [first[label] for label in sorted(first)][:_EACH]
    return rows + [row for row in range(len(labels)) if row not in rows][: _EACH - len(rows)]
