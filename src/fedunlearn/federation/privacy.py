"""What a client does to its statistics before they leave: minimum counts, clipping, noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedunlearn.arguments import is_weight, is_whole
from fedunlearn.errors import RecipeError

_MECHANISMS = 2  # a Measure job releases sums and counts
_FINER = 40  # binary digits by which the grid of the noise is finer than its scale


@dataclass(frozen=True)
class Privacy:
    """A client's own rules for what leaves it; no message can change them.

    An answer over ``m`` images is a sum of ``m`` terms, one an image. With two terms or more, what one image adds
    another can take away: the sum fits many images. With one term it is that image's own value. So by default no row
    and no answer stands for one image. This holds for one answer: two answers can differ by an image, and weights made
    for it can let one image alone count, which only ``clip`` and ``noise`` hide.

    Attributes:
        min_count: of a class with fewer images, ``Measure`` reports nothing.
        clip: Euclidean norm to which each image's activations, of all layers together, are scaled down; none where 0.
        noise: standard deviation of the Gaussian noise: as it is on counts, times ``clip`` on sums; none where 0.
        min_images: no answer to any job stands for fewer images; ``Evaluate`` then counts none.

    Raises:
        RecipeError: a value is negative or no number, or there is noise without clipping.
    """

    min_count: int = 2
    clip: float = 0.0
    noise: float = 0.0
    min_images: int = 5

    def __post_init__(self) -> None:
        for name in ("min_count", "clip", "noise", "min_images"):
            value = getattr(self, name)
            whole = name in ("min_count", "min_images")
            if not (is_whole(value, 0) if whole else is_weight(value)):
                raise RecipeError(
                    f"privacy.{name} must be {'a whole number of ' if whole else ''}0 or more, got {value!r}"
                )
        if self.noise and not self.clip:
            raise RecipeError("privacy.noise needs privacy.clip above 0: without it one image may count for any amount")


DEFAULT_RULES = Privacy()


def protect(tensors: Mapping[str, Tensor], rules: Privacy) -> dict[str, Tensor]:
    """Return the answer to ``Measure`` as ``rules`` let it leave; clipping was done image by image before.

    With ``z`` the noise, ``C`` the clip, and ``N(s)`` the discrete Gaussian of scale ``s`` (C. Canonne, G. Kamath,
    T. Steinke, *The Discrete Gaussian for Differential Privacy*, 2020), independent for each value::

        counts' = max(0, counts + N(z))      sums' = max(0, sums + N(z C))

    ``N`` is over the integers for counts, over a grid 2^40 times finer than its scale for sums: a continuous Gaussian
    in floating point leaks through its rounding (I. Mironov, *On Significance of the Least Significant Bits for
    Differential Privacy*, 2012). Then rows of classes with ``counts'`` below the minimum, or 0, become 0, so that the
    minimum tells nothing that the noise hides. OpenDP draws from the operating system's randomness: a seed that the
    server knows would undo the noise.

    Raises:
        RecipeError: there is noise and OpenDP is not installed.
    """
    counts = tensors["counts"]
    sums = {name: tensor for name, tensor in tensors.items() if name.startswith("sums.")}
    held = tensors["held"]
    if rules.noise:
        counts = _noised(counts, rules.noise)
        sums = {name: _noised(tensor, rules.noise * rules.clip) for name, tensor in sums.items()}
        held = counts  # the exact number would tell what the noise hides
    reported = counts >= max(1, rules.min_count)
    return {
        "counts": counts * reported,
        "held": held * (reported if rules.noise else held >= rules.min_count),
        **{name: tensor * reported[:, None] for name, tensor in sums.items()},
    }


def epsilon(noise: float, delta: float, *, measures: int = 1) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy for one image more or less at one client.

    ``measures`` jobs are ``2 measures`` Gaussian mechanisms of this noise multiplier (sums, counts), composed by the
    accountant of ``dp-accounting`` (privacy loss distributions). With noise a client measures all its images, whatever
    sample a job asks for: of a sample, one image more may change every row.

    Raises:
        RecipeError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise RecipeError("privacy.noise needs dp-accounting: pip install 'fedunlearn[privacy]'") from error
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(noise), _MECHANISMS * measures)
    return float(accountant.get_epsilon(delta))


def check_noise(rules: Privacy) -> None:
    """Refuse noise that cannot be drawn here, before anything is computed.

    Raises:
        RecipeError: there is noise and OpenDP is not installed.
    """
    if rules.noise:
        _opendp()


def _opendp() -> Any:
    try:
        import opendp.prelude as dp
    except ImportError as error:
        raise RecipeError("privacy.noise needs OpenDP: pip install 'fedunlearn[privacy]'") from error
    dp.enable_features("contrib")  # where OpenDP keeps mechanisms whose proofs are not reviewed by others yet
    return dp


def _noised(values: Tensor, scale: float) -> Tensor:
    """Return ``values`` with discrete Gaussian noise, none below 0; int64 stays int64."""
    dp = _opendp()
    space: tuple[Any, Any]
    size = values.numel()
    if values.is_floating_point():
        space = dp.vector_domain(dp.atom_domain(T=float, nan=False), size=size), dp.l2_distance(T=float)
        mechanism = dp.m.make_gaussian(*space, scale=scale, k=math.floor(math.log2(scale)) - _FINER)
    else:
        space = dp.vector_domain(dp.atom_domain(T="i64"), size=size), dp.l2_distance(T=float)
        mechanism = dp.m.make_gaussian(*space, scale=scale)
    noised = torch.tensor(mechanism(values.flatten().tolist()), dtype=values.dtype)
    return noised.reshape(values.shape).clamp_min(0)
