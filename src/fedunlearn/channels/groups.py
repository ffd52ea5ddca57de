"""Which layers lose channels together, and where each channel is read: the outcome of following a model once.

Torch-Pruning follows the graph of the model (residual additions, flattening, concatenation). It can be wrong without
a sign, on zero-padded shortcuts for one, so every group is tried out before it is used, see ``channels/trial.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedunlearn.arguments import must_be
from fedunlearn.channels.checks import (
    FOLLOWED,
    check_evaluation,
    check_parts,
    check_weights,
    example_images,
    passed,
    placed,
    tied_tensors,
)
from fedunlearn.channels.copying import copied
from fedunlearn.channels.structure import Group, Member
from fedunlearn.channels.taps import HOOKS, Tap, rectified
from fedunlearn.channels.trial import try_out
from fedunlearn.errors import ModelError


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a model that can be measured, ranked and removed.

    Attributes:
        model: the model that was followed.
        groups: layers that lose their channels together.
        taps: layer to where its channels are read, in the order of the model: the layers that can lose channels.
        left_out: convolution to the reason why it loses nothing.
    """

    model: nn.Module
    groups: tuple[Group, ...]
    taps: Mapping[str, Tap]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{layer}: read at the {tap.side} of {tap.module or 'the model'}" for layer, tap in self.taps.items()]
        return "\n".join([*lines, *(f"{layer}: left out, {reason}" for layer, reason in self.left_out.items())])


def find_channels(model: nn.Module, example: Tensor, *, hook: str = "activation") -> Channels:
    """Follow ``model`` once and return the channels that can be removed, where each is read, and what is left out.

    Args:
        model: the CNN; left as it was.
        example: a batch of images, shape ``(images, colours, height, width)``; of the shape alone use is made.
        hook: ``"convolution"``: a channel is read at the output of its convolution, before batch normalisation, as in
            the paper. ``"activation"``: what the network makes of it, namely the input of the first layer called
            after the convolution that consumes its channels; the model's output where none does.

    Raises:
        ModelError: the model has no channel that can be removed, or the hook is unknown.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> print(find_channels(net, torch.rand(2, 1, 8, 8)))
        0: read at the input of 3
    """
    if hook not in HOOKS:
        raise ModelError(f"unlearn.hook must be one of {', '.join(HOOKS)}, got {hook!r}")
    must_be(Tensor, example, "find_channels(example)", "a tensor of images, such as a batch of them", ModelError)
    check_prunable(model)
    trial = copied(model).eval().requires_grad_(True)  # autograd records no frozen layer
    if example.ndim == 4:  # what is tried out is always the same, whatever the images are
        example = example_images(tuple(example.shape[1:]))
    example = placed(example, trial)
    check_evaluation(trial, example)
    check_parts(trial, example)
    calls = passed(trial, example).outputs
    found: list[Group] = []
    left_out = {name: "evaluation does not run it" for name in _convolutions(trial) if name not in calls}
    traced, unseen = trace(trial, example)
    left_out |= unseen
    for group in traced:
        if all(member.axis == 0 for member in group.members):
            left_out |= dict.fromkeys(
                group.layers,
                "no layer is seen to consume its channels: they are the model's output, or autograd does not record "
                "what follows (detach, no_grad)",
            )
        else:
            found.append(group)
    followed, refused = try_out(trial, found, tuple(example.shape[1:]))
    left_out |= refused
    tied, usable = tied_tensors(trial), []
    times = {name: len(outputs) for name, outputs in calls.items()}
    taps = _taps(trial, followed, list(calls), hook)
    for group in followed:
        reason = _unusable(group, taps, times, tied)
        if reason is None:
            usable.append(group)
        else:
            left_out |= dict.fromkeys(group.layers, reason)
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ModelError(
            f"no convolution of the model can lose channels ({reasons}): take away the reason of one of them, for "
            "example by a plain or 1x1 shortcut, or by a module of its own for each call"
        )
    read = {layer for group in usable for layer in group.layers}
    taps = rectified(trial, {name: tap for name, tap in taps.items() if name in read}, example)
    return Channels(model, tuple(usable), taps, left_out)


def _unusable(group: Group, taps: Mapping[str, Tap], calls: Mapping[str, int], tied: Mapping[str, str]) -> str | None:
    """Return why a group that was followed rightly loses nothing all the same, or None."""
    for layer in group.layers:
        for name in (layer, taps[layer].module):
            if calls.get(name, 1) > 1:
                where = "it" if name == layer else f"{name}, where it is read,"
                return f"{where} is called {calls[name]} times in a pass, and statistics are of one call"
    return next((tied[member.module] for member in group.members if member.module in tied), None)


