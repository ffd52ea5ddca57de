"""Where the channels of a layer are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedunlearn.errors import ModelError
from fedunlearn.groups import FOLLOWED, outputs_of, trace

HOOKS = ("activation", "convolution")


@dataclass(frozen=True)
class Tap:
    """Where the channels of a layer are read.

    Attributes:
        module: name of the module; empty for the whole model.
        side: ``"input"`` or ``"output"`` of the module.
        start: first channel that belongs to the layer.
        stop: one past the last; ``stop - start`` is a multiple of the layer's channels where maps were flattened.
    """

    module: str
    side: str
    start: int
    stop: int


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
    if hook == "convolution":
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
    return taps


def _call_order(model: nn.Module, example: Tensor) -> Mapping[str, int]:
    return {name: place for place, name in enumerate(outputs_of(model, example, FOLLOWED)[0])}
