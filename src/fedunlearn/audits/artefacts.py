"""Audit: is anything of the class left in the file that is shipped?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
from torch import Tensor

from fedunlearn.arguments import is_whole
from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View
from fedunlearn.audits.images import AuditImages
from fedunlearn.channels.plan import PruningPlan
from fedunlearn.errors import ModelError, PlanError

_METADATA = {"schema", "architecture", "labels", "classes", "mean", "std", "plan"}


def artefacts(path: Path, *, state: Mapping[str, Tensor], forget: Sequence[int]) -> list[str]:
    """Return what a shipped ``.safetensors`` file holds and should not, a line each; empty where it is clean.

    Looked for: tensors that the pruned architecture does not have, such as the state of an optimiser; tensors that
    pruning made smaller and that are as large as before; the output row or label of a forgotten class, or a name
    without a row; metadata beyond what is needed to use the model; the row of
    the class in a matrix with a row per class, such as a second head; a kernel of a removed filter of the original.

    Args:
        path: the file.
        state: tensors of the original by name.
        forget: the forgotten classes.

    Raises:
        ModelError: the file was not written by ``save_checkpoint``, or cannot be read.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["fedunlearn"])
            extra = sorted(file.metadata().keys() - {"fedunlearn"})
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        kept = PruningPlan.from_json(json.dumps(about["plan"])).kept
        names, labels = about["classes"], about["labels"]
        if (
            not isinstance(names, list)
            or not isinstance(labels, list)
            or not all(is_whole(label, 0) for label in labels)
        ):
            raise TypeError(f"its rows are {labels!r}, named {names!r}")
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, PlanError) as error:
        raise ModelError(f"{path}: expected a model written by fedunlearn, but {error}") from error
    lines = [f"tensor {name} is not of the architecture" for name in sorted(found.keys() - state.keys())]
    lines += [f"metadata {key} is not needed to use the model" for key in [*extra, *sorted(about.keys() - _METADATA)]]
    if len(names) != len(labels):
        lines.append(f"{len(names)} names of classes for {len(labels)} output rows")
    lines += [f"the labels name the forgotten class {label}" for label in forget if label in labels]
    lines += [f"the plan cuts {name}, which is not of the architecture" for name in sorted(kept.keys() - state.keys())]
    for name in sorted(found.keys() & state.keys()):
        wanted = list(state[name].shape)
        for axis, positions in kept.get(name, {}).items():
            wanted[axis : axis + 1] = [len(positions)]
        if list(found[name].shape) != wanted:
            lines.append(f"tensor {name} has shape {list(found[name].shape)}, the plan leaves {wanted}")
    lines += _rows_left(found, state, forget, len(labels) + len(set(forget) - set(labels)))
    data = path.read_bytes()
    for name in sorted(kept.keys() & state.keys()):
        rows = range(len(state[name]) if state[name].ndim == 4 else 0)
        gone = sorted(set(rows) - set(kept[name].get(0, rows)))
        if gone:
            lines += [f"filter {row} of {name} is still in the file" for row in gone if _inside(state[name][row], data)]
    return lines


def _rows_left(
    found: Mapping[str, Tensor], state: Mapping[str, Tensor], forget: Sequence[int], classes: int
) -> list[str]:
    """Return the matrices with a row per class of the original in which the row of a forgotten class is as it was.

    A second head that evaluation does not run is neither cut nor trained.
    """
    return [
        f"tensor {name} holds the original's row {label}, of the forgotten class"
        for name in sorted(found.keys() & state.keys())
        if found[name].ndim == 2 and found[name].shape == state[name].shape and len(found[name]) == classes
        for label in forget
        if bool(found[name][label].count_nonzero()) and found[name][label].equal(state[name][label].cpu())
    ]


def _inside(filter: Tensor, data: bytes) -> bool:
    """Return whether the first kernel of ``filter`` is in ``data``; a single weight, or zeros, would prove nothing."""
    kernel = filter.detach().cpu().contiguous().flatten(1)[0]
    return len(kernel) > 1 and bool(kernel.count_nonzero()) and kernel.numpy().tobytes() in data


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    if subject.shipped is None:
        return Found()
    lines = artefacts(subject.shipped.path, state=subject.shipped.state, forget=images.forget)
    return Found({"artefacts": Figure(float(len(lines)))}, {"artefacts": lines})


AUDIT = Audit(
    "artefacts",
    {
        "artefacts": FigureKind(
            "artefacts",
            "Are rows, filters or labels of the class, or foreign data, left in the shipped file (findings)?",
            "class",
            largest=math.inf,
            fixed=0.0,
        )
    },
    _measure,
    resumed=False,  # the file may be another one by then
)
