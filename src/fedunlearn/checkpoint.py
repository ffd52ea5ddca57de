"""Models on disk: safetensors with the plan and the label map as metadata, and weights from elsewhere. No pickle."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fedunlearn.arguments import is_whole, must_be
from fedunlearn.channels.fit import check_finite
from fedunlearn.channels.plan import Classifier, PruningPlan
from fedunlearn.data.datasets import DatasetImages
from fedunlearn.data.images import LabelledImages
from fedunlearn.data.npz import load_npz
from fedunlearn.errors import DataError, ModelError, PlanError
from fedunlearn.files import write_tensors

_SCHEMA = 1
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_STATES = ("state_dict", "model_state_dict", "model")  # where trainings keep the state, before any other key
_COUNTER = "num_batches_tracked"
_KERNEL = 4  # axes of the weight of a convolution
_LONGEST = 200  # characters of another library's message


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
        classes: the name of the class of each output row.
    """

    path: Path
    state: Mapping[str, Tensor]
    plan: PruningPlan = field(default_factory=PruningPlan)
    labels: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shortcut: str | None = None
    classes: tuple[str, ...] | None = None

    def numbered(self, classes: Sequence[str]) -> Weights:
        """Return them with the labels that ``classes`` has for the names of their rows.

        Labels stay as they are where the file has no names, or as many as ``classes``, which are called otherwise.

        Raises:
            ModelError: some of the names are unknown.
        """
        if self.labels is None or self.classes is None or len(self.classes) != len(self.labels):
            return self
        unknown = [name for name in self.classes if name not in classes]
        if len(unknown) == len(classes) == len(self.classes):
            return self
        if unknown:
            raise ModelError(
                f"{self.path} has an output row for the class {unknown[0]!r}, which the data does not have (it has "
                f"{', '.join(classes[:5])}, ...): give the model of these classes, or the data of that model"
            )
        return replace(self, labels=tuple(classes.index(name) for name in self.classes))


def save_checkpoint(
    path: Path | str, model: Classifier, *, images: LabelledImages, architecture: Mapping[str, str]
) -> None:
    """Write ``model`` as safetensors with all that is needed to use it.

    Args:
        path: the file.
        model: the model as it is, pruned or not.
        images: of the kind the model takes: the names of their classes and how they are normalised are written.
        architecture: ``name`` and ``shortcut`` of the unpruned model, for people: loading never imports by it.

    Raises:
        ModelError: output rows, labels and the classes of the images do not fit together, weights are not finite, the
            name does not end in ``.safetensors``, or its folder is missing.
    """
    if Path(path).suffix != ".safetensors":
        raise ModelError(f"{path}: a checkpoint is written as safetensors: end its name in .safetensors")
    must_be(Classifier, model, "save_checkpoint(model)", "a Classifier, such as Classifier(module, shape)", ModelError)
    must_be(LabelledImages, images, "save_checkpoint(images=...)", "LabelledImages, as the readers give", DataError)
    labels = model.checked(len(images.classes)).labels or ()
    about = {
        "schema": _SCHEMA,
        "architecture": dict(architecture),
        "labels": list(labels),
        "classes": [images.classes[label] for label in labels],
        # What a data set gives is normalised by itself, nobody knows how.
        "mean": None if isinstance(images, DatasetImages) else list(images.mean),
        "std": None if isinstance(images, DatasetImages) else list(images.std),
        "plan": json.loads(model.plan.to_json()),
    }
    try:
        write_tensors(Path(path), model.module.state_dict(), {"fedunlearn": json.dumps(about, sort_keys=True)})
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ModelError(
            f"{path}: cannot be written ({error.strerror}): give a place in a folder that is there"
        ) from error


