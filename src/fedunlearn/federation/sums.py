"""Tasks of methods that edit weights by sums over images: gradients, their squares, second moments of layer inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import nn

from fedunlearn.channels.copying import copied
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.taps import with_gradients
from fedunlearn.data.images import MOST_IMAGES
from fedunlearn.federation.jobs import (
    BEYOND,
    LITTLE,
    STRICT,
    Answer,
    ClientData,
    Job,
    Layout,
    Reply,
    Sample,
    check_rows,
    kept_sample,
    no_image,
)
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.privacy import Privacy
from fedunlearn.training.compute import Compute
from fedunlearn.training.moments import (
    gradient_sums,
    input_moments,
    moment_layers,
    moment_operations,
    patch_width,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradients:
    """Sum the gradients of the cross-entropy, or their squares, over images.

    Answer: by parameter, float64, in its shape, see ``gradient_sums``.

    Attributes:
        squared: the squares of the gradients of single images.
        exclude: classes whose images are not used.
        sample: at most so many images per client, drawn at random; all where None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["gradients"] = "gradients"
    squared: bool = False
    exclude: tuple[int, ...] = ()
    sample: Sample = None

    def answer(self, job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute) -> Answer:
        """Return the sums over the client's images of the other classes."""
        check_rows(job, model, None, data)
        images = kept_sample(job, data, self.exclude, self.sample, rules)
        found = gradient_sums(model, images, compute, squared=self.squared)
        return Answer(found, len(images), len(images))

    def layout(self, model: Classifier) -> Layout:
        """Return the layout of the model's parameters; whole numbers have no gradient."""
        parameters = model.module.named_parameters()
        return {
            name: (tuple(parameter.shape), torch.float64)
            for name, parameter in parameters
            if parameter.is_floating_point()
        }

    def operations(self, model: Classifier, forward: int, training: int) -> int:
        """Return those of a pass forth and back, to the weights that are frozen in training too."""
        if all(parameter.requires_grad for parameter in model.module.parameters()):
            return training
        return flops_per_image(with_gradients(copied(model.module)), model.shape)[1]

    def flaw(self, reply: Reply) -> str | None:
        """Refuse negative squares, what no gradients add up to, and sums over no image."""
        most = max(1, reply.images) * (BEYOND**2 if self.squared else BEYOND)
        for name, tensor in reply.tensors.items():
            if self.squared and bool((tensor < 0).any()):
                return f"{name} has negative values"
            if bool((tensor.abs() > most).any()):
                return f"{name} has values beyond what {reply.images} images can add up to"
        return no_image(reply)


@dataclass(frozen=True, eq=False, kw_only=True)
class Moments:
    """Sum the second moments of what linear layers and convolutions receive.

    Answer: by layer, float64, shape ``(d, d)``, see ``input_moments``.

    Attributes:
        exclude: classes whose images are not used.
        sample: at most so many images per client, drawn at random; all where None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["moments"] = "moments"
    exclude: tuple[int, ...] = ()
    sample: Sample = None

    def answer(self, job: Job, model: nn.Module, data: ClientData, rules: Privacy, compute: Compute) -> Answer:
        """Return the sums over the client's images of the other classes."""
        images = kept_sample(job, data, self.exclude, self.sample, rules)
        found = input_moments(model, images, compute, hide=rules.min_images > 1)
        return Answer(found, len(images), len(images))

    def layout(self, model: Classifier) -> Layout:
        """Return a square matrix of each layer."""
        widths = {name: patch_width(layer) for name, layer in moment_layers(model.module).items()}
        return {name: ((width, width), torch.float64) for name, width in widths.items()}

    def operations(self, model: Classifier, forward: int, training: int) -> int:
        """Return those of a forward pass and of the products ``x x^T``."""
        return forward + moment_operations(model.module, model.shape)

    def flaw(self, reply: Reply) -> str | None:
        """Refuse what is no sum of squares on its diagonal, products beyond those, and sums over no image."""
        for name, tensor in reply.tensors.items():
            squares = tensor.diagonal()
            if bool((squares < 0).any()):
                return f"{name} has negative squares"
            if bool((squares > MOST_IMAGES * BEYOND).any()):
                return f"{name} has values beyond what images can add up to"
            size = squares.sqrt()  # |sum x_i x_j| <= sqrt(sum x_i^2 sum x_j^2)
            if bool((tensor.abs() > 1.001 * size[:, None] * size + LITTLE).any()):
                return f"{name} has products beyond its squares"
        return no_image(reply)
