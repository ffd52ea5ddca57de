"""Arrays of an ``.npz``: as images and labels, and as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedunlearn.data.images import COLOURS, LabelledImages, pixel_statistics
from fedunlearn.data.splits import Splits, both, labelled
from fedunlearn.errors import DataError


def read_npz(path: Path | str) -> Splits:
    """Read ``x_train, y_train, x_test, y_test`` and, if there, ``classes``, ``groups_train``, ``groups_test``.

    Images are uint8 of shape ``(images, height, width)``, ``(images, height, width, colours)`` or ``(images, colours,
    height, width)``: the colours are the axis of 1, 3 or 4, or the odd one out beside two equal ones. Labels are whole
    numbers from 0, shape ``(images,)``. Without names, each number up to the last one has training images.

    Raises:
        DataError: an entry is missing, of another type, shape or range, or does not say where the colours are.
    """
    path = Path(path)
    arrays = load_npz(path)
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise DataError(f"{path}: expected the entries x_train, y_train, x_test and y_test, {missing[0]} is missing")
    for split in ("train", "test"):
        _check_arrays(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
    classes = _class_names(path, arrays)
    images = {split: _colours_first(path, f"x_{split}", arrays[f"x_{split}"]) for split in ("train", "test")}
    pixels = pixel_statistics(images["train"])
    parts = []
    for split in ("train", "test"):
        labels = torch.from_numpy(arrays[f"y_{split}"].astype(np.int64))
        part = labelled(path, images[split], labels, classes, pixels)
        parts.append(grouped(part, arrays, f"groups_{split}", path))
    return both(path, *parts)


def load_npz(path: Path | str) -> Mapping[str, np.ndarray]:
    """Return the arrays of an ``.npz``; pickled objects are refused.

    Raises:
        DataError: the file is missing, damaged or holds pickled objects.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a damaged archive can fail in any way
        raise DataError(
            f"{path}: expected an .npz of plain arrays, but {error or type(error).__name__}; check the path"
        ) from error


def _check_arrays(path: Path, split: str, x: np.ndarray, y: np.ndarray) -> None:
    """Refuse images and labels of an ``.npz`` that are of another type or shape."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise DataError(
            f"{path}: x_{split} must be uint8 with 3 or 4 axes, got {x.dtype} of shape {x.shape}: "
            "scale pixels to 0 .. 255 and round them to uint8"
        )
    if 0 in x.shape:
        raise DataError(f"{path}: x_{split} must hold one image or more, got the shape {x.shape}")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        hint = ""
        if y.shape == (len(x), 1):
            hint = f": use y_{split}.ravel()"
        elif y.ndim == 2 and len(y) == len(x):
            hint = f": of one-hot labels, use y_{split}.argmax(1)"
        elif y.shape == (len(x),):
            hint = ": number the classes from 0 and store their names as classes"
        raise DataError(
            f"{path}: y_{split} must be {len(x)} whole numbers, one per image, got {y.dtype} of shape {y.shape}{hint}"
        )


def _class_names(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the names of an ``.npz``, or the numbers of its labels, which must then leave none out."""
    if "classes" in arrays:
        names = arrays["classes"]
        if names.ndim != 1 or names.dtype.kind not in "Uiu":
            raise DataError(
                f"{path}: classes must be a list of names, one per class, got {names.dtype} of shape {names.shape}"
            )
        return tuple(str(name) for name in names)
    count = len(np.unique(arrays["y_train"]))
    for split in ("train", "test"):
        labels = arrays[f"y_{split}"]
        odd = labels[(labels < 0) | (labels >= count)]
        if len(odd):
            raise DataError(
                f"{path}: expected labels 0 .. {count - 1}, for {count} different ones in y_train, y_{split} holds "
                f"{odd[0]}: number the classes from 0 without a gap, or store a name of every class as classes"
            )
    return tuple(str(label) for label in range(count))


def _colours_first(path: Path, entry: str, x: np.ndarray) -> Tensor:
    """Return images of an ``.npz`` as ``(images, colours, height, width)``."""
    if x.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(x[:, None]))
    _, first, second, third = x.shape
    last, front = third in COLOURS, first in COLOURS
    if last == front:
        last, front = first == second, second == third
    if last == front:
        raise DataError(
            f"{path}: {entry} of shape {x.shape} does not say which axis the colours are: expected "
            "(images, height, width, colours) with 1, 3 or 4 colours, or images as high as wide"
        )
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2) if last else x))


def grouped(images: LabelledImages, arrays: Mapping[str, np.ndarray], entry: str, path: Path) -> LabelledImages:
    """Return ``images`` with the groups of an entry of an ``.npz``, if it is there."""
    if entry not in arrays:
        return images
    groups = arrays[entry]
    if groups.dtype.kind not in "iu" or groups.shape != (len(images),):
        raise DataError(
            f"{path}: {entry} must be {len(images)} whole numbers, one per image, "
            f"got {groups.dtype} of shape {groups.shape}"
        )
    return replace(images, groups=torch.from_numpy(groups.astype(np.int64)))
