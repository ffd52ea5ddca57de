"""Copying a model, whatever it keeps of its last pass."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn

from fedunlearn.errors import ModelError

_Model = TypeVar("_Model", bound=nn.Module)
_ATOMS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float)


def copied(model: _Model) -> _Model:
    """Return a copy of ``model`` that shares no tensor with it.

    A model may keep an activation on itself, for a heat map. Where a pass with gradients made it, torch refuses to
    copy it: the copy then has its values, without the graph that made them.

    Raises:
        ModelError: the model keeps something that has no copies, such as an open file.
    """
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in _made_by_a_pass(model, set())}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever hangs on the model can fail in any way
        why = " ".join(str(error).split())
        raise ModelError(
            f"the model cannot be copied ({type(error).__name__}: {why}): take off it what has no copies, such as "
            "locks, open files and loggers"
        ) from error


def _made_by_a_pass(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors with a graph that a copy of ``thing`` would reach."""
    if id(thing) in seen or isinstance(thing, _ATOMS):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if not thing.is_leaf:
            yield thing
        return
    for part in _parts(thing):
        yield from _made_by_a_pass(part, seen)


def _parts(thing: object) -> Iterable[object]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if isinstance(thing, types.MethodType):  # a hook that an object of the user's registered
        return [thing.__self__]
    return list(getattr(thing, "__dict__", {}).values())