def read_weights(path: Path | str) -> Weights:
    """Read weights from ``.safetensors`` (ours or any), ``.npz``, or ``.pt``/``.pth``/``.th`` (``weights_only=True``).

    An ``.npz`` may have an entry ``meta``, JSON with ``normalise`` (``mean``, ``std``) and ``shortcut``. A PyTorch
    file may hold the state itself, or under one of its keys, ``state_dict`` or ``model`` say; TorchScript and whole
    models are refused.

    Raises:
        ModelError: the file is missing, damaged, of another kind, or holds something other than tensors of numbers;
            or its label map does not name a class for each row.
    """
    path = Path(path)
    readers = {".safetensors": _safetensors, ".npz": _npz, ".pt": _torch, ".pth": _torch, ".th": _torch}
    reader = readers.get(path.suffix)
    if path.is_dir():
        there = next(iter(sorted(path.glob("*.safetensors"))), "a file in it")
        raise ModelError(f"{path} is a folder: give the file of the weights, such as {there}")
    if reader is None:
        raise ModelError(f"{path}: weights must be a file ending in {', '.join(readers)}, got {path.suffix!r}")
    if not path.is_file():
        raise ModelError(f"{path}: expected a file of weights, found none; check the path")
    try:
        path.open("rb").close()  # safetensors takes a file that it may not read for none
        weights = reader(path)
        _check_tensors(weights)
        return weights
    except DataError as error:
        raise ModelError(str(error)) from error
    except ModelError:
        raise
    except PermissionError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except pickle.UnpicklingError as error:  # its text has many lines, and says how to run what the file holds
        raise ModelError(
            f"{path}: the weights cannot be read: the file is damaged, or holds objects besides tensors, which are "
            "never run; save model.state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        why = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        raise ModelError(f"{path}: the weights cannot be read ({why}); fetch the file again") from error


def load_weights(model: Classifier, weights: Weights, *, images: LabelledImages | None = None) -> Classifier:
    """Return the architecture of ``model`` pruned by the plan of ``weights``, filled with them strictly, and labelled.

    Args:
        model: the architecture.
        weights: what ``read_weights`` returned.
        images: whose classes the rows are to be numbered by; as the file numbers them where None.

    Raises:
        ModelError: names, shapes or types differ, or values are not finite, the first tensor that does is named; or
            the label map does not name a class for each row.
    """
    must_be(Classifier, model, "load_weights(model)", "a Classifier, such as Classifier(module, shape)", ModelError)
    must_be(Weights, weights, "load_weights(weights)", "what read_weights(path) returns", ModelError)
    weights = named_for(weights, model)
    weights = weights if images is None else weights.numbered(images.classes)
    try:
        loaded = replace(model.cut(weights.plan), labels=weights.labels)
    except PlanError as error:
        raise ModelError(f"{weights.path}: {error}") from error
    model_state = loaded.module.state_dict()
    # Counters of batches are missing from some exports and have no influence on the logits.
    state = {name: t for name, t in model_state.items() if name.endswith(_COUNTER)} | dict(weights.state)
    for name in sorted(model_state.keys() | state.keys()):
        expected = tuple(model_state[name].shape) if name in model_state else "no such tensor"
        found = tuple(state[name].shape) if name in state else "no such tensor"
        if expected != found:
            raise ModelError(
                f"{weights.path}: {name}: the model has {expected}, the file {found}: "
                f"{_computed(name, state) or _colours(expected, found)}"
                f"{_hint(state, model_state)}"
            )
        # Integers or truth values in the place of weights are codes or masks: what they stand for is elsewhere.
        if model_state[name].is_floating_point() != state[name].is_floating_point() and not name.endswith(_COUNTER):
            raise ModelError(
                f"{weights.path}: {name}: the model has {_type(model_state[name])}, the file {_type(state[name])}: "
                "quantised weights or masks cannot stand for weights; save the model in float32"
            )
    loaded.module.load_state_dict(state, strict=True)
    check_finite(loaded.module.state_dict(), str(weights.path))
    if loaded.labels is not None and len(loaded.labels) != loaded.rows:
        raise ModelError(
            f"{weights.path}: the label map names {len(loaded.labels)} classes, the model has {loaded.rows} output "
            "rows: the file was changed; save it again with save_checkpoint"
        )
    return loaded


def named_for(weights: Weights, model: Classifier) -> Weights:
    """Return ``weights`` under the names of ``model``: the prefixes of wrappers go where the model does not have them.

    ``module.`` comes from DataParallel and averaged models, ``_orig_mod.`` from compiled ones, ``model.`` from training
    frameworks; the counter of an averaged model goes too.

    Raises:
        ModelError: two tensors would have one name.
    """
    known = model.module.state_dict().keys()
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in weights.state.items():
        if name == _AVERAGED and name not in known:
            continue
        short = name
        while short not in known and short.startswith(_WRAPPERS):
            short = short.split(".", 1)[1]
        if short in origin:
            raise ModelError(
                f"{weights.path} holds both {origin[short]!r} and {name!r}: two models in one file; save one of them"
            )
        state[short], origin[short] = tensor, name
    return replace(weights, state=state)


def _colours(expected: object, found: object) -> str:
    """Return what to look at where shapes differ: the images where that is in their colours alone."""
    shapes = [shape for shape in (expected, found) if isinstance(shape, tuple) and len(shape) == _KERNEL]
    if len(shapes) == 2 and {shapes[0][1], shapes[1][1]} == {1, 3} and shapes[0][::2] == shapes[1][::2]:
        return (
            f"the images have {shapes[0][1]} colours and the weights are for {shapes[1][1]} (a folder of pictures has "
            "3, an npz those of its arrays)"
        )
    return "check model.name, model.shortcut and the number of classes"


def _computed(name: str, state: Mapping[str, Tensor]) -> str:
    """Return what to do where the file has what a tensor is computed from in its place, such as weight and mask."""
    parts = sorted(other for other in state if other.startswith(f"{name}_")) if name not in state else []
    if not parts:
        return ""
    return (
        f"it has {', '.join(parts)} instead, from which it is computed in each pass; make it one tensor before saving, "
        "for example by torch.nn.utils.prune.remove(layer, 'weight')"
    )


def _hint(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return how to strip a prefix that all tensors of a file share, where that gives names of the model."""
    prefixes = {name.split(".", 1)[0] + "." for name in state if not name.endswith(_COUNTER)}
    if len(prefixes) != 1:
        return ""
    prefix = prefixes.pop()
    if not any(name.removeprefix(prefix) in expected for name in state if name.startswith(prefix)):
        return ""
    return (
        f"; all names in the file begin with {prefix!r}: save "
        f"{{name.removeprefix({prefix!r}): tensor for name, tensor in state.items()}}"
    )


def _check_tensors(weights: Weights) -> None:
    """Refuse tensors that hold no plain numbers, and label maps that name no classes."""
    for name, tensor in weights.state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            kind = "meta" if tensor.is_meta else "sparse" if tensor.layout != torch.strided else _type(tensor)
            raise ModelError(
                f"{weights.path}: {name} is a {kind} tensor, expected a dense one of floats: save the model in float32"
            )
    check_finite(weights.state, str(weights.path))
    labels = weights.labels
    if labels is None:
        return
    if not labels or not all(is_whole(label, 0) for label in labels) or len(set(labels)) < len(labels):
        raise ModelError(
            f"{weights.path}: the label map must name a different class for each output row, got {list(labels)}: "
            "the file was changed; save it again with save_checkpoint"
        )


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _safetensors(path: Path) -> Weights:
    with safetensors.safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("fedunlearn")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    if about is None:
        return Weights(path, state)
    value: dict[str, Any] = json.loads(about)
    if value["schema"] != _SCHEMA:
        raise ModelError(
            f"{path}: expected a checkpoint of schema {_SCHEMA}, got {value['schema']!r}: it was written by another "
            "version of fedunlearn; load it with that one"
        )
    return Weights(
        path,
        state,
        PruningPlan.from_json(json.dumps(value["plan"])),
        tuple(value["labels"]),
        None if value["mean"] is None else tuple(value["mean"]),
        None if value["std"] is None else tuple(value["std"]),
        value["architecture"].get("shortcut"),
        tuple(value["classes"]) if "classes" in value else None,
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
    if _is_scripted(path):
        raise ModelError(
            f"{path}: the file is a TorchScript archive, whose code is never run: save model.state_dict() of the model "
            "that was scripted"
        )
    value = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(value, dict) and not _is_state(value):
        named = [name for name in _STATES if isinstance(value.get(name), dict)]
        states = named[:1] or [name for name, state in value.items() if _is_state(state)]
        if len(states) > 1:
            raise ModelError(
                f"{path}: holds the states of several models ({', '.join(map(str, states))}): save the one that is "
                "meant, alone"
            )
        value = value[states[0]] if states else value
    if isinstance(value, dict) and not _is_state(value):
        name, found = next((item for item in value.items() if not isinstance(item[1], Tensor)), ("nothing", None))
        raise ModelError(
            f"{path}: expected tensors by name, or a dictionary with them under one of its keys, but "
            f"{str(name)[:80]!r} is of type {type(found).__name__}: save model.state_dict()"
        )
    if not isinstance(value, dict):
        raise ModelError(
            f"{path}: expected tensors by name, or a dictionary with them under one of its keys, got a value of type "
            f"{type(value).__name__}: save model.state_dict()"
        )
    if not all(isinstance(name, str) for name in value):
        raise ModelError(f"{path}: expected tensors by name, got other keys; save model.state_dict()")
    return Weights(path, value)


def _is_state(value: object) -> bool:
    """Return whether ``value`` may be the state of a model: tensors by name, not numbers alone."""
    tensors = isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values())
    return isinstance(value, dict) and tensors and any(tensor.ndim for tensor in value.values())


def _is_scripted(path: Path) -> bool:
    """Return whether the archive holds code, as ``torch.jit.save`` writes it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
