"""Convolutions of small maps in bfloat16, each as one matrix product.

Kernels of convolutions are made for large maps. On maps of 4 x 4 or 2 x 2 pixels, as in the last layers of a VGG, the
gradients of the weights take oneDNN's bfloat16 kernel five to fifteen times as long as the product they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MOST_PIXELS = 16
_FEWEST_CHANNELS = 128  # with fewer the kernels are as fast
_AROUND = tuple((row, column) for row in range(3) for column in range(3))


class SmallMaps(TorchFunctionMode):
    """While entered, ``F.conv2d`` of small maps in this thread is a product of bfloat16 matrices.

    With ``u(x)`` of shape ``(B H W, 9 C)``, in whose rows are the pixels around one pixel, zeros outside the map, and
    the weights ``w`` as ``(9 C, O)``::

        conv(x, w) = u(x) w        dw = u(x)^T dy        dx = u(dy) mirrored(w)

    So are 3 x 3 convolutions of stride and padding 1 with at most 16 pixels a map and at least 128 channels on both
    sides; all others are torch's, as is everything where autocast is off. Sums within a product are float32, results
    bfloat16, as of the kernels. A network that recomputes activations (``torch.utils.checkpoint``), where no mode is
    entered any more, or that differentiates gradients, is one for float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer in place of ``func``, which torch is about to call."""
        if func is F.conv2d and not kwargs and _is_small(*args):
            maps, weight, bias = args[:3]
            # A view that the function made itself could not be changed in place, as a ReLU after it may.
            made = _as_maps(_Product.apply(maps, weight), maps.shape)  # type: ignore[no-untyped-call]
            return made if bias is None else made + bias.to(made.dtype).view(-1, 1, 1)
        return func(*args, **(kwargs or {}))


def _is_small(maps: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any) -> bool:
    """Return whether a call of ``F.conv2d`` with these arguments becomes a product."""
    return (
        how == ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation and groups as nn.Conv2d gives them
        and torch.is_autocast_enabled("cpu")
        and torch.float64 not in (maps.dtype, weight.dtype)  # which autocast leaves as it is
        and maps.dim() == 4
        and weight.shape[1:] == (maps.shape[1], 3, 3)
        and min(weight.shape[:2]) >= _FEWEST_CHANNELS
        and 0 < maps.shape[2] * maps.shape[3] <= _MOST_PIXELS
        and len(maps) > 0
    )


def _around(maps: Tensor) -> Tensor:
    """Return what lies around each pixel: ``(B, C, H, W)`` as ``(B H W, 9 C)``."""
    height, width = maps.shape[2:]
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, i : i + height, j : j + width] for i, j in _AROUND], dim=3).flatten(0, 2)


def _as_maps(rows: Tensor, like: torch.Size) -> Tensor:
    """Return ``(B H W, C)`` as maps of the batch and size of ``like``, in channels_last."""
    batch, _, height, width = like
    return rows.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class _Product(torch.autograd.Function):
    """The rows of ``F.conv2d(maps, weight, padding=1)``, ``(B H W, O)``, and their gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, maps: Tensor, weight: Tensor) -> Tensor:
        around, rounded = _around(maps.bfloat16()), weight.bfloat16()
        ctx.save_for_backward(around, rounded)
        ctx.about = maps.shape, maps.dtype, weight.dtype  # type: ignore[attr-defined]
        return around @ rounded.permute(2, 3, 1, 0).flatten(0, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        around, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        shape, of_maps, of_weight = ctx.about  # type: ignore[attr-defined]
        outputs, inputs = weight.shape[:2]
        to_maps = to_weight = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            mirrored = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)
            to_maps = _as_maps(_around(_as_maps(grad, shape)) @ mirrored, shape).to(of_maps)
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            to_weight = (grad.t() @ around).view(outputs, 3, 3, inputs).permute(0, 3, 1, 2).to(of_weight)
        return to_maps, to_weight
