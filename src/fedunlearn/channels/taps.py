"""Where the channels of a layer are read, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedunlearn.errors import ModelError

HOOKS = ("activation", "convolution")
# Steps after a ReLU that make nothing negative. A name that torch does not use costs a clamp, nothing else.
_KEEPS_SIGNS = {
    "MaxPool2DWithIndicesBackward0",
    "AvgPool2DBackward0",
    "AdaptiveAvgPool2DBackward0",
    "MeanBackward1",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
}


@dataclass(frozen=True)
class Tap:
    """Where the channels of a layer are read.

    Attributes:
        module: name of the module; empty for the whole model.
        side: ``"input"`` or ``"output"`` of the module.
        start: first channel that belongs to the layer.
        stop: one past the last; ``stop - start`` is a multiple of the layer's channels where maps were flattened.
        axis: of the channels in what is read; 1, or -1 for the last.
        rectified: no value is below 0, by what autograd records of a pass; it does not see changes of ``tensor.data``.
    """

    module: str
    side: str
    start: int
    stop: int
    axis: int = 1
    rectified: bool = False


def input_of(module: str) -> Tap:
    """Return the tap of all that a module receives, for a reader that takes it as it is."""
    return Tap(module, "input", 0, 0)


def with_gradients(model: nn.Module) -> nn.Module:
    """Let autograd record what all weights of ``model`` do, and return it; whole numbers have no gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def rectified(model: nn.Module, taps: Mapping[str, Tap], example: Tensor) -> dict[str, Tap]:
    """Return ``taps``, marked where autograd's record of a pass says that a ReLU made what is read.

    ``model`` may be changed.
    """
    with_gradients(model)  # the model, not its input: a model may change that in place
    made: dict[str, Any] = {}

    def note(layer: str, z: Tensor) -> Tensor:
        made[layer] = z.grad_fn  # now: a layer that follows may write into the map
        return z

    with torch.enable_grad(), reading(model, taps, note):
        model(example.clone())
    found = {}
    for layer, tap in taps.items():
        made_by = made[layer]
        while made_by is not None and made_by.name() in _KEEPS_SIGNS:
            made_by = made_by.next_functions[0][0]
        found[layer] = replace(tap, rectified=made_by is not None and made_by.name() == "ReluBackward0")
    return found


@contextmanager
def reading(
    model: nn.Module, taps: Mapping[str, Tap], made: Callable[[str, Tensor], Tensor] = lambda layer, found: found
) -> Iterator[dict[str, Tensor]]:
    """Collect what passes each tap in one pass; the hooks are gone after the context, also on failure.

    Args:
        model: what passes images on.
        taps: where to read, by name.
        made: called with the name of a tap and what passes there, at once: a layer that follows may write into it.

    Raises:
        ModelError: a module that is read is called a second time, so that one map would take the place of another.
    """
    maps: dict[str, Tensor] = {}

    def keep(layer: str, found: Tensor) -> None:
        if layer in maps:
            raise ModelError(
                f"{taps[layer].module or 'the model'} is called more than once in a pass, so that the channels of "
                f"{layer or 'the last layer'} cannot be read there: give each call a module of its own"
            )
        maps[layer] = made(layer, found)

    handles = []
    for layer, tap in taps.items():
        module = model.get_submodule(tap.module)
        if tap.side == "input":

            def before(
                _module: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], layer: str = layer
            ) -> None:
                keep(layer, (*inputs, *named.values())[0])  # its only one, which may be given by name

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_module: nn.Module, _inputs: object, output: Tensor, layer: str = layer) -> None:
                keep(layer, output)

            handles.append(module.register_forward_hook(after))
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def head_input(z: Tensor) -> Tensor:
    """Return what the last layer receives, shape ``(images, width)``: the mean over the pixels where it takes maps."""
    return z.flatten(2).mean(2) if z.ndim > 2 else z


def channel_means(z: Tensor, tap: Tap, width: int) -> Tensor:
    """Return the mean positive value per channel, shape ``(images, width)``, of the maps ``z``, flattened or not."""
    maps = z.movedim(tap.axis, 1)[:, tap.start : tap.stop]
    if not tap.rectified:
        maps = maps.clamp_min(0)  # a copy of all maps: a tenth of the pass
    # At least float32: maps may be bfloat16, sums of them must not.
    return maps.reshape(len(z), width, -1).mean(2, dtype=torch.promote_types(maps.dtype, torch.float32))
