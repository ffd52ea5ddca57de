"""Whether a model can be worked with: what it is, whether its weights are numbers, which class each row names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedunlearn.errors import ModelError


def check_module(model: object) -> nn.Module:
    """Return ``model`` if it is a module whose tensors have the names and places that its class gave them.

    Raises:
        ModelError: it is something else, or wrapped, scripted or not initialised.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a model (torch.nn.Module), got {type(model).__name__}: build the model first, "
            "and fill it with model.load_state_dict(...) where these are its weights"
        )
    if "_orig_mod" in model._modules:
        raise ModelError("the model is wrapped by torch.compile, which hides its layers: give model._orig_mod")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"the model is wrapped by {type(model).__name__}, which hides its layers: give model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is scripted, and its layers cannot be cut: give the model it was made from")
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state and not isinstance(
            module.get_extra_state(), Tensor
        ):
            raise ModelError(
                f"{name or 'the model'} keeps a state that is no tensor (get_extra_state), of which clients have no "
                "average: take it off the model"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name} has no shape yet (a lazy layer): call the model on a batch of images first")
        if tensor.is_meta:
            raise ModelError(f"{name} has no values (it is on the meta device): load the model's weights first")
        if tensor.is_complex():
            raise ModelError(f"{name} is {tensor.dtype}, of which clients have no average: keep it as two real tensors")
    return model


def check_finite(state: Mapping[str, Tensor], owner: str) -> None:
    """Refuse weights that are no numbers: of logits that are NaN, the largest is always that of the first class.

    Args:
        state: tensors by name.
        owner: whose they are, in the message.

    Raises:
        ModelError: a tensor has a NaN or an infinite value.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point():
            wrong = int((~torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)).sum())
            if wrong:
                raise ModelError(
                    f"{owner}: {name} has {wrong} values of {tensor.numel()} that are NaN or infinite: a training "
                    "that diverged, or float16 that overflowed? Take weights from before"
                )


def finite(logits: Tensor) -> Tensor:
    """Return ``logits``, shape ``(images, rows)``; finite weights can still overflow on their way to them.

    Raises:
        ModelError: one is a NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            "outputs of the model are NaN or infinite, of which the largest says nothing: its weights, or the "
            "statistics of its batch normalisation, are too large; take weights from before, or normalise the images"
        )
    return logits


def named_classes(labels: Sequence[int] | None, rows: int, classes: int) -> tuple[int, ...]:
    """Return the class of each output row, ``0 .. rows - 1`` where ``labels`` is None.

    Args:
        labels: the class of each output row, as a model tells.
        rows: how many output rows it has.
        classes: how many classes there are.

    Raises:
        ModelError: a row for every class is missing where there are no labels; or the labels are not one per row, name
            a class twice, or one that is not there.
    """
    if labels is None:
        if rows != classes:
            raise ModelError(
                f"the model has {rows} output rows, the data {classes} classes: say which class each row names, "
                "Classifier(model, shape, labels=...), as the model that unlearn() returns does; or give the model "
                "that has a row for every class"
            )
        return tuple(range(classes))
    named = tuple(labels)
    if len(named) != rows:
        raise ModelError(
            f"the model has {rows} output rows and {len(named)} labels {list(named)}: give one label per row"
        )
    for label in named:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise ModelError(f"the labels of output rows must be classes 0 .. {classes - 1}, got {label!r}")
    if len(set(named)) < rows:
        twice = next(label for label in named if named.count(label) > 1)
        raise ModelError(f"two output rows are labelled as class {twice}: give each row a class of its own")
    return named


def without_addresses(value: object) -> str:
    """Return ``repr(value)`` without addresses in memory, which change with the process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
