"""Which layers lose channels together, and where each channel is read: the outcome of following a model once.

Torch-Pruning follows the graph of the model (residual additions, flattening, concatenation). It can be wrong without
a sign, on zero-padded shortcuts for one, so every group is tried out before it is used, see ``channels/trial.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedunlearn.arguments import must_be
from fedunlearn.channels.checks import (
    check_evaluation,
    check_parts,
    check_weights,
    example_images,
    passed,
    placed,
    tied_tensors,
)
from fedunlearn.channels.copying import copied
from fedunlearn.channels.kinds import FOLLOWED, block_size, blocks_of, channel_axis, passes_on
from fedunlearn.channels.structure import Group, Member
from fedunlearn.channels.taps import HOOKS, Tap, rectified, with_gradients
from fedunlearn.channels.trial import CROSSED, try_out
from fedunlearn.errors import ModelError

_TIMES = 4  # the values of the largest map that a layer makes: code between layers may enlarge it


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
    trial = with_gradients(copied(model).eval())  # autograd records no frozen layer
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
        if not any(member.reads for member in group.members):
            left_out |= dict.fromkeys(
                group.layers,
                "no layer is seen to consume its channels: they are the model's output, or autograd does not record "
                "what follows (detach, no_grad)",
            )
        else:
            found.append(group)
    joined, apart = _in_blocks(trial, found)
    left_out |= apart
    followed, refused = try_out(trial, joined, tuple(example.shape[1:]))
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
    named = {layer for group in usable for layer in group.layers} | left_out.keys()
    lost = [name for name in calls if isinstance(trial.get_submodule(name), nn.Conv2d) and name not in named]
    left_out |= dict.fromkeys(lost, CROSSED)  # of no group: Torch-Pruning has not all of their channels
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ModelError(
            f"no convolution of the model can lose channels ({reasons}): take away the reason of one of them, for "
            "example by a plain or 1x1 shortcut, or by a module of its own for each call"
        )
    read = {layer for group in usable for layer in group.layers}
    in_part = {member.module for group in usable for member in group.members if not member.reads}
    left_out = {layer: reason for layer, reason in left_out.items() if layer not in in_part}
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
            if order.get(member.module, -1) > order[name]
            and (member.reads or passes_on(model.get_submodule(member.module)))
        ]
        if later:
            _, member = min(later, key=lambda pair: pair[0])
            start, stop = min(member.positions), max(member.positions) + 1
            taps[name] = Tap(member.module, "input", start, stop, channel_axis(model.get_submodule(member.module)))
        else:
            taps[name] = Tap("", "output", 0, group_of[name].width)
    return taps


def check_prunable(model: nn.Module) -> None:
    """Refuse a model whose channels cannot be followed, before any data is touched.

    Raises:
        ModelError: it has no convolution.
    """
    check_weights(model)
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ModelError("the model has no Conv2d layer: pruning removes channels of convolutions; use a CNN")


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
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, example_inputs=example.clone(), verbose=False
            )
            _bound(graph, called)
            for module, name in names.items():
                if name not in called or name in seen or not isinstance(module, nn.Conv2d):
                    continue
                if module not in graph.module2node:
                    unseen[name] = "autograd does not record it: the model runs it under no_grad, or detached"
                    continue
                try:
                    group = _group(graph, module, names)
                except _LostError:
                    unseen[name] = CROSSED
                    continue
                seen.update(group.layers)
                groups.append(group)
    except Exception as error:  # it fails in many ways on what it does not know
        raise ModelError(
            f"the model cannot be followed from layer to layer ({type(error).__name__}): take no_grad, detach, "
            "activation checkpointing and channel shuffles out of its forward pass"
        ) from error
    return groups, unseen


class _LostError(Exception):
    """Channels are followed into more places than any map has values."""


class _Bounded(list[Any]):
    """Torch-Pruning's mappings of places along an edge, which give up where there are more than ``most``."""

    most = 0

    def __iter__(self) -> Iterator[Any]:
        """Yield each mapping, bounded; None where there is none."""
        for mapping in super().__iter__():
            yield mapping and partial(self._followed, mapping)

    def _followed(self, mapping: Callable[[list[Any]], list[Any]], places: list[Any]) -> list[Any]:
        if len(places) > self.most:
            raise _LostError
        return mapping(places)


def _bound(graph: Any, called: Mapping[str, Sequence[Tensor]]) -> None:
    """Have Torch-Pruning give up where it goes round and round, as through attention over pixels.

    A channel of a map that is flattened has a place for each pixel, and no layer's map has more places than values.
    """
    values = [output[0].numel() for outputs in called.values() for output in outputs]
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            dependency.index_mapping = _Bounded(dependency.index_mapping)  # it puts others in for each layer
            dependency.index_mapping.most = _TIMES * max(values)


