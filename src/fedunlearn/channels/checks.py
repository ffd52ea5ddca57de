"""What a model must be before it is followed, and one pass through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedunlearn.channels.copying import copied
from fedunlearn.channels.fit import check_module
from fedunlearn.channels.kinds import FOLLOWED
from fedunlearn.errors import ModelError
from fedunlearn.seeding import generator

_OWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# What else a layer has where its weight is computed, and how it becomes a tensor again.
_REMEDIES = {
    "weight_mask": "torch.nn.utils.prune.remove(layer, 'weight')",
    "bias_mask": "torch.nn.utils.prune.remove(layer, 'bias')",
    "weight_g": "torch.nn.utils.remove_weight_norm(layer)",
    "weight_u": "torch.nn.utils.remove_spectral_norm(layer)",
}
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass made.

    Attributes:
        outputs: module to the output of each of its calls, modules in the order of their first call.
        logits: the model's output, shape ``(images, rows)``.
        last: the modules whose output the logits are, as these left it.
    """

    outputs: Mapping[str, list[Tensor]]
    logits: Tensor
    last: Sequence[str]


def example_images(shape: tuple[int, ...]) -> Tensor:
    """Return two normalised images of noise, always the same, shape ``(2, *shape)``: what models are tried out on."""
    return torch.randn((2, *shape), generator=generator(0, "example"))


def placed(example: Tensor, model: nn.Module) -> Tensor:
    """Return ``example`` where the weights of ``model`` are."""
    first = next(model.parameters(), None)
    return example if first is None else example.to(first.device)


def passed(model: nn.Module, example: Tensor, *, training: bool = False) -> Pass:
    """Run ``model`` on ``example``, without gradients, and return what its parts with weights made of it.

    Raises:
        ModelError: the example is no batch, the model cannot take it, or its output is not one tensor of logits.
    """
    outputs: dict[str, list[Tensor]] = {}
    versions: dict[str, list[int]] = {}  # an output may be written into after it was made

    def keep(name: str, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)
        versions.setdefault(name, []).append(output._version)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if isinstance(module, FOLLOWED)
    ]
    try:
        logits = forward(model, example, training=training)
    finally:
        for handle in handles:
            handle.remove()
    last = [
        name
        for name, made in outputs.items()
        if any(output is logits and logits._version == then for output, then in zip(made, versions[name]))
    ]
    return Pass(outputs, logits, last)


def passed_in_training(model: nn.Module, example: Tensor) -> Pass:
    """Return what a pass in training makes; ``model`` and the draws of others stay as they were.

    Raises:
        ModelError: the model cannot take the example, or its output is not one tensor of logits.
    """
    device = example.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout draws
        return passed(copied(model), example, training=True)  # a copy: statistics move in training


def forward(model: nn.Module, images: Tensor, *, training: bool = False) -> Tensor:
    """Return the logits of ``model`` without gradients.

    Raises:
        ModelError: the images are no batch, the model cannot take them, or its output is not one tensor of logits.
    """
    if images.ndim != 4:
        raise ModelError(
            f"an example must be a batch of shape (images, colours, height, width), got shape {tuple(images.shape)}: "
            "one image becomes a batch by example[None]"
        )
    before = model.training
    try:
        model.train(training)
        with torch.no_grad():  # a model may change its input in place
            output: object = model(images.clone())
    except Exception as error:  # the user's own code can fail in any way
        raise ModelError(
            f"the model cannot take images of shape {tuple(images.shape[1:])}: {first_line(error)}; "
            "choose another model or size"
        ) from error
    finally:
        model.train(before)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        mode = "training" if training else "evaluation"
        raise ModelError(
            f"in {mode} the model must return one tensor of logits, shape (images, rows), got {found} "
            f"for {len(images)} images: return the logits alone"
        )
    return output


def first_line(error: Exception) -> str:
    """Return what ``error`` says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are not there, are not float32, or are computed in each pass.

    Raises:
        ModelError: with the name of the tensor or layer, and what to do.
    """
    for name, parameter in check_module(model).named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, expected float32 as images are: "
                "call model.float() first"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ModelError(
                f"{name!r} is a SyncBatchNorm, which is for training in several processes: build the network with "
                "BatchNorm2d, whose weights have the same names"
            )
        if parametrize.is_parametrized(module):
            raise ModelError(
                f"the weights of {name!r} are computed in each pass (a parametrization): call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
            )
        if isinstance(module, FOLLOWED):
            names = [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
            strange = sorted(set(names) - _OWN)
            if strange:
                remedy = next((_REMEDIES[n] for n in strange if n in _REMEDIES), "give it weight and bias alone")
                raise ModelError(
                    f"{name!r} has {', '.join(strange)} beside weight and bias, from which it is computed in each "
                    f"pass: {remedy if '(' not in remedy else f'call {remedy} first'}"
                )


def check_evaluation(model: nn.Module, example: Tensor) -> None:
    """Refuse a model that makes of an image what depends on the other images of its batch, or on chance.

    Raises:
        ModelError: it has batch normalisation without running statistics, or gives an image other logits in other
            company or a second time.
    """
    check_weights(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{name!r} keeps no running statistics (track_running_stats=False), so that evaluation would depend on "
                "batch, order and number of cores: use batch normalisation with running statistics"
            )
    one, twice = (forward(model, images) for images in (example[:2], example[:1].repeat(2, 1, 1, 1)))
    scale = one.abs().max().clamp_min(1e-6)
    if bool(torch.isfinite(one).all()) and not bool((one[0] - twice[0]).abs().max() <= _TOLERANCE * scale):
        raise ModelError(
            "in evaluation the model gives one image different logits beside other images, or a second time: "
            "normalise by running statistics, and drop out in training alone (F.dropout(..., training=self.training))"
        )


def check_parts(model: nn.Module, example: Tensor) -> None:
    """Refuse a model with parts that evaluation does not run, where a class could stay or the repair would break.

    Raises:
        ModelError: a second head that evaluation does not run, or a part that runs in training alone.
    """
    evaluated, trained = passed(model, example), passed_in_training(model, example)
    rows = evaluated.logits.shape[1]
    for name, module in model.named_modules():
        if name in evaluated.outputs or not isinstance(module, FOLLOWED):
            continue
        if name in trained.outputs:
            raise ModelError(
                f"{name!r} runs in training but not in evaluation, so that it is neither measured nor cut: "
                "take it out of the model before unlearning"
            )
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == rows:
            raise ModelError(
                f"{name!r} has {rows} rows, one per class, and evaluation does not run it: the row of a forgotten "
                "class would stay in it; take it out of the model before unlearning"
            )
    if trained.logits.shape != evaluated.logits.shape:
        raise ModelError(
            f"the model returns logits of shape {tuple(trained.logits.shape)} in training and "
            f"{tuple(evaluated.logits.shape)} in evaluation: return the same rows in both"
        )


def tied_tensors(model: nn.Module) -> dict[str, str]:
    """Return module, and tensor, to the reason why it cannot be cut: another module has one of its tensors too."""
    owner: dict[int, tuple[str, str]] = {}
    tied: dict[str, str] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            other, first = owner.setdefault(id(parameter), (name, full))
            if other != name:
                tied |= dict.fromkeys((name, other, full, first), f"{full} is the same tensor as {first}")
    return tied
