"""Which layers lose channels together, and where each channel is read: the outcome of following a model once.

Torch-Pruning follows the graph of the model (residual additions, flattening, concatenation). It can be wrong without
a sign, on zero-padded shortcuts for one, so every group is tried out before it is used: the model with channels
sliced away must give the same logits as the model with those channels masked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedunlearn.channels.slicing import Kept, combine, parameter_layers, slice_tensors
from fedunlearn.channels.taps import HOOKS, Tap, rectified
from fedunlearn.errors import ModelError

FOLLOWED = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
_TRIAL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Member:
    """One side of one module in a group.

    Attributes:
        module: its name.
        axis: of its tensors: 0 for the output side, 1 for the input side.
        positions: of all the group's channels, ascending; ``k`` in a row per channel where maps were flattened.
    """

    module: str
    axis: int
    positions: tuple[int, ...]

    def of(self, channels: Sequence[int], width: int) -> list[int]:
        """Return the positions of these ``channels``, in a group of ``width`` channels."""
        k = len(self.positions) // width
        return [self.positions[c * k + i] for c in channels for i in range(k)]


@dataclass(frozen=True)
class Group:
    """Convolutions whose output channels can only be removed together, and all that consumes them.

    Attributes:
        layers: the convolutions, in the order of the model.
        width: their channels.
        members: every module side that carries these channels (axis 0 output, axis 1 input).
    """

    layers: tuple[str, ...]
    width: int
    members: tuple[Member, ...]

    def kept(self, model: nn.Module, removed: Sequence[int]) -> Kept:
        """Return ``tensor -> axis -> kept positions`` when the channels ``removed`` go."""
        gone: dict[tuple[str, int], set[int]] = {}
        for member in self.members:
            gone.setdefault((member.module, member.axis), set()).update(member.of(removed, self.width))
        kept: dict[str, dict[int, tuple[int, ...]]] = {}
        for (name, axis), positions in gone.items():
            for tensor, size in parameter_layers(model, name, axis):
                kept.setdefault(tensor, {})[axis] = tuple(i for i in range(size) if i not in positions)
        return kept


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
        example: a batch of normalised images, shape ``(images, colours, height, width)``; two are used.
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
    check_prunable(model)
    trial = copy.deepcopy(model).eval()
    example = example[:2].to(next(trial.parameters()).device)
    found: list[Group] = []
    left_out: dict[str, str] = {}
    for group in trace(trial, example):
        if all(member.axis == 0 for member in group.members):
            left_out |= dict.fromkeys(group.layers, "no layer consumes its channels: they are the model's output")
        else:
            found.append(group)
    followed = _followed(trial, found, example)
    for group in found:
        if group not in followed:
            left_out |= dict.fromkeys(
                group.layers, "its channels cross an operation that cannot be followed, such as a zero-padded shortcut"
            )
    if not followed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ModelError(f"no convolution of the model can lose channels ({reasons}); use plain or 1x1 shortcuts")
    return Channels(model, tuple(followed), _taps(trial, followed, example, hook), left_out)


def _taps(model: nn.Module, groups: Sequence[Group], example: Tensor, hook: str) -> dict[str, Tap]:
    """Return where each layer of ``groups`` is read, in the order of ``model``, which may be changed."""
    group_of = {layer: group for group in groups for layer in group.layers}
    layers = [name for name, _ in model.named_modules() if name in group_of]
    if hook == "convolution":  # as it comes, so below 0 too
        return {name: Tap(name, "output", 0, group_of[name].width) for name in layers}
    order = {name: place for place, name in enumerate(outputs_of(model, example, FOLLOWED)[0])}
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
    return rectified(model, taps, example)


def check_prunable(model: nn.Module) -> None:
    """Refuse a model whose channels cannot be followed, before any data is touched.

    Raises:
        ModelError: it has no convolution, a grouped convolution, or a module with weights of an unknown kind.
    """
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
        ModelError: the model's output does not come straight from a ``Linear`` layer.
    """
    outputs, logits = outputs_of(model, example, (nn.Linear,))
    for name, output in outputs.items():
        if output is logits:
            return name
    raise ModelError(
        "the model's output must come straight from a Linear layer, whose row of the class is removed at the end; "
        "end the model with nn.Linear and return its output"
    )


def trace(model: nn.Module, example: Tensor) -> list[Group]:
    """Return every group of the model as Torch-Pruning sees it, whether it can be pruned or not."""
    import torch_pruning  # slow to import, and a client never traces

    names = {module: name for name, module in model.named_modules()}
    called = outputs_of(model, example, (nn.Conv2d,))[0]

    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example.clone())
    groups: list[Group] = []
    seen: set[str] = set()
    for module, name in names.items():
        if name not in called or name in seen:
            continue
        width = int(module.get_parameter("weight").shape[0])
        items = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, idxs=list(range(width)))
        members = {}
        for dependency, positions in items:
            target = dependency.target.module
            if not isinstance(target, FOLLOWED):
                continue
            axis = 1 if dependency.handler.__name__ == "prune_in_channels" and not _is_norm(target) else 0
            member = Member(names[target], axis, tuple(sorted(int(i) for i in positions)))
            members[member.module, member.axis, member.positions] = member
        layers = tuple(
            member.module
            for member in members.values()
            if member.axis == 0 and len(member.positions) == width and _is_convolution(model, member.module)
        )
        ordered = tuple(layer for layer in names.values() if layer in layers)
        seen.update(ordered)
        groups.append(Group(ordered, width, tuple(members.values())))
    return groups


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))


def _is_convolution(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Conv2d)


def outputs_of(
    model: nn.Module, example: Tensor, kinds: tuple[type[nn.Module], ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the output of each module of these kinds, in the order of their first call, and the model's own."""
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[name] = output

        return keep

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        logits = _forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, logits


def _followed(model: nn.Module, groups: list[Group], example: Tensor) -> list[Group]:
    """Return the groups that pass the trial, all at once where all do, otherwise by halves."""
    if not groups or _sliced_equals_masked(model, groups, example):
        return groups
    if len(groups) == 1:
        return []
    half = len(groups) // 2
    return _followed(model, groups[:half], example) + _followed(model, groups[half:], example)


def _sliced_equals_masked(model: nn.Module, groups: Sequence[Group], example: Tensor) -> bool:
    """Try the groups out on channels drawn unevenly, so that a shifted map cannot pass unseen."""
    masked = copy.deepcopy(model)
    parts = []
    for group in groups:
        removed = range(min(max(1, group.width // 4), group.width - 1))
        parts.append(group.kept(model, removed))
        for member in group.members:
            if member.axis == 1:
                weight = masked.get_submodule(member.module).get_parameter("weight")
                with torch.no_grad():
                    weight[:, member.of(removed, group.width)] = 0
    sliced = copy.deepcopy(model)
    try:
        slice_tensors(sliced, combine(parts))
        found, expected = _forward(sliced, example), _forward(masked, example)
    except (ModelError, IndexError):  # the sliced shapes do not fit together
        return False
    scale = expected.abs().max().clamp_min(1.0)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _TRIAL_TOLERANCE * scale)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    training = model.training
    try:
        with torch.no_grad():
            output: Tensor = model.eval()(images.clone())  # a model may change its input in place
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"the model cannot take images of shape {tuple(images.shape[1:])}: {error}; choose another model or size"
        ) from error
    finally:
        model.train(training)
    return output