def _convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _taps(model: nn.Module, groups: Sequence[Group], called: Sequence[str], hook: str) -> dict[str, Tap]:
    """Return where each layer of ``groups`` is read, in the order of ``model``; ``called`` in the order of calls."""
    group_of = {layer: group for group in groups for layer in group.layers}
    layers = [name for name, _ in model.named_modules() if name in group_of]
    if hook == "convolution":  # as it comes, so below 0 too
        return {name: Tap(name, "output", 0, group_of[name].width) for name in layers}
    order = {name: place for place, name in enumerate(called)}
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
            taps[name] = Tap("", "output", 0, group_of[name].width)
    return taps


def check_prunable(model: nn.Module) -> None:
    """Refuse a model whose channels cannot be followed, before any data is touched.

    Raises:
        ModelError: it has no convolution, a grouped convolution, or a module with weights of an unknown kind.
    """
    check_weights(model)
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ModelError("the model has no Conv2d layer: pruning removes channels of convolutions; use a CNN")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise ModelError(
                f"{name!r} is a grouped convolution (groups={module.groups}), whose channels cannot be removed "
                "one by one: replace it by a Conv2d with groups=1"
            )
        if not isinstance(module, FOLLOWED) and next(module.parameters(recurse=False), None) is not None:
            raise ModelError(
                f"{name or 'the model itself'!r} is a {type(module).__name__} with weights of its own, which pruning "
                "cannot follow: use Conv2d, Linear and BatchNorm, for example BatchNorm2d in place of LayerNorm"
            )


def head_layer(model: nn.Module, example: Tensor) -> str:
    """Return the name of the linear layer whose output is the model's, one row per class.

    Raises:
        ModelError: the model's output does not come straight from a ``Linear`` layer, or that is used twice.
    """
    check_weights(model)
    seen = passed(model, placed(example, model))
    for name, outputs in seen.outputs.items():
        if any(output is seen.logits for output in outputs) and isinstance(model.get_submodule(name), nn.Linear):
            used = tied_tensors(model).get(name)
            if len(outputs) > 1:
                used = f"{name} is called {len(outputs)} times in a pass"
            if used:
                raise ModelError(f"the row of a class cannot be removed alone, {used}: give the output its own Linear")
            return name
    raise ModelError(
        "the model's output must come straight from a Linear layer, whose row of the class is removed at the end; "
        "end the model with nn.Linear and return its output"
    )


def trace(model: nn.Module, example: Tensor) -> tuple[list[Group], dict[str, str]]:
    """Return every group of the model as Torch-Pruning sees it, right or wrong, and why it does not see a layer.

    Raises:
        ModelError: Torch-Pruning cannot follow the model at all.
    """
    import torch_pruning  # slow to import, and a client never traces

    names = {module: name for name, module in model.named_modules()}
    called = passed(model, example).outputs
    groups: list[Group] = []
    unseen: dict[str, str] = {}
    seen: set[str] = set()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example.clone())
            for module, name in names.items():
                if name not in called or name in seen or not isinstance(module, nn.Conv2d):
                    continue
                if module not in graph.module2node:
                    unseen[name] = "autograd does not record it: the model runs it under no_grad, or detached"
                    continue
                group = _group(graph, module, names)
                seen.update(group.layers)
                groups.append(group)
    except Exception as error:  # it fails in many ways on what it does not know
        raise ModelError(
            f"the model cannot be followed from layer to layer ({type(error).__name__}): take no_grad, detach and "
            "activation checkpointing out of its forward pass"
        ) from error
    return groups, unseen


def _group(graph: Any, module: nn.Conv2d, names: Mapping[nn.Module, str]) -> Group:
    import torch_pruning

    width = int(module.weight.shape[0])
    items = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, idxs=list(range(width)))
    members = {}
    for dependency, positions in items:
        target = dependency.target.module
        if not isinstance(target, FOLLOWED):
            continue
        axis = 1 if dependency.handler.__name__ == "prune_in_channels" and not _is_norm(target) else 0
        member = Member(names[target], axis, tuple(sorted(int(i) for i in positions)))
        members[member.module, member.axis, member.positions] = member
    kinds = {name: own for own, name in names.items()}
    layers = {
        member.module
        for member in members.values()
        if member.axis == 0 and len(member.positions) == width and isinstance(kinds[member.module], nn.Conv2d)
    }
    return Group(tuple(name for name in names.values() if name in layers), width, tuple(members.values()))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
