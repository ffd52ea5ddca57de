"""The pruning plan, and the classifier it is applied to: smaller tensors, no masks."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedunlearn.arguments import is_fraction, is_whole, must_be
from fedunlearn.channels.checks import example_images
from fedunlearn.channels.copying import copied
from fedunlearn.channels.fit import check_finite, check_module, named_classes
from fedunlearn.channels.groups import Channels
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.slicing import Kept, combine, parameter_layers, slice_tensors
from fedunlearn.channels.structure import Group
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
                {name: _positions(shape) for name, shape in value["shapes"].items()},
                {
                    name: {int(axis): _positions(rows) for axis, rows in axes.items()}
                    for name, axes in value["kept"].items()
                },
                {layer: _positions(channels) for layer, channels in value["pruned"].items()},
                {layer: str(reason) for layer, reason in value["left_out"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"expected a pruning plan as JSON, but {type(error).__name__}: {error}") from error

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: a tensor is missing, has another or no shape, or a kept position is not one of its own.
        """
        state = model.state_dict()
        for name, shape in self.shapes.items():
            found = tuple(state[name].shape) if name in state else None
            if found != shape:
                raise PlanError(
                    f"the plan is for {name} of shape {shape}, the model has {found}: another architecture?"
                )
        for name, axes in self.kept.items():
            if name not in self.shapes:
                raise PlanError(f"the plan keeps positions of {name!r}, whose shape it does not tell: it was changed")
            for axis, rows in axes.items():
                size = self.shapes[name][axis : axis + 1]
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


def _positions(numbers: Sequence[int]) -> tuple[int, ...]:
    for number in numbers:
        if not is_whole(number, 0):
            raise ValueError(f"{number!r} is no whole number of at least 0")
    return tuple(numbers)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model, how its shapes came about, and which class each of its output rows names.

    Attributes:
        module: a CNN with a row per class at its end, see ``head_layer``.
        shape: ``(colours, height, width)`` of the images it takes.
        plan: how its shapes follow from its architecture; nothing was removed where the plan is empty.
        labels: the class of each output row; row ``r`` is class ``r`` where None.
    """

    module: nn.Module
    shape: tuple[int, int, int]
    plan: PruningPlan = field(default_factory=PruningPlan)
    labels: tuple[int, ...] | None = None

    @staticmethod
    def of(model: nn.Module | Classifier, shape: tuple[int, int, int]) -> Classifier:
        """Return ``model`` as a classifier of images of ``shape``; one that is a classifier already stays as it is.

        Raises:
            ModelError: it is no model, or one that is wrapped or not initialised.
        """
        classifier = model if isinstance(model, Classifier) else Classifier(model, shape)
        check_module(classifier.module)
        return classifier

    @property
    def example(self) -> Tensor:
        """Two normalised images of noise, always the same, to follow the model with."""
        return example_images(self.shape)

    @property
    def rows(self) -> int:
        """How many output rows the model has.

        Raises:
            ModelError: it does not end in a linear layer.
        """
        return int(self.module.get_submodule(head_layer(self.module, self.example)).get_parameter("weight").shape[0])

    def checked(self, classes: int) -> Classifier:
        """Return the classifier with the class of each of its rows, held against data of ``classes`` classes.

        Raises:
            ModelError: its weights are not finite, or its rows do not name classes of the data, each once.
        """
        check_finite(check_module(self.module).state_dict(), "the model")
        return replace(self, labels=named_classes(self.labels, self.rows, classes))

    def copy(self) -> Classifier:
        """Return the same classifier with a module of its own."""
        return replace(self, module=copied(self.module))

    def cut(self, step: PruningPlan) -> Classifier:
        """Return the classifier without what ``step``, a plan for its present shapes, removes.

        Raises:
            PlanError: the plan was made for other shapes.
        """
        return replace(self, module=prune(self.module, step), plan=self.plan.then(step))

    def without_rows(self, classes: Collection[int]) -> Classifier:
        """Return the classifier without the output rows of ``classes``, which it can then never name.

        Raises:
            ModelError: the model does not end in a linear layer, or its labels are not one per row.
            PlanError: one of ``classes`` never had a row, or no row would stay.
        """
        head = head_layer(self.module, self.example)
        rows = self.rows
        # A class whose row went before is known by the plan that removed it.
        known = max(self.plan.shapes.get(f"{head}.weight", (rows,))[0], 1 + max(self.labels or (rows - 1,)))
        named = named_classes(self.labels, rows, rows if self.labels is None else known)
        for label in classes:
            if not 0 <= label < known:
                raise PlanError(f"the model has no output row of class {label}: its classes are 0 .. {known - 1}")
        if set(named) <= set(classes):
            raise PlanError(f"without the classes {sorted(classes)} no output row would stay: leave at least one")
        gone = [row for row, label in enumerate(named) if label in classes]
        labels = tuple(label for label in named if label not in classes)
        return replace(self.cut(plan_without_rows(self.module, head, gone)), labels=labels)


@dataclass(frozen=True)
class Cut:
    """How much of each layer goes, and from which end of the ranking.

    Attributes:
        fraction: share of the channels to remove, below 1; 0 removes none.
        end: ``"highest"``; ``"lowest"`` removes the other end of the ranking (as the released code does), whatever
            the sign of the scores.
        scope: ``"layer"``: the share of each layer; ``"global"``: of all layers together.

    Raises:
        PlanError: a value is none of these.
    """

    fraction: float
    end: str = "highest"
    scope: str = "layer"

    def __post_init__(self) -> None:
        if not is_fraction(self.fraction):
            raise PlanError(f"fraction must be at least 0 and below 1, got {self.fraction!r}: check unlearn.fraction")
        if self.end not in ENDS:
            raise PlanError(f"unlearn.end must be one of {', '.join(ENDS)}, got {self.end!r}")
        if self.scope not in SCOPES:
            raise PlanError(f"unlearn.scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of ``model`` with every tensor cut to what ``plan`` keeps.

    Raises:
        PlanError: the plan was made for another architecture.
        ModelError: the model is none.

    Example:
        >>> from fedunlearn.channels.groups import find_channels
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> channels = find_channels(net, torch.rand(2, 1, 8, 8))
        >>> plan = plan_pruning(channels, {"0": torch.tensor([0.1, 0.9, 0.3, 0.2])}, Cut(0.5))
        >>> prune(net, plan)[0].weight.shape  # two of four filters are left
        torch.Size([2, 1, 3, 3])
    """
    plan.check(check_module(model))
    pruned = copied(model)
    slice_tensors(pruned, plan.kept)
    return pruned


