"""Local training: what one client does with its images in one round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.sgd import sgd
from torch.utils.data import Dataset

from fedunlearn.arguments import is_count, is_fraction, is_positive, is_weight, is_whole, must_be
from fedunlearn.channels.copying import copied
from fedunlearn.channels.taps import head_input, input_of, reading
from fedunlearn.data.batches import AUGMENTATIONS, batches
from fedunlearn.data.datasets import as_dataset
from fedunlearn.data.images import MOST_IMAGES, LabelledImages
from fedunlearn.errors import FederationError, ModelError, RecipeError
from fedunlearn.seeding import drawing, generator
from fedunlearn.training.compute import FLOAT32, Compute
from fedunlearn.training.mixing import again_and_again, is_forgotten, mixed
from fedunlearn.training.objectives.base import Fading, Seen, first_rounds, in_range
from fedunlearn.training.objectives.table import OBJECTIVES, Objective

_WARM_UP = 0.2
_HEAD = ""  # no layer has this name


# What a step may take off the weights: with all of them each step forgets those before, however many images they saw.
_MOST_DECAY = 0.1


@dataclass(frozen=True)
class Training:
    """Settings of local SGD (Nesterov momentum, cross-entropy).

    Attributes:
        lr: learning rate; the peak where a schedule is used.
        batch_size: images in a step.
        local_epochs: passes over the client's images in a round; 0.25 is a random quarter of them.
        momentum: kept within a round, not across rounds.
        weight_decay: L2 coefficient.
        label_smoothing: share ``s`` of the target that is spread evenly over the classes (Szegedy et al., 2016)::

            target[k] = (1 - s) [k = label] + s / classes

        augment: names of augmentations, in order.
        objective: what clients minimise where classes are to be forgotten; the cross-entropy of the others where None.

    Raises:
        RecipeError: a value is out of range.
    """

    lr: float
    batch_size: int = 64
    local_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    objective: Objective | None = None

    def __post_init__(self) -> None:
        in_range(self, lr=is_positive, batch_size=is_count, local_epochs=is_positive)
        in_range(self, momentum=is_fraction, weight_decay=is_weight, label_smoothing=is_fraction)
        too_fast = self.decays_too_fast(self.lr)
        if too_fast is not None:
            raise RecipeError(f"Training(weight_decay=...): {too_fast}")
        if isinstance(self.augment, str) or not all(name in AUGMENTATIONS for name in self.augment):
            raise RecipeError(
                f"Training(augment=...) must be a tuple of names among {', '.join(AUGMENTATIONS)}, got {self.augment!r}"
            )
        if self.objective is not None:
            must_be(OBJECTIVES, self.objective, "Training(objective=...)", "such as Erasing(), or None", RecipeError)
            if self.batch_size < 2 and 0 < self.objective.share < 1:
                raise RecipeError(
                    "Training(batch_size=...) must be at least 2 with this objective: a batch holds images to forget "
                    "and others"
                )

    def decays_too_fast(self, lr: float, min_images: int = 1) -> str | None:
        """Return why a client with this rule trains by no such weight decay at the rate ``lr``, None where it may.

        After ``k`` more steps a step counts for ``(1 - decay)^k``, so that an answer is about its last ``1 / decay``
        batches.
        """
        decay = lr * self.weight_decay / (1 - self.momentum)
        most = min(_MOST_DECAY, self.batch_size / max(1, min_images))
        if decay <= most * (1 + 1e-9):  # as far as rounding goes
            return None
        return (
            f"lr times weight_decay over 1 - momentum is {decay:g}, expected at most {most:g}: with more, what a "
            "client answers is the gradient of its last few images alone; lower weight_decay"
        )

    def of_round(self, round: int, rounds: int) -> Training:
        """Return these settings for ``round`` of ``rounds``: without objective where it is not its turn."""
        objective = self.objective
        if objective is None:
            return self
        used = first_rounds(objective.until, rounds)
        if round >= used or round % objective.every:
            return replace(self, objective=None)
        return replace(self, objective=objective.faded(round / used)) if isinstance(objective, Fading) else self


def one_cycle(round: int, rounds: int) -> float:
    """Return the factor of the learning rate in ``round`` of ``rounds``: up over the first fifth, then a cosine to 0.

    The value is taken in the middle of the round, so no round is wasted on a factor of 0.
    """
    at = (round + 0.5) / rounds
    if at < _WARM_UP:
        return at / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (at - _WARM_UP) / (1 - _WARM_UP)))


def constant(round: int, rounds: int) -> float:
    """Return 1: the learning rate of every round."""
    return 1.0


SCHEDULES = {"constant": constant, "one-cycle": one_cycle}


class Sgd:
    """The steps of ``torch.optim.SGD``, to the bit, without its class.

    The class imports ``torch._dynamo`` when it is made: 800 modules and more CPU time than a small run takes to train.

    Args:
        parameters: what is trained; those without a gradient stay as they are in a step.
        lr: learning rate.
        momentum: 0 for none.
        nesterov: Nesterov's momentum.
        weight_decay: L2 coefficient.
        fused: the fused kernel; torch's choice where None.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._velocities: list[Tensor | None] = [None] * len(self._parameters)
        self._lr = lr
        self._momentum = momentum
        self._nesterov = nesterov
        self._weight_decay = weight_decay
        self._fused = fused

    def step(self) -> None:
        """Move the parameters along their gradients."""
        moved = [(i, parameter) for i, parameter in enumerate(self._parameters) if parameter.grad is not None]
        # Of a layer that a network skips at random the first step may come later, and one call takes those of one kind.
        began = [self._velocities[i] is not None for i, _ in moved]
        for of_kind in (True, False):
            self._step([pair for pair, has_begun in zip(moved, began) if has_begun == of_kind])

    def _step(self, moved: Sequence[tuple[int, nn.Parameter]]) -> None:
        if not moved:
            return
        velocities = [self._velocities[i] for i, _ in moved] if self._momentum else []
        with torch.no_grad():
            sgd(
                [parameter for _, parameter in moved],
                [parameter.grad for _, parameter in moved if parameter.grad is not None],
                velocities,
                fused=self._fused,
                weight_decay=self._weight_decay,
                momentum=self._momentum,
                lr=self._lr,
                dampening=0.0,
                nesterov=self._nesterov,
                maximize=False,
            )
        for (i, _), velocity in zip(moved, velocities):
            self._velocities[i] = velocity

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None


