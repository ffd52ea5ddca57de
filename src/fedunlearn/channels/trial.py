"""Trying groups out: a model with channels sliced away must give the logits of the model with those channels masked.

The trial is run on copies whose weights are drawn anew. Whatever a model has learnt, zeros, tiny heads or units that
are silent on noise, its channels then reach the output, and none looks like another: a trial that changes nothing of
the output would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.channels.checks import example_images, first_line, forward
from fedunlearn.channels.copying import copied
from fedunlearn.channels.kinds import NORMS, channel_axis
from fedunlearn.channels.slicing import combine, parameter_layers, slice_tensors
from fedunlearn.channels.structure import Group, Member
from fedunlearn.errors import ModelError, PlanError
from fedunlearn.seeding import generator

CROSSED = "its channels cross an operation that cannot be followed, such as a zero-padded shortcut"
BLIND = "without its channels the output of the trial stays the same, so nothing shows that it was followed rightly"
_SIGMA = 1.5
_PARTS = 4  # of the channels, each removed alone
# Of the largest logit: what a group must move. And of what it moved: how far slicing may be from masking.
_BOUNDS = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-3, 2e-2)}


def try_out(model: nn.Module, groups: Sequence[Group], shape: tuple[int, ...]) -> tuple[list[Group], dict[str, str]]:
    """Return the groups that are followed rightly, and layer to the reason why the others are not.

    Args:
        model: in evaluation mode; left as it was.
        groups: what Torch-Pruning says.
        shape: of an image.
    """
    able = [group for group in groups if all(_fits(model, member, group.width) for member in group.members)]
    unseen = [group for group in able if group.width > group.unit]  # the last channels are never cut
    # Where no positive value gets through, one of either sign may; and code may treat values below zero otherwise.
    for positive in (True, False):
        tried = [group for group in able if group.width > group.unit]
        if not tried:
            break
        net, images = drawn_anew(model, shape, positive=positive)
        least, tolerance = _BOUNDS[images.dtype]
        moved = _movements(net, tried, images)
        shown = [group for group in tried if moved[group] > least]
        right = shown
        for part in range(_PARTS):
            right = _right(net, right, part, images, {group: tolerance * min(1.0, moved[group]) for group in right})
        able = [group for group in able if group in right or group not in shown]
        unseen = [group for group in unseen if group not in shown]
    reasons: dict[str, str] = {}
    for group in groups:
        if group in unseen or group not in able:
            reasons |= dict.fromkeys(group.layers, BLIND if group in unseen else CROSSED)
    return [group for group in able if group not in unseen], reasons


def _fits(model: nn.Module, member: Member, width: int) -> bool:
    """Return whether a member has k positions for each channel; a maximum over channels leaves one for all."""
    size = max((size for _, size in parameter_layers(model, member.module, member.axis)), default=0)
    return len(member.positions) % width == 0 and member.positions[-1] < size


def _movements(net: nn.Module, groups: Sequence[Group], images: Tensor) -> dict[Group, float]:
    """Return how far the logits would move without the half of a group that moves them less, as a share of the largest.

    To first order: the sum of weight times gradient over what reads the channels.
    """
    try:
        with torch.enable_grad():
            logits = net(images.clone())
            weights = torch.linspace(1, 2, logits.numel()).to(logits).view_as(logits)
            torch.autograd.backward((weights * logits).sum())
    except RuntimeError as error:
        raise ModelError(
            f"autograd cannot go back through the model ({first_line(error)}): return logits that torch made, and "
            "change nothing in place that a gradient needs"
        ) from error
    scale = float(logits.detach().abs().max())
    moved = {}
    for group in groups:
        halves = [0.0, 0.0]
        for member in group.members:
            if not member.reads:  # what makes the channels, or hands them on
                continue
            weight = net.get_parameter(f"{member.module}.weight")
            if weight.grad is not None:
                flow = (weight.detach() * weight.grad).transpose(0, 1).flatten(1).abs().sum(1)
                for half in (0, 1):
                    halves[half] += float(flow[member.of(_removed(group, half), group.width)].sum())
        moved[group] = min(halves) / scale if scale else 0.0
    return moved


def drawn_anew(model: nn.Module, shape: tuple[int, ...], *, positive: bool = False) -> tuple[nn.Module, Tensor]:
    """Return a copy with weights drawn anew, positive and very uneven or of either sign, and images for it.

    In float64, where a channel in a wrong place stands out from rounding; in float32 where the model insists on it.
    """
    net = copied(model)
    draw = generator(0, "trial")

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=draw).to(tensor)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = normal(module.weight)
                axes = tuple(range(1, weight.ndim))
                if positive:
                    weight = (_SIGMA * weight).exp()
                    weight /= weight.sum(axes, keepdim=True)
                else:
                    weight *= (2 / weight[0].numel()) ** 0.5
                module.weight.copy_(weight)
                continue
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.zero_()
                    module.running_var.fill_(1)
                if not module.affine and module.running_var is not None:  # what tells its channels apart
                    module.running_var.copy_(0.75 + 0.25 * normal(module.running_var).tanh())
        read = {f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
        for name, parameter in net.named_parameters():
            if name.rpartition(".")[2] == "bias":
                level = 0.1 * normal(parameter)
                parameter.copy_(level.abs() if positive else level)
            elif name not in read and parameter.is_floating_point():
                parameter.copy_(0.75 + 0.25 * normal(parameter).tanh())
    images = example_images(shape).to(next(net.parameters()).device)
    images = images.abs() if positive else images
    try:
        forward(net.double(), images.double())
    except ModelError:
        return net.float(), images
    return net, images.double()


def _removed(group: Group, part: int) -> list[int]:
    """Return a drawn half of the channels, the other half, the first that can go, or the last, of ``_PARTS``.

    With the halves each channel is tried out once. Both may take as many of each of several parts as of the others,
    which code that divides channels into equal parts would not notice.
    """
    if part > 1:
        by_place = sorted(channels for _, channels in group.units([0.0] * group.width))
        return list(by_place[0 if part == 2 else -1])
    order = torch.randperm(group.width, generator=generator(0, "half", group.width)).tolist()
    units = sorted(group.units(order))
    middle = len(units) // 2
    return sorted(channel for _, channels in (units[:middle] if part == 0 else units[middle:]) for channel in channels)


def masked(net: nn.Module, sliced: nn.Module, removed: Mapping[Group, Sequence[int]], images: Tensor) -> Tensor:
    """Return the logits where what reads the removed channels ignores them, and norms over channels do not see them.

    Args:
        net: the whole model; left as it was.
        sliced: the same without these channels, for its norms.
        removed: group to channels.
        images: what the model takes.
    """
    before: dict[str, Tensor] = {}
    gone: dict[str, set[int]] = {}
    with torch.no_grad():
        for group, channels in removed.items():
            for member in group.members:
                positions = member.of(channels, group.width)
                if member.reads:
                    weight = net.get_parameter(f"{member.module}.weight")
                    before.setdefault(member.module, weight.clone())
                    weight[:, positions] = 0
                else:
                    gone.setdefault(member.module, set()).update(positions)
        handles = [
            module.register_forward_hook(_of_what_stays(sliced.get_submodule(name), gone[name]))
            for name, module in net.named_modules()
            if isinstance(module, NORMS) and name in gone
        ]
        try:
            logits = forward(net, images)
        finally:
            for handle in handles:
                handle.remove()
            for name, kept in before.items():
                net.get_parameter(f"{name}.weight").copy_(kept)
    return logits


def _of_what_stays(
    smaller: nn.Module, gone: Collection[int]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a hook that normalises the channels that stay by ``smaller``, and makes the others 0."""

    def normalised(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        axis = channel_axis(module) % output.ndim
        stay = torch.tensor([i for i in range(output.shape[axis]) if i not in gone])
        return torch.zeros_like(output).index_copy(axis, stay, smaller(inputs[0].index_select(axis, stay)))

    return normalised


def _right(
    net: nn.Module, groups: list[Group], part: int, images: Tensor, tolerance: Mapping[Group, float]
) -> list[Group]:
    """Return the groups that pass, all at once where all do, otherwise by halves."""
    if not groups or _sliced_equals_masked(net, groups, part, images, min(tolerance[group] for group in groups)):
        return groups
    if len(groups) == 1:
        return []
    middle = len(groups) // 2
    return [
        group for some in (groups[:middle], groups[middle:]) for group in _right(net, some, part, images, tolerance)
    ]


def _sliced_equals_masked(net: nn.Module, groups: Sequence[Group], part: int, images: Tensor, tolerance: float) -> bool:
    sliced, removed = copied(net), {group: _removed(group, part) for group in groups}
    try:
        slice_tensors(sliced, combine(group.kept(net, channels) for group, channels in removed.items()))
        found, expected = forward(sliced, images), masked(net, sliced, removed, images)
    except (ModelError, PlanError, IndexError, RuntimeError):  # the sliced shapes do not fit together
        return False
    scale = expected.abs().max()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * scale)
