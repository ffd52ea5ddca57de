"""Class-channel statistics: sums and counts, so that merging clients equals pooling their images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedunlearn.arguments import is_number
from fedunlearn.channels.taps import Tap, channel_means, reading
from fedunlearn.errors import DataError, PlanError
from fedunlearn.files import write_tensors

_COUNTS = "counts"


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Summed channel activations per class.

    Attributes:
        sums: layer to float64, shape ``(classes, channels)``: over the images of the class, the sum of the
            channel's mean positive activation.
        counts: int64, shape ``(classes,)``: images of each class (clients that hold it, after ``one_vote_per_class``).
    """

    sums: Mapping[str, Tensor]
    counts: Tensor

    def __repr__(self) -> str:
        layers = ", ".join(f"{name} {tuple(s.shape)}" for name, s in self.sums.items())
        return f"ChannelStats({int(self.counts.sum())} images; {layers})"

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Return the statistics of both sets of images together.

        Raises:
            DataError: layers or shapes differ.

        Example:
            >>> one = ChannelStats({"conv": torch.tensor([[2.0], [0.0]])}, torch.tensor([1, 0]))
            >>> two = ChannelStats({"conv": torch.tensor([[4.0], [9.0]])}, torch.tensor([2, 3]))
            >>> one.merge(two).means("conv")
            tensor([[2.],
                    [3.]])
        """
        if self.shapes() != other.shapes():
            raise DataError(f"statistics to merge must agree in layers and shapes: {self.shapes()}, {other.shapes()}")
        sums = {name: s + other.sums[name] for name, s in self.sums.items()}
        return ChannelStats(sums, self.counts + other.counts)

    def means(self, layer: str) -> Tensor:
        """Return ``sums / counts`` of a layer, float64, shape ``(classes, channels)``; NaN rows for absent classes."""
        return self.sums[layer] / self.counts[:, None]

    def one_vote_per_class(self) -> ChannelStats:
        """Return the means as if each class present had one image; merged: the mean of client means."""
        present = self.counts > 0
        sums = {name: s / self.counts.clamp_min(1)[:, None] for name, s in self.sums.items()}
        return ChannelStats(sums, present.long())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return layer to ``(classes, channels)``."""
        return {name: tuple(s.shape) for name, s in self.sums.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, the counts as ``counts``."""
        return {_COUNTS: self.counts, **{f"sums.{name}": s for name, s in self.sums.items()}}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> ChannelStats:
        """Return the statistics that ``tensors()`` took apart."""
        sums = {name.removeprefix("sums."): s for name, s in tensors.items() if name != _COUNTS}
        return ChannelStats(sums, tensors[_COUNTS])

    def save(self, path: Path | str) -> None:
        """Write the statistics as safetensors."""
        write_tensors(Path(path), self.tensors(), {})

    @staticmethod
    def load(path: Path | str) -> ChannelStats:
        """Read what ``save`` wrote.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            return ChannelStats.from_tensors(load_file(path))
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            raise DataError(f"{path}: expected channel statistics as safetensors, but {error}") from error


Pooling = Callable[[Iterable[ChannelStats]], ChannelStats]  # makes one of the clients' statistics


def pooled(parts: Iterable[ChannelStats]) -> ChannelStats:
    """Return the statistics of all images of all clients together: sums and counts, added up as they come."""
    return functools.reduce(ChannelStats.merge, parts)


def mean_of_clients(parts: Iterable[ChannelStats]) -> ChannelStats:
    """Return the plain mean of the clients' means, as in the paper, whatever the number of their images."""
    return pooled(part.one_vote_per_class() for part in parts)


def capped(cap: float, pooling: Pooling = pooled) -> Pooling:
    """Return a pooling in which no client weighs more than ``cap`` times the median, see ``limit_influence``.

    Raises:
        PlanError: the cap is below 1, or no number.
    """
    if not is_number(cap) or cap < 1:
        raise PlanError(f"capped(cap) must be a number of at least 1, got {cap!r}")
    return lambda parts: pooling(limit_influence(list(parts), cap))


def measure_channels(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    taps: Mapping[str, Tap],
    classes: int,
    clip: float = 0.0,
) -> ChannelStats:
    """Sum each channel's mean positive activation per class, in one forward pass.

    With ``z`` the maps of a layer, ``A[c] = mean over pixels of max(z[c], 0)`` and, over images ``x`` of class
    ``u``, ``sums[u, c] = sum_x A[c](x)``, ``counts[u]`` = how many. The paper's local statistics, kept as sums.

    Args:
        model: the CNN; it is used in evaluation mode and left as it was.
        batches: ``(images, labels)``: normalised floats ``(n, colours, height, width)`` and int64 ``(n,)``.
        taps: layer to where its channels are read, see ``find_channels``.
        classes: rows of the sums.
        clip: Euclidean norm to which each image's ``A``, of all layers together, is scaled down; none where 0.

    Returns:
        Sums in float64 on the CPU.

    Raises:
        DataError: a label is not in ``0 .. classes - 1``.

    Example:
        >>> from fedunlearn.channels.groups import find_channels
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> images = torch.rand(5, 1, 8, 8)
        >>> taps = find_channels(net, images).taps
        >>> measure_channels(net, [(images, torch.tensor([0, 0, 1, 1, 1]))], taps=taps, classes=2)
        ChannelStats(5 images; 0 (2, 4))
    """
    widths = {layer: int(model.get_submodule(layer).get_parameter("weight").shape[0]) for layer in taps}
    sums = torch.zeros(classes, sum(widths.values()), dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.int64)
    training = model.training

    def mean(layer: str, z: Tensor) -> Tensor:
        return channel_means(z, taps[layer], widths[layer])

    model.eval()
    try:
        for images, labels in batches:
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise DataError(
                    f"labels must lie in 0 .. {classes - 1}, got {int(labels.min())} .. {int(labels.max())}"
                )
            with torch.inference_mode(), reading(model, taps, mean) as means:
                model(images)
                # One row per image: all layers in one addition.
                everything = torch.cat([means[name] for name in taps], dim=1).double().cpu()
            if clip:
                everything = _clipped(everything, clip)
            sums.index_add_(0, labels.cpu(), everything)
            counts += torch.bincount(labels.cpu(), minlength=classes)
    finally:
        model.train(training)
    split = torch.split(sums, [*widths.values()], dim=1)
    return ChannelStats({name: part.contiguous() for name, part in zip(taps, split)}, counts)


def _clipped(means: Tensor, clip: float) -> Tensor:
    """Return the rows of ``means`` scaled down to the norm ``clip`` where they are longer."""
    means = means.nan_to_num(0.0, 0.0, 0.0)  # weights that give NaN for one image would tell of it through any noise
    norms: Tensor = torch.linalg.vector_norm(means, dim=1, keepdim=True)
    return means * (clip / norms.clamp_min(clip))


def limit_influence(parts: Sequence[ChannelStats], cap: float) -> list[ChannelStats]:
    """Return the clients' statistics with those that stand out scaled down, class by class.

    With ``n_k`` the images of a class at client ``k``, ``a_k`` its mean activations in a layer, and medians over the
    clients that hold the class::

        n_k' = min(n_k, cap * median(n))        (rounded down, at least 1)
        a_k' = a_k * min(1, cap * median(|a|) / |a_k|)        sums_k' = n_k' a_k'

    Norm clipping, as Sun et al., *Can You Really Backdoor Federated Learning?* (2019), do it to updates. It bounds how
    much a client weighs, not in which direction, as long as most that hold a class are honest.

    Args:
        parts: one per client.
        cap: how many times the median a client may weigh, at least 1.
    """
    counts = torch.stack([part.counts for part in parts])
    held = counts > 0
    limit = (cap * _median(counts.double(), held)).floor().clamp_min(1)
    fewer = torch.minimum(counts.double(), limit).long()
    sums: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    for layer in parts[0].sums:
        means = torch.stack([part.sums[layer] for part in parts]) / counts.clamp_min(1)[:, :, None]
        norms = means.norm(dim=2)
        scale = (cap * _median(norms, held) / norms.clamp_min(1e-300)).clamp_max(1)
        for of_client, limited in zip(sums, means * (scale * fewer)[:, :, None]):
            of_client[layer] = limited
    return [ChannelStats(of_client, count) for of_client, count in zip(sums, fewer)]


def _median(values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Return the median over clients that hold the class, the lower of two, shape ``(classes,)``; 0 where none does."""
    return values.where(held, torch.nan).nanmedian(dim=0).values.nan_to_num(0.0)