@dataclass(frozen=True, eq=False)
class Forgetting:
    """What a client needs for ``Training.objective``.

    Attributes:
        images: its images of each forgotten class, mixed into each batch; none where batches are of one kind.
        each: how many of each class.
        classes: the forgotten classes.
        head: name of the last linear layer, whose input is read.
    """

    images: tuple[LabelledImages, ...]
    each: int
    classes: tuple[int, ...]
    head: str


def check_trainable(model: nn.Module) -> None:
    """Refuse a model of which no weight may change.

    Raises:
        ModelError: every weight is frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "every weight of the model is frozen (requires_grad=False), so that there is nothing to train: "
            "set requires_grad on those that may change, or ask for no rounds"
        )


def train_locally(
    model: nn.Module,
    images: LabelledImages,
    training: Training,
    *,
    lr: float,
    draw: torch.Generator,
    compute: Compute = FLOAT32,
    forgetting: Forgetting | None = None,
) -> int:
    """Train ``model`` in place on one client's images and return how many images it saw, repeats counted.

    Args:
        model: the client's copy.
        images: the client's training images; without those that ``forgetting`` mixes in.
        training: all settings but the learning rate of this round.
        lr: learning rate of this round.
        draw: owner of the shuffle and the augmentation.
        compute: precision and memory format; the model is in that format already.
        forgetting: what ``training.objective`` needs; the cross-entropy alone is minimised where None.

    Raises:
        FederationError: the loss became NaN or infinite, or ``compute.train`` cannot do what is asked.
        ModelError: every weight is frozen.
    """
    check_trainable(model)
    if compute.train is not None:
        return _by_function(compute.train, model, images, lr, forgetting)
    device = next(model.parameters()).device
    optimiser = _optimiser(model, training, lr, compute)
    objective = None if forgetting is None else training.objective
    teacher = copied(model).eval() if objective is not None and objective.teacher else None
    model.train()
    drawn = partial(batches, draw=draw, augment=training.augment, device=device, memory_format=compute.layout)
    if objective is not None and forgetting is not None and forgetting.images:
        erased = again_and_again(drawn, forgetting.images, forgetting.each)
        drawn = partial(mixed, drawn, erased, forgetting.each * len(forgetting.images))
    wanted = max(1, round(training.local_epochs * len(images)))
    seen = 0
    earlier: float | None = None
    while wanted - seen > (seen > 0):  # one image left over is no batch: batch normalisation cannot train on it
        for batch, labels in drawn(images, training.batch_size, limit=wanted - seen):
            layers = _layers(compute, draw, seen, device)
            if objective is None or forgetting is None:
                with compute.autocast(device), layers:
                    logits = model(batch)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=training.label_smoothing)
            else:
                step = _seen(model, teacher, batch, labels, forgetting, compute, layers)
                at, smoothing = seen / wanted, training.label_smoothing
                loss = objective.loss(step(smoothing=smoothing, progress=at, earlier=earlier, draw=draw))
                earlier = at
            if not torch.isfinite(loss):
                if not torch.isfinite(batch).all():
                    raise FederationError("images hold values that are not finite (NaN): mend or leave them out")
                # After how many images would tell a server of the one that stands there.
                raise FederationError("the loss became NaN or infinite: lower the learning rate")
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            seen += len(labels)
    optimiser.zero_grad()  # the model waits for its next client without gradients
    return seen


def _layers(compute: Compute, draw: torch.Generator, seen: int, device: torch.device) -> AbstractContextManager[None]:
    """Return what the forward pass after ``seen`` images runs in: its own seed where layers draw."""
    if not compute.draws:
        return nullcontext()
    return drawing(generator(draw.initial_seed(), "layers", seen).initial_seed(), device)


def _by_function(
    train: Callable[[nn.Module, Dataset[Any], float], int],
    model: nn.Module,
    images: LabelledImages,
    lr: float,
    forgetting: Forgetting | None,
) -> int:
    """Train ``model`` by the user's own function and return how many images it says to have seen."""
    if forgetting is not None:
        raise FederationError(
            "Compute(train=...) is a function that knows its own loss alone, it cannot do the objective of this job: "
            "leave the objective out of Training, or give Compute(optimiser=...) instead"
        )
    net = copied(model).train()  # what it freezes, hooks or leaves behind must not reach the next client
    seen = train(net, as_dataset(images), lr)
    if not is_whole(seen, 1) or int(seen) > MOST_IMAGES:
        raise FederationError(
            f"Compute(train=...) returned {seen!r}, expected how many images it saw, repeats counted, from 1 to "
            f"{MOST_IMAGES:,}"
        )
    state = net.state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        raise FederationError(
            "Compute(train=...) left a model with other tensors than it was given: change the values alone, not layers"
        )
    model.load_state_dict(state)
    return int(seen)