def plan_pruning(channels: Channels, scores: Mapping[str, Tensor], cut: Cut) -> PruningPlan:
    """Choose the channels to remove and resolve what that means for every tensor.

    Of a group of ``C`` channels the ``floor(fraction * C)`` best-scored go (``scope="layer"``), or the best-scored
    ``floor(fraction * all channels)`` of all groups together (``"global"``). Layers tied by a residual addition form
    one group, scored by the mean of its layers. A score of 0 or less is never pruned, a group never loses its last
    channel, ties break by layer, then index. Channels that can only go together (``Group.units``) have the mean of
    their scores, and stay where they are more than the share.

    Args:
        channels: of the model, see ``find_channels``.
        scores: layer to scores, shape ``(channels,)``.
        cut: how many, and which end.

    Raises:
        PlanError: scores do not fit the model.

    Example:
        >>> from fedunlearn.channels.groups import find_channels
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> channels = find_channels(net, torch.rand(2, 1, 8, 8))
        >>> print(plan_pruning(channels, {"0": torch.tensor([0.1, 0.9, 0.3, 0.2])}, Cut(0.5)))
        0: 2 channels removed
    """
    must_be(Channels, channels, "plan_pruning(channels)", "what find_channels(model, example) returns", PlanError)
    must_be(Cut, cut, "plan_pruning(cut)", "a Cut, such as Cut(0.2)", PlanError)
    unknown = sorted(
        set(scores) - {layer for group in channels.groups for layer in group.layers} - {*channels.left_out}
    )
    if unknown:
        raise PlanError(
            f"there are scores of {unknown[0]!r}, which is no convolution of the model: score its layers "
            f"{', '.join(channels.taps)}"
        )
    left_out = dict(channels.left_out)
    ranked: list[Group] = []
    ranking: list[Tensor] = []
    for group in channels.groups:
        rankings = [_checked(scores[layer], layer, group.width) for layer in group.layers if layer in scores]
        if rankings:
            ranked.append(group)
            ranking.append(torch.stack(rankings).mean(0))
        else:
            left_out |= dict.fromkeys(group.layers, "it was not scored")
    chosen = _choose(ranked, ranking, cut)
    pruned = {layer: tuple(gone) for group, gone in zip(ranked, chosen) for layer in group.layers}
    kept = combine(group.kept(channels.model, gone) for group, gone in zip(ranked, chosen) if gone)
    state = channels.model.state_dict()
    return PruningPlan({name: tuple(state[name].shape) for name in kept}, kept, pruned, left_out)


def plan_without_rows(model: nn.Module, head: str, rows: Collection[int]) -> PruningPlan:
    """Return the plan that removes output rows from the linear layer ``head``."""
    kept = {
        tensor: {0: tuple(row for row in range(size) if row not in rows)}
        for tensor, size in parameter_layers(model, head, 0)
    }
    state = model.state_dict()
    return PruningPlan({name: tuple(state[name].shape) for name in kept}, kept)


def _checked(scores: Tensor, layer: str, width: int) -> Tensor:
    if scores.shape != (width,) or not bool(torch.isfinite(scores).all()):
        raise PlanError(
            f"scores of {layer} must be {width} finite numbers, one per channel, got shape {tuple(scores.shape)}"
        )
    return scores.double()


def _choose(groups: Sequence[Group], ranking: Sequence[Tensor], cut: Cut) -> list[list[int]]:
    """Return, per group, the channels to remove, ascending."""
    sign = 1 if cut.end == "highest" else -1
    entries = [
        (-score, index, channels)
        for index, (group, scores) in enumerate(zip(groups, ranking))
        for score, channels in group.units((sign * scores).tolist())
        if cut.end == "lowest" or score > 0
    ]
    room = [quota(cut.fraction, group.width) if cut.scope == "layer" else group.width - group.unit for group in groups]
    total = sum(room) if cut.scope == "layer" else quota(cut.fraction, sum(group.width for group in groups))
    chosen: list[list[int]] = [[] for _ in groups]
    for _, index, channels in sorted(entries):
        if total >= len(channels) and room[index] >= len(channels):
            chosen[index].extend(channels)
            room[index] -= len(channels)
            total -= len(channels)
    return [sorted(channels) for channels in chosen]


def quota(fraction: float, width: int) -> int:
    """Return ``floor(fraction * width)``, not fooled by 0.29 * 100 = 28.999..., and never all of them."""
    return min(int(fraction * width + 1e-9), width - 1)
