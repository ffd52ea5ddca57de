"""The pruning plan: which positions of which tensor stay, as data that can be printed, saved and replayed.

``prune`` removes channels for real: smaller tensors, no masks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedunlearn.channels.groups import Group, Kept, combine, find_groups, parameter_layers, slice_tensors
from fedunlearn.errors import PlanError

ENDS = ("highest", "lowest")
SCOPES = ("layer", "global")
_SCHEMA = 1


@dataclass(frozen=True)
class PruningPlan:
    """A resolved plan: a client applies it without tracing the model.

    Attributes:
        shapes: tensor name to its shape before, checked before use.
        kept: tensor name to axis to the positions that stay, ascending.
        pruned: convolution to its removed output channels, for people.
        left_out: convolution to the reason why it loses nothing.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    pruned: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{layer}: {len(channels)} channels removed" for layer, channels in self.pruned.items() if channels]
        lines += [f"{layer}: left out, {reason}" for layer, reason in self.left_out.items()]
        return "\n".join(lines) or "nothing removed"

    def to_json(self) -> str:
        """Return the plan as JSON with sorted keys."""
        value = {
            "schema": _SCHEMA,
            "shapes": self.shapes,
            "kept": {name: {str(axis): rows for axis, rows in axes.items()} for name, axes in self.kept.items()},
            "pruned": self.pruned,
            "left_out": self.left_out,
        }
        return json.dumps(value, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Return the plan that ``to_json`` wrote.

        Raises:
            PlanError: the text is no such plan.
        """
        try:
            value = json.loads(text)
            if value["schema"] != _SCHEMA:
                raise PlanError(f"expected a pruning plan of schema {_SCHEMA}, got {value['schema']!r}")
            return PruningPlan(
                {name: tuple(int(n) for n in shape) for name, shape in value["shapes"].items()},
                {
                    name: {int(axis): tuple(int(i) for i in rows) for axis, rows in axes.items()}
                    for name, axes in value["kept"].items()
                },
                {layer: tuple(int(c) for c in channels) for layer, channels in value["pruned"].items()},
                {layer: str(reason) for layer, reason in value["left_out"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"expected a pruning plan as JSON, but {type(error).__name__}: {error}") from error

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: a tensor is missing, has another shape, or a kept position is not one of its own.
        """
        state = model.state_dict()
        for name, shape in self.shapes.items():
            found = tuple(state[name].shape) if name in state else None
            if found != shape:
                raise PlanError(
                    f"the plan is for {name} of shape {shape}, the model has {found}: another architecture?"
                )
        for name, axes in self.kept.items():
            for axis, rows in axes.items():
                size = self.shapes.get(name, ())[axis : axis + 1]
                if not rows or not size or list(rows) != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < size[0]:
                    raise PlanError(
                        f"the plan keeps positions of {name} (axis {axis}) that are not ascending within it"
                    )

    def then(self, later: PruningPlan) -> PruningPlan:
        """Return the one plan that does what this plan and then ``later``, made for the pruned model, would do."""
        kept: dict[str, dict[int, tuple[int, ...]]] = {name: dict(axes) for name, axes in self.kept.items()}
        shapes = dict(self.shapes)
        for name, axes in later.kept.items():
            for axis, rows in axes.items():
                before = kept.setdefault(name, {}).get(axis)
                kept[name][axis] = rows if before is None else tuple(before[i] for i in rows)
        for name, shape in later.shapes.items():
            shapes.setdefault(name, shape)
        pruned = dict(self.pruned)
        for layer, channels in later.pruned.items():
            staying = self.kept.get(f"{layer}.weight", {}).get(0)
            original = channels if staying is None else tuple(staying[c] for c in channels)
            pruned[layer] = tuple(sorted((*pruned.get(layer, ()), *original)))
        return PruningPlan(shapes, kept, pruned, {**self.left_out, **later.left_out})


def plan_pruning(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    fraction: float,
    example: Tensor,
    end: str = "highest",
    scope: str = "layer",
) -> PruningPlan:
    """Choose the channels to remove and resolve what that means for every tensor.

    Of a group of ``C`` channels the ``floor(fraction * C)`` best-scored go (``scope="layer"``), or the best-scored
    ``floor(fraction * all channels)`` of all groups together (``"global"``). Layers tied by a residual addition form
    one group, scored by the mean of its layers. A score of 0 or less is never pruned, a group never loses its last
    channel, ties break by layer, then index.

    Args:
        model: the CNN.
        scores: layer to scores, shape ``(channels,)``.
        fraction: share of the channels to remove, strictly between 0 and 1.
        example: a batch of normalised images for tracing the model.
        end: ``"highest"``; ``"lowest"`` prunes the other end of the ranking (as the released code does), whatever
            the sign of the scores.
        scope: ``"layer"`` or ``"global"``.

    Raises:
        PlanError: an argument is out of range, or scores do not fit the model.
        ModelError: the model cannot be pruned.
    """
    check_fraction(fraction)
    if end not in ENDS:
        raise PlanError(f"unlearn.end must be one of {', '.join(ENDS)}, got {end!r}")
    if scope not in SCOPES:
        raise PlanError(f"unlearn.scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    groups, left_out = find_groups(model, example)
    ranked: list[Group] = []
    ranking: list[Tensor] = []
    for group in groups:
        own = [_checked(scores[layer], layer, group.width) for layer in group.layers if layer in scores]
        if own:
            ranked.append(group)
            ranking.append(torch.stack(own).mean(0))
        else:
            left_out |= dict.fromkeys(group.layers, "it was not scored")
    chosen = _choose(ranking, fraction, end, scope)
    pruned = {layer: tuple(channels) for group, channels in zip(ranked, chosen) for layer in group.layers}
    kept = combine(group.kept(model, channels) for group, channels in zip(ranked, chosen) if channels)
    state = model.state_dict()
    return PruningPlan({name: tuple(state[name].shape) for name in kept}, kept, pruned, left_out)


def check_fraction(fraction: float) -> None:
    """Refuse a fraction of channels that is not strictly between 0 and 1.

    Raises:
        PlanError: it is not.
    """
    if not 0 < fraction < 1:
        raise PlanError(f"fraction must lie strictly between 0 and 1, got {fraction}: check unlearn.fraction")


def plan_without_rows(model: nn.Module, head: str, classes: Sequence[int]) -> PruningPlan:
    """Return the plan that removes the output rows of ``classes`` from the linear layer ``head``."""
    kept = {
        tensor: {0: tuple(row for row in range(size) if row not in classes)}
        for tensor, size in parameter_layers(model, head, 0)
    }
    state = model.state_dict()
    return PruningPlan({name: tuple(state[name].shape) for name in kept}, kept)


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of ``model`` with every tensor cut to what ``plan`` keeps.

    Raises:
        PlanError: the plan was made for another architecture.
    """
    plan.check(model)
    pruned = copy.deepcopy(model)
    slice_tensors(pruned, plan.kept)
    return pruned


def _checked(scores: Tensor, layer: str, width: int) -> Tensor:
    if scores.shape != (width,) or not bool(torch.isfinite(scores).all()):
        raise PlanError(
            f"scores of {layer} must be {width} finite numbers, one per channel, got shape {tuple(scores.shape)}"
        )
    return scores.double()


def _choose(ranking: Sequence[Tensor], fraction: float, end: str, scope: str) -> list[list[int]]:
    """Return, per group, the channels to remove, ascending."""
    sign = 1 if end == "highest" else -1
    entries = [
        (-sign * float(score), index, channel)
        for index, scores in enumerate(ranking)
        for channel, score in enumerate(scores)
        if end == "lowest" or float(score) > 0
    ]
    widths = [len(scores) for scores in ranking]
    room = [_quota(fraction, width) if scope == "layer" else width - 1 for width in widths]
    total = sum(room) if scope == "layer" else _quota(fraction, sum(widths))
    chosen: list[list[int]] = [[] for _ in ranking]
    for _, index, channel in sorted(entries):
        if total > 0 and room[index] > 0:
            chosen[index].append(channel)
            room[index] -= 1
            total -= 1
    return [sorted(channels) for channels in chosen]


def _quota(fraction: float, width: int) -> int:
    """Return ``floor(fraction * width)``, not fooled by 0.29 * 100 = 28.999..., and never all of them."""
    return min(int(fraction * width + 1e-9), width - 1)