def _optimiser(model: nn.Module, training: Training, lr: float, compute: Compute) -> Sgd | torch.optim.Optimizer:
    """Return what moves the weights of ``model`` in a round."""
    if compute.optimiser is None:
        return Sgd(
            model.parameters(),
            lr=lr,
            momentum=training.momentum,
            nesterov=training.momentum > 0,
            weight_decay=training.weight_decay,
            fused=True,
        )
    optimiser = compute.optimiser(model.parameters(), lr)
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise RecipeError(
            f"Compute(optimiser=...) made a {type(optimiser).__name__}, expected a torch.optim.Optimizer: return the "
            "optimiser itself"
        )
    return optimiser


def _seen(
    model: nn.Module,
    teacher: nn.Module | None,
    batch: Tensor,
    labels: Tensor,
    forgetting: Forgetting,
    compute: Compute,
    layers: AbstractContextManager[None],
) -> Callable[..., Seen]:
    """Return what the models make of a batch, short of what the batch does not tell."""
    before = None
    if teacher is not None:
        with torch.no_grad(), compute.autocast(batch.device):
            before = teacher(batch).float()
    taps = {_HEAD: input_of(forgetting.head)}
    with reading(model, taps) as read, compute.autocast(batch.device), layers:
        logits = model(batch)
    return partial(
        Seen,
        logits=logits.float(),
        labels=labels,
        features=head_input(read[_HEAD]),
        forgotten=is_forgotten(labels, forgetting.classes),
        forget=forgetting.classes,
        before=before,
        weights=[weight for weight in model.parameters() if weight.requires_grad],
    )
