"""Where the channels of a layer are read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedunlearn.channels.groups import FOLLOWED, outputs_of, trace
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
        rectified: no value is below 0, by what autograd records of a pass; it does not see changes of ``tensor.data``.
    """

    module: str
    side: str
    start: int
    stop: int
    rectified: bool = False


def find_taps(model: nn.Module, layers: Sequence[str], example: Tensor, *, hook: str) -> dict[str, Tap]:
    """Return where the channels of each layer are read.

    Args:
        model: the CNN.
        layers: names of convolutions.
        example: a batch of normalised images.
        hook: ``"convolution"``: the output of the convolution itself, before batch normalisation, as in the paper.
            ``"activation"``: what the network makes of it, namely the input of the first layer called after it
            that consumes its channels; the model's output where none does.

    Raises:
        ModelError: a name is no convolution of the model, or the hook is unknown.
    """
    if hook not in HOOKS:
        raise ModelError(f"unlearn.hook must be one of {', '.join(HOOKS)}, got {hook!r}")
    modules = dict(model.named_modules())
    for name in layers:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise ModelError(f"{name!r} is no Conv2d of the model; prunable_layers() names those that can be measured")
    widths = {name: int(modules[name].weight.shape[0]) for name in layers}
    if hook == "convolution":  # as it comes, so below 0 too
        return {name: Tap(name, "output", 0, widths[name]) for name in layers}
    trial = copy.deepcopy(model).eval()
    example = example[:2].to(next(trial.parameters()).device)
    order = _call_order(trial, example)
    group_of = {layer: group for group in trace(trial, example) for layer in group.layers}
    taps = {}
    for name in layers:
        later = [
            (order[member.module], member)
            for member in group_of[name].members
            if member.axis == 1 and order.get(member.module, -1) > order[name]
        ]
        if later:
            _, member = min(later, key=lambda pair: pair[0])
            taps[name] = Tap(member.module, "input", min(member.positions), max(member.positions) + 1)
        else:
            taps[name] = Tap("", "output", 0, widths[name])
    return _rectified(trial, taps, example)


def _rectified(model: nn.Module, taps: Mapping[str, Tap], example: Tensor) -> dict[str, Tap]:
    """Return ``taps``, marked where autograd's record of a pass says that a ReLU made what is read.

    ``model`` may be changed.
    """
    model.requires_grad_(True)  # the model, not its input: a model may change that in place
    with torch.enable_grad(), reading(model, taps) as maps:
        model(example.clone())
    found = {}
    for layer, tap in taps.items():
        made_by = maps[layer].grad_fn
        while made_by is not None and made_by.name() in _KEEPS_SIGNS:
            made_by = made_by.next_functions[0][0]
        found[layer] = replace(tap, rectified=made_by is not None and made_by.name() == "ReluBackward0")
    return found


def _call_order(model: nn.Module, example: Tensor) -> Mapping[str, int]:
    return {name: place for place, name in enumerate(outputs_of(model, example, FOLLOWED)[0])}


@contextmanager
def reading(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[dict[str, Tensor]]:
    """Collect what passes each tap while the context lasts; the hooks are gone after it, also on failure."""
    maps: dict[str, Tensor] = {}
    handles = []
    for layer, tap in taps.items():
        module = model.get_submodule(tap.module)
        if tap.side == "input":

            def before(_module: nn.Module, inputs: tuple[Tensor, ...], layer: str = layer) -> None:
                maps[layer] = inputs[0]

            handles.append(module.register_forward_pre_hook(before))
        else:

            def after(_module: nn.Module, _inputs: object, output: Tensor, layer: str = layer) -> None:
                maps[layer] = output

            handles.append(module.register_forward_hook(after))
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def channel_means(z: Tensor, tap: Tap, width: int) -> Tensor:
    """Return the mean positive value per channel, shape ``(images, width)``, of the maps ``z``, flattened or not."""
    own = z[:, tap.start : tap.stop]
    if not tap.rectified:
        own = own.clamp_min(0)  # a copy of all maps: a tenth of the pass
    # At least float32: maps may be bfloat16, sums of them must not.
    return own.reshape(len(z), width, -1).mean(2, dtype=torch.promote_types(own.dtype, torch.float32))
