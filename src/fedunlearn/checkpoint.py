"""Models on disk: safetensors with the plan and the label map as metadata, and weights from elsewhere. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fedunlearn.channels.plan import Classifier, PruningPlan
from fedunlearn.data.images import LabelledImages
from fedunlearn.data.readers import load_npz
from fedunlearn.errors import DataError, ModelError, PlanError
from fedunlearn.files import write_tensors

_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a model and what the file says about them; None where it says nothing.

    Attributes:
        path: where they came from.
        state: tensors by name.
        plan: what was removed from the architecture before they fit.
        labels: the class of each output row.
        mean: per colour, how images were normalised.
        std: likewise.
        shortcut: ``"A"`` or ``"B"``.
    """

    path: Path
    state: Mapping[str, Tensor]
    plan: PruningPlan = field(default_factory=PruningPlan)
    labels: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shortcut: str | None = None


def save_checkpoint(
    path: Path | str, model: Classifier, *, images: LabelledImages, architecture: Mapping[str, str]
) -> None:
    """Write ``model`` as safetensors with all that is needed to use it.

    Args:
        path: the file.
        model: the model as it is, pruned or not.
        images: of the kind the model takes: the names of their classes and how they are normalised are written.
        architecture: ``name`` and ``shortcut`` of the unpruned model, for people: loading never imports by it.
    """
    labels = model.labels or tuple(range(len(images.classes)))
    about = {
        "schema": _SCHEMA,
        "architecture": dict(architecture),
        "labels": list(labels),
        "classes": [images.classes[label] for label in labels],
        "mean": list(images.mean),
        "std": list(images.std),
        "plan": json.loads(model.plan.to_json()),
    }
    write_tensors(Path(path), model.module.state_dict(), {"fedunlearn": json.dumps(about, sort_keys=True)})


def read_weights(path: Path | str) -> Weights:
    """Read weights from ``.safetensors`` (ours or any), ``.npz``, or ``.pt``/``.pth``/``.th`` (``weights_only=True``).

    An ``.npz`` may have an entry ``meta``, JSON with ``normalise`` (``mean``, ``std``) and ``shortcut``. A PyTorch
    file may hold the state itself or under ``state_dict``; a leading ``module.`` of DataParallel is dropped.

    Raises:
        ModelError: the file is missing, damaged, of another kind, or holds something other than tensors.
    """
    path = Path(path)
    readers = {".safetensors": _safetensors, ".npz": _npz, ".pt": _torch, ".pth": _torch, ".th": _torch}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ModelError(f"{path}: weights must be a file ending in {', '.join(readers)}, got {path.suffix!r}")
    if not path.is_file():
        raise ModelError(f"{path}: expected a file of weights, found none; check the path")
    try:
        return reader(path)
    except DataError as error:
        raise ModelError(str(error)) from error
    except ModelError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ModelError(f"{path}: the weights cannot be read ({error}); fetch the file again") from error


def load_weights(model: Classifier, weights: Weights) -> Classifier:
    """Return the architecture of ``model`` pruned by the plan of ``weights``, filled with them strictly, and labelled.

    Raises:
        ModelError: names or shapes differ; the first that does is named.
    """
    try:
        loaded = replace(model.cut(weights.plan), labels=weights.labels)
    except PlanError as error:
        raise ModelError(f"{weights.path}: {error}") from error
    own = loaded.module.state_dict()
    # Counters of batches are missing from some exports and have no influence on the logits.
    state = {name: t for name, t in own.items() if name.endswith("num_batches_tracked")} | dict(weights.state)
    for name in sorted(own.keys() | state.keys()):
        expected = tuple(own[name].shape) if name in own else "no such tensor"
        found = tuple(state[name].shape) if name in state else "no such tensor"
        if expected != found:
            raise ModelError(
                f"{weights.path}: {name}: the model has {expected}, the file {found}: "
                "check model.name, model.shortcut and the number of classes"
            )
    loaded.module.load_state_dict(state, strict=True)
    return loaded


def _safetensors(path: Path) -> Weights:
    with safetensors.safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("fedunlearn")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    if about is None:
        return Weights(path, state)
    value: dict[str, Any] = json.loads(about)
    return Weights(
        path,
        state,
        PruningPlan.from_json(json.dumps(value["plan"])),
        tuple(value["labels"]),
        tuple(value["mean"]),
        tuple(value["std"]),
        value["architecture"].get("shortcut"),
    )


def _npz(path: Path) -> Weights:
    arrays = dict(load_npz(path))
    about = json.loads(arrays.pop("meta").tobytes()) if "meta" in arrays else {}
    normalise = about.get("normalise", {})
    return Weights(
        path,
        {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
        mean=tuple(normalise["mean"]) if normalise else None,
        std=tuple(normalise["std"]) if normalise else None,
        shortcut=about.get("shortcut"),
    )


def _torch(path: Path) -> Weights:
    value = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ModelError(f"{path}: expected tensors by name, or a dictionary with state_dict; save model.state_dict()")
    return Weights(path, {name.removeprefix("module."): tensor for name, tensor in value.items()})