def _group(graph: Any, module: nn.Conv2d, names: Mapping[nn.Module, str]) -> Group:
    import torch_pruning

    width = int(module.weight.shape[0])
    items = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, idxs=list(range(width)))
    owners = {id(tensor): layer for layer in names for tensor in layer.parameters(recurse=False)}
    members = {}
    for dependency, positions in items:
        target = dependency.target.module
        if isinstance(target, nn.Parameter):  # read by the code of a module: that of a layer scale, say
            owner = owners[id(target)]
            if not isinstance(owner, FOLLOWED):
                (name,) = (leaf for leaf, parameter in owner.named_parameters(recurse=False) if parameter is target)
                place = f"{names[owner]}.{name}".removeprefix("."), int(dependency.target.pruning_dim)
            else:
                place = names[owner], 0
        elif isinstance(target, nn.PReLU) and target.num_parameters == 1:
            continue
        elif isinstance(target, FOLLOWED):
            reads = dependency.handler.__name__ == "prune_in_channels" and isinstance(target, (nn.Conv2d, nn.Linear))
            place = names[target], int(reads)
        else:
            continue
        reads = place[1] == 1 and isinstance(target, (nn.Conv2d, nn.Linear))
        member = Member(*place, tuple(sorted(int(i) for i in positions)), reads)
        members[member.module, member.axis, member.positions] = member
    # All channels of a convolution, or it has no scores of its own here: parts of it may go with several groups.
    whole = {name for conv, name in names.items() if isinstance(conv, nn.Conv2d) and conv.out_channels == width}
    layers = {
        member.module
        for member in members.values()
        if member.axis == 0 and len(member.positions) == width and member.module in whole
    }
    return Group(tuple(name for name in names.values() if name in layers), width, tuple(members.values()))


def _in_blocks(model: nn.Module, groups: Sequence[Group]) -> tuple[list[Group], dict[str, str]]:
    """Return the groups with what is on both sides of a grouped convolution joined, and which channels go together.

    Also layer to the reason why a group that grouped layers divide in several ways is left out.
    """
    joined = list(groups)
    for name, module in model.named_modules():
        if not passes_on(module):
            continue
        sides = [group for group in joined if any(member.module == name for member in group.members)]
        if len(sides) > 1 and all(_all_of(group, name, module.out_channels) for group in sides):
            layers = [layer for layer, _ in model.named_modules() if any(layer in group.layers for group in sides)]
            members = {
                (member.module, member.axis, member.positions): member
                for group in sides
                for member in group.members
                if not (member.module == name and member.reads)  # it hands them on
            }
            whole = Group(tuple(layers), sides[0].width, tuple(members.values()))
            joined = [whole if group is sides[0] else group for group in joined if group not in sides[1:]]
    found: list[Group] = []
    reasons: dict[str, str] = {}
    for group in joined:
        divided = _divided(model, group)
        if isinstance(divided, str):
            reasons |= dict.fromkeys(group.layers, divided)
        else:
            found.append(divided)
    return found, reasons


def _all_of(group: Group, name: str, width: int) -> bool:
    """Return whether the channels of ``group`` are all ``width`` that the module ``name`` has, in order."""
    return group.width == width and any(
        member.module == name and member.positions == tuple(range(width)) for member in group.members
    )


def _divided(model: nn.Module, group: Group) -> Group | str:
    """Return ``group`` with the channels that only go together, or why none can go.

    Of a grouped convolution whole blocks go. Of a group normalisation whole blocks, or as many channels of each: what
    takes fewer channels at a time. Either way what is left are blocks of one size.
    """
    modules = dict(model.named_modules())
    blocks, shares = [1], [1]
    for name in {member.module for member in group.members}:
        module = modules.get(name)
        number = 1 if module is None else blocks_of(module)
        if module is None or number == 1 or block_size(module) == 1:
            continue
        if isinstance(module, nn.Conv2d) and not passes_on(module):
            return f"{name} is a grouped convolution with {module.in_channels} inputs and {module.out_channels} outputs"
        if not _all_of(group, name, block_size(module) * number):
            return f"{name} divides them among others' channels"
        blocks.append(group.width // number)
        shares.append(group.width if isinstance(module, nn.Conv2d) else number)
    block, share = math.lcm(*blocks), math.lcm(*shares)
    block, share = (block, 1) if block <= share else (1, share)
    if group.width > 1 and max(block, share) >= group.width:
        return "blocks of its grouped layers leave no part of the channels that could go alone"
    return replace(group, block=block, shares=share)
