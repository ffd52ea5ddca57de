"""The head: the layer whose output has one row per class."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedunlearn.channels.checks import check_weights, forward, passed, placed, tied_tensors
from fedunlearn.channels.copying import copied
from fedunlearn.channels.slicing import parameter_layers, slice_tensors
from fedunlearn.channels.trial import drawn_anew
from fedunlearn.errors import ModelError

_SAME = 1e-4  # of the largest logit: how far what follows the head may move the others


def head_layer(model: nn.Module, example: Tensor) -> str:
    """Return the name of the layer whose output has one row per class: the one to cut when a class is removed.

    Either the logits are what a ``Linear`` layer makes. Or they lose a class with the row of a ``Linear`` or ``Conv2d``
    layer, as a trial shows, and change by no more than a number per image: those of a convolution that is pooled, or
    of a log-softmax.

    Raises:
        ModelError: the model has no such layer, or it is used twice.
    """
    check_weights(model)
    example = placed(example, model)
    seen = passed(model, example)
    rows = seen.logits.shape[1]
    layers = {name: model.get_submodule(name) for name in [*seen.outputs][::-1]}
    # A layer of another class may make more of its rows than a row of the output each: it is tried out.
    heads = [name for name, layer in layers.items() if type(layer) is nn.Linear and name in seen.last]
    maybe = [name for name, layer in layers.items() if _has_rows(layer, rows)]
    if rows == 1 and len(maybe) > 1:  # nothing else tells the last class's row from a gate
        maybe = [name for name in maybe if name in seen.last and isinstance(layers[name], nn.Linear)]
    shown = (name for name in maybe if _names_classes(model, name, example))
    for name in (*heads, *([] if heads else shown)):
        used = tied_tensors(model).get(name)
        if len(seen.outputs[name]) > 1:
            used = f"{name} is called {len(seen.outputs[name])} times in a pass"
        if used:
            raise ModelError(f"the row of a class cannot be removed alone, {used}: give the output its own Linear")
        return name
    raise ModelError(
        "the model's output must come straight from a Linear layer, whose row of the class is removed at the end, or "
        "from a convolution that is pooled, a log-softmax after it or not: end the model with nn.Linear and return its "
        "output"
    )


def _has_rows(layer: nn.Module, rows: int) -> bool:
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    return plain and layer.get_parameter("weight").shape[0] == rows


def _names_classes(model: nn.Module, name: str, example: Tensor) -> bool:
    """Return whether without a row of a layer the logits are those of the others, up to a number per image.

    Tried with the first, the last and one between: code after the layer may write to a class by its place.
    """
    model, example = drawn_anew(model, tuple(example.shape[1:]))  # what it has learnt may hide that a row is read

    def with_rows(kept: Sequence[int]) -> Tensor:
        other = copied(model)
        slice_tensors(other, {tensor: {0: tuple(kept)} for tensor, _ in parameter_layers(model, name, 0)})
        return forward(other, example)

    def follows(kept: Sequence[int]) -> bool:
        found, expected = with_rows(kept), whole[:, list(kept)]
        if found.shape != expected.shape:
            return False
        apart = found - expected
        apart = apart - apart.mean(1, keepdim=True)
        return bool(apart.abs().max() <= _SAME * expected.abs().max())

    try:
        whole = forward(model, example)
        rows = range(whole.shape[1])
        if len(rows) == 1:  # cut down to one class
            return True
        tried = [[row for row in rows if row != gone] for gone in sorted({0, len(rows) // 2, len(rows) - 1})]
        if len(rows) == 2:  # one column says nothing up to a number per image: so a row is there twice
            tried += [[0, 1, 1], [0, 0, 1]]
        return all(follows(kept) for kept in tried)
    except ModelError:  # something reads that row
        return False
