"""The tasks: one class for each kind of thing that a client can be asked to compute."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from fedunlearn.channels.groups import Channels, find_channels
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.stats import measure_channels
from fedunlearn.data.images import MOST_IMAGES, LabelledImages
from fedunlearn.errors import FederationError
from fedunlearn.federation.jobs import (
    BEYOND,
    BY_RULES,
    LITTLE,
    STRICT,
    Answer,
    ClientData,
    Job,
    Layout,
    Reply,
    Sample,
    check_rows,
    enough,
    kept_images,
    kept_sample,
    no_image,
    sampled,
)
from fedunlearn.federation.privacy import Privacy, protect
from fedunlearn.federation.sums import Gradients, Moments
from fedunlearn.seeding import generator
from fedunlearn.training.batch_norm import batch_norm_layers, batch_norm_sums
from fedunlearn.training.compute import Compute, device_of
from fedunlearn.training.evaluation import count_correct, in_order
from fedunlearn.training.mixing import each_of, fewest, fewest_by_turns
from fedunlearn.training.objectives.base import ByTurns
from fedunlearn.training.sgd import Forgetting, Training, train_locally


@dataclass(frozen=True, eq=False, kw_only=True)
class Measure:
    """Sum channel activations per class over training images.

    Answer: the tensors of ``ChannelStats``, and ``held``, int64, shape ``(classes,)``: the client's training images of
    each class, sampled or not.

    Attributes:
        hook: where channels are read, see ``find_channels``: which layers, and where each, a client finds in its own
            model. A message that could name a module and a side would read pixels at the input of the first one.
        classes: number of classes.
        sample: at most so many images per client, drawn at random; all where None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["measure"] = "measure"
    hook: str = "activation"
    classes: Annotated[int, Field(ge=1)]
    sample: Sample = None

    def answer(self, job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute) -> Answer:
        """Return the statistics as ``rules`` let them leave."""
        if self.classes != len(data.train.classes):
            raise FederationError(f"the job is for {self.classes} classes, this client has {len(data.train.classes)}")
        # Noise is for sums in which one image more is one image more: another sample would be another sum.
        # And a refusal would tell how many there are.
        images = data.train if rules.noise else enough(sampled(job, data, data.train, self.sample), rules)
        taps = channels_of(job.model, self.hook).taps
        with compute.autocast(device_of(model)):
            stats = measure_channels(
                model, in_order(images, model, compute), taps=taps, classes=self.classes, clip=rules.clip
            )
        tensors = protect({**stats.tensors(), "held": data.train.counts()}, rules)
        reported = int(tensors["counts"].sum())
        return Answer(tensors, reported, reported)

    def layout(self, model: Classifier) -> Layout:
        """Return counts, and sums of each layer."""
        layers = channels_of(model, self.hook).taps
        widths = {layer: int(model.module.get_submodule(layer).get_parameter("weight").shape[0]) for layer in layers}
        counts: Layout = {"counts": ((self.classes,), torch.int64), "held": ((self.classes,), torch.int64)}
        return {**counts, **{f"sums.{name}": ((self.classes, width), torch.float64) for name, width in widths.items()}}

    def operations(self, model: Classifier, forward: int, training: int) -> int:
        """Return those of a forward pass."""
        return forward

    def flaw(self, reply: Reply) -> str | None:
        """Refuse negative values, more images than are held, and sums over no image."""
        counts = reply.tensors["counts"]
        absent = counts == 0
        for name, tensor in reply.tensors.items():
            if bool((tensor < 0).any()):
                return f"{name} has negative values"
        held, most = reply.tensors["held"], MOST_IMAGES * max(1, len(reply.members))
        if bool((held > most).any()):  # before anything is added up: the sum of two could wrap
            return f"it holds {int(held.max())} images of a class, more than any client does"
        if bool((counts > held).any()) or int(counts.sum()) > reply.images:
            return f"it counts {int(counts.sum())} images of {int(held.sum())} that it holds"
        for name, sums in reply.tensors.items():
            if not name.startswith("sums."):
                continue
            if bool((sums[absent] != 0).any()):
                return f"{name} has values for classes of which it counts no image"
            if bool((sums > counts[:, None].double() * BEYOND).any()):
                return f"{name} has values beyond what {int(counts.sum())} images can add up to"
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Reestimate:
    """Measure the inputs of the batch normalisation layers; no label is used but to leave ``exclude`` out.

    Answer: ``images`` (float64 scalar) and, per layer, ``mean:LAYER`` and ``square:LAYER``, float64, shape
    ``(channels,)``: over the batches, batch size times mean, and times variance plus squared mean.

    Attributes:
        exclude: classes whose images are not used.
        sample: at most so many images per client, drawn at random; all where None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["reestimate"] = "reestimate"
    exclude: tuple[int, ...] = ()
    sample: Sample = None

    def answer(self, job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute) -> Answer:
        """Return the sums over the client's images of the other classes."""
        images = kept_sample(job, data, self.exclude, self.sample, rules)
        draw = generator(job.seed, job.phase, "order", data.client)
        return Answer(batch_norm_sums(model, images, draw, compute), len(images), len(images))

    def layout(self, model: Classifier) -> Layout:
        """Return the number of images, and two sums of each layer."""
        layers = batch_norm_layers(model.module).items()
        parts = {f"{kind}:{name}": layer.num_features for name, layer in layers for kind in ("mean", "square")}
        return {"images": ((), torch.float64), **{name: ((width,), torch.float64) for name, width in parts.items()}}

    def operations(self, model: Classifier, forward: int, training: int) -> int:
        """Return those of a forward pass."""
        return forward

    def flaw(self, reply: Reply) -> str | None:
        """Refuse negative squares, sums over no image or others, and what no image can have as mean and square."""
        for name, tensor in reply.tensors.items():
            if not name.startswith("mean:") and bool((tensor < 0).any()):
                return f"{name} has negative values"
        images = float(reply.tensors["images"])
        if reply.images < 1:
            return no_image(reply)
        if images != reply.images:
            return f"it sums over {images:g} images and reports {reply.images}"
        for name, mean in reply.tensors.items():
            if name.startswith("mean:"):
                square = reply.tensors["square:" + name.removeprefix("mean:")]
                if bool((square > images * BEYOND).any()) or bool((mean**2 > 1.001 * images * square + LITTLE).any()):
                    return f"{name} and its squares are those of no images"
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Train:
    """Train a copy of the model.

    Answer: its state, under the names of the state dict. ``Reply.images`` weighs it in the average.

    Attributes:
        training: local SGD settings.
        lr: learning rate of this round.
        exclude: classes whose images are not used, but by the objective of ``training``: they are the ones to forget.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["train"] = "train"
    training: Training
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    exclude: tuple[int, ...] = ()

    def answer(self, job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute) -> Answer:
        """Return the state after local training on the client's images of the other classes, and what it forgets."""
        check_rows(job, model, None, data)
        objective = self.training.objective
        alone = objective is not None and objective.share == 1
        images = data.train.only(self.exclude) if alone else kept_images(data, self.exclude, rules)
        if len(images) == 0 and rules.min_images <= 1:
            raise FederationError(f"the client holds no image of the classes {list(self.exclude)}")
        enough(images, rules)
        # A step on one image is its gradient, and the gradient of a first layer holds what went into it.
        if self._images(images) < rules.min_images:
            raise FederationError(
                f"{self.training.local_epochs:g} epochs of {len(images)} images are fewer than {rules.min_images}, "
                f"the fewest that {BY_RULES} let an answer stand for: raise local_epochs"
            )
        if self._images(images) > MOST_IMAGES:  # no answer after so many is taken
            raise FederationError(
                f"{self.training.local_epochs:g} epochs of {len(images)} images are more than {MOST_IMAGES:,} in a "
                "round: lower local_epochs"
            )
        too_fast = self.training.decays_too_fast(self.lr, rules.min_images)  # by the rate of this round
        if too_fast is not None:
            raise FederationError(too_fast)
        draw = generator(job.seed, job.phase, job.round, data.client)
        samples = train_locally(
            model,
            images,
            self.training,
            lr=self.lr,
            draw=draw,
            compute=compute,
            forgetting=self._forgetting(images, job, model, data, rules),
        )
        # A copy: the engine goes on to use the model for its next client.
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        return Answer(state, len(images), samples)

    def _images(self, images: LabelledImages) -> int:
        return max(1, round(self.training.local_epochs * len(images)))

    def _forgetting(
        self, images: LabelledImages, job: Job, model: nn.Module, data: ClientData, rules: Privacy
    ) -> Forgetting | None:
        """Return what the objective needs; nothing at a client whose steps would show too few images of either kind.

        A weight can drown one kind in the other, so that each has to stand for ``min_images`` alone. A class of fewer
        images is not mixed in.
        """
        objective = self.training.objective
        if objective is None:
            return None
        mixed: tuple[LabelledImages, ...] = ()
        least, each = max(1, rules.min_images), 0
        if 0 < objective.share < 1:
            size, limit = self.training.batch_size, self._images(images)
            mixed = tuple(part for part in map(data.train.only, zip(self.exclude)) if len(part) >= least)
            each = each_of(size, objective.share, max(1, len(mixed)))
            held = [*map(len, mixed)]
            if not mixed or fewest(len(images), held, size, each, limit) < least:
                return None
            if (
                isinstance(objective, ByTurns)
                and fewest_by_turns(len(images), held, size, each, limit, objective.turn) < least
            ):
                return None
        return Forgetting(mixed, each, self.exclude, head_layer(model, job.model.example))

    def layout(self, model: Classifier) -> Layout:
        """Return the layout of the model's own state."""
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.module.state_dict().items()}

    def operations(self, model: Classifier, forward: int, training: int) -> int:
        """Return those of a step, and of a forward pass where the received model takes part."""
        objective = self.training.objective
        return training + (forward if objective is not None and objective.teacher else 0)

    def flaw(self, reply: Reply) -> str | None:
        """Refuse negative variances, and training on no image."""
        for name, tensor in reply.tensors.items():
            if name.endswith("running_var") and bool((tensor < 0).any()):
                return f"{name} has negative values"
        return no_image(reply)


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluate:
    """Count right answers on validation images, all classes together: they do not tell which of them a client holds.

    Answer: ``correct`` and ``counts``, int64 scalars, and ``probability``, a float64 one, where it is asked for.

    Attributes:
        exclude: classes whose images are not used.
        labels: the class of each output row; row ``r`` is class ``r`` where None.
        probability: also add up the probabilities that the model gives to the images' classes: of few images they say
            more than right answers.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["evaluate"] = "evaluate"
    exclude: tuple[int, ...] = ()
    labels: tuple[int, ...] | None = None
    probability: bool = False

    def answer(self, job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute) -> Answer:
        """Return right answers and images."""
        images = data.train.take(slice(0, 0)) if data.validation is None else data.validation.without(self.exclude)
        if len(images) < rules.min_images:  # of few images, the number of right answers tells what each shows
            images = images.take(slice(0, 0))
        # Of rows that all stand for one class, say, the right answers are the images of that class.
        check_rows(job, model, self.labels, data)
        counted = count_correct(model, images, labels=self.labels, compute=compute)
        sums = {"correct": counted.correct.sum(), "counts": counted.counts.sum()}
        if self.probability:
            if rules.noise:
                raise FederationError("under noise no sum of probabilities leaves: give unlearn.fraction a number")
            sums["probability"] = _coarse(counted.probability.sum(), len(images))
        return Answer(sums, len(images), len(images))

    def layout(self, model: Classifier) -> Layout:
        """Return two whole numbers, and a sum of probabilities."""
        whole: Layout = {"correct": ((), torch.int64), "counts": ((), torch.int64)}
        return {**whole, "probability": ((), torch.float64)} if self.probability else whole

    def operations(self, model: Classifier, forward: int, training: int) -> int:
        """Return those of a forward pass."""
        return forward

    def flaw(self, reply: Reply) -> str | None:
        """Refuse negative numbers, and more than the images can have."""
        counts = reply.tensors["counts"]
        if int(counts) != reply.images:
            return f"it counts {int(counts)} images and reports {reply.images}"
        for name, number in reply.tensors.items():
            if bool(number < 0):
                return f"{name} has negative values"
            if bool(number > counts + _ROUNDED):
                return f"{name} is {float(number):g} of {int(counts)} images"
        return None


def _coarse(total: Tensor, images: int) -> Tensor:
    """Return a sum over ``images`` whose mean is rounded to a hundredth: more digits would tell of single images."""
    return (100 * total / max(1, images)).round() / 100 * images


_ROUNDED = 1e-6  # by which a sum of probabilities may exceed their number

AnyTask = Measure | Reestimate | Train | Evaluate | Gradients | Moments  # all that a message can ask for
TASKS = get_args(AnyTask)


def channels_of(model: Classifier, hook: str) -> Channels:
    """Return what ``find_channels`` finds, once for a model: server and clients of one process share the outcome.

    Raises:
        ModelError: the model has no channel that can be removed.
    """
    with _finding:
        known = _found.setdefault(model, {})
        if hook not in known:
            known[hook] = find_channels(model.module, model.example, hook=hook)
        return known[hook]


_found: WeakKeyDictionary[Classifier, dict[str, Channels]] = WeakKeyDictionary()
_finding = threading.Lock()
