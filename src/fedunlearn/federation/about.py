"""What a step is about, in words short enough for the journal: another request must not pass for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from fedunlearn.channels.fit import without_addresses
from fedunlearn.channels.plan import Classifier

_SHOWN = 48  # a longer text is told by its digest


def asked(**values: Any) -> dict[str, str]:
    """Return each value as text of at most 48 characters: the value itself as JSON, or its SHA-256 in short.

    Equal values give equal texts, in every process: models by architecture, weights, plan and rows, dataclasses by
    their fields, functions by name, code and what they enclose.
    """
    return {name: _short(json.dumps(_plain(value), sort_keys=True)) for name, value in values.items()}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        values = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON values that say all that matters of it."""
    if isinstance(value, Classifier):
        return [
            without_addresses(value.module),
            weights_digest(value.module.state_dict()),
            value.plan.to_json(),
            value.labels,
        ]
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        enclosed = [_plain(content) for content in cells if content is not value]
        defaults = _plain([value.__defaults__, value.__kwdefaults__])
        return [value.__module__, value.__qualname__, _code(value.__code__), enclosed, defaults]
    if is_dataclass(value):
        return [type(value).__name__, {field.name: _plain(getattr(value, field.name)) for field in fields(value)}]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(repr(item) for item in value)  # their order changes with the process
    if isinstance(value, Tensor):
        return weights_digest({"": value})
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return without_addresses(value)


def _code(code: CodeType) -> list[Any]:
    constants = [_code(constant) if isinstance(constant, CodeType) else _plain(constant) for constant in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
