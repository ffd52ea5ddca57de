"""Readers: each returns the training and the test images of one source.

CIFAR: A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
MNIST: Y. LeCun, C. Cortes, C. Burges; idx format. Digits: the set scikit-learn ships.

The official CIFAR pickles are opened without running what a pickle names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedunlearn.data.folders import read_pictures, tell_beside
from fedunlearn.data.images import pixel_statistics
from fedunlearn.data.npz import grouped, load_npz, read_npz
from fedunlearn.data.splits import TEST_SHARE, Splits, apart, both, held_out, labelled
from fedunlearn.errors import DataError
from fedunlearn.seeding import generator

# What numpy arrays and Python 2 strings need, under their old and new names; nothing else is looked up.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR10_NAMES_MD5 = "c4a53feb1b64ee5c7b132f9a245e037b"  # of the names of the classes, a line each
CIFAR100_NAMES_MD5 = "18d2388358c0483ca2d2be3aac2d399e"
CIFAR100_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_CIFAR10_PIXELS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_PIXELS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_MNIST_PIXELS = ((0.1307,), (0.3081,))


def read_digits() -> Splits:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth of each class for testing.

    The second fifth in an order drawn with seed 0: a setting of the recipe was once chosen after a look at the first.
    """
    # The file that sklearn.datasets.load_digits reads: to import that takes more CPU time than a round of training.
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None  # it is one of the dependencies
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = torch.from_numpy(np.round(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        of_digit = (labels == digit).nonzero().flatten()
        order = torch.randperm(len(of_digit), generator=generator(0, "test", str(digit)))
        count = round(TEST_SHARE * len(of_digit))
        test[of_digit[order[count : 2 * count]]] = True
    return apart(images, labels, tuple(str(digit) for digit in range(10)), test)


def read_cifar10(path: Path | str, *, official: bool = True) -> Splits:
    """Read ``cifar-10-batches-py`` (the folder itself or the one that holds it)."""
    folder = _folder(path, "cifar-10-batches-py", "data_batch_1")
    files = {name: _read(folder / name, md5 if official else None) for name, md5 in CIFAR10_MD5.items()}
    parts = {name: _cifar(load_arrays(data, folder / name), b"labels", folder / name) for name, data in files.items()}
    names = _names(folder / "batches.meta", b"label_names", CIFAR10_NAMES_MD5 if official else None)
    test = parts.pop("test_batch")
    images = torch.cat([part[0] for part in parts.values()])
    labels = torch.cat([part[1] for part in parts.values()])
    return Splits(
        labelled(folder, images, labels, names, _CIFAR10_PIXELS),
        labelled(folder / "test_batch", *test, names, _CIFAR10_PIXELS),
    )


def read_cifar100(path: Path | str, *, official: bool = True) -> Splits:
    """Read ``cifar-100-python`` with its fine labels (the folder itself or the one that holds it)."""
    folder = _folder(path, "cifar-100-python", "train")
    parts = []
    names = _names(folder / "meta", b"fine_label_names", CIFAR100_NAMES_MD5 if official else None)
    for name, md5 in CIFAR100_MD5.items():
        data = _read(folder / name, md5 if official else None)
        images, labels = _cifar(load_arrays(data, folder / name), b"fine_labels", folder / name)
        parts.append(labelled(folder / name, images, labels, names, _CIFAR100_PIXELS))
    return Splits(*parts)


def read_mnist(path: Path | str, *, official: bool = True) -> Splits:
    """Read the four MNIST idx files; ``writers.npz`` beside them (``train``, ``test``) gives the groups."""
    folder = _folder(path, "mnist", "train-images-idx3-ubyte")
    writers = load_npz(folder / "writers.npz") if (folder / "writers.npz").exists() else {}
    parts = []
    for prefix, split in (("train", "train"), ("t10k", "test")):
        images = _idx(folder / f"{prefix}-images-idx3-ubyte", 2051, official)[:, None]
        labels = _idx(folder / f"{prefix}-labels-idx1-ubyte", 2049, official).long()
        pixels = labelled(folder / f"{prefix}-labels-idx1-ubyte", images, labels, tuple("0123456789"), _MNIST_PIXELS)
        parts.append(grouped(pixels, writers, split, folder / "writers.npz"))
    return both(folder, *parts)


def read_folder(path: Path | str, *, size: int = 0) -> Splits:
    """Read ``train/CLASS/*`` and ``test/CLASS/*``, or ``CLASS/*`` with a fifth of each class for testing.

    Pictures become three colours of 8 bits: 16 bits are divided by 257, floats in [0, 1] multiplied by 255,
    transparency is laid on black, and the orientation of the EXIF data is applied. Which folder is which class, and
    what is left out: see ``data.folders.read_pictures``.

    Args:
        path: the folder of images.
        size: height and width to resize to; 0 keeps images as they are, which must then agree.

    Raises:
        DataError: no such folder, classes or images that do not fit together, or a picture that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is nothing at this path; check data.path (--data)")
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder with one folder of images per class; check data.path (--data)")
    if (path / "train").is_dir() and (path / "test").is_dir():
        tell_beside(path, ("train", "test"))
        train, test = read_pictures(path / "train", size), read_pictures(path / "test", size)
        if test.classes != train.classes:
            raise DataError(
                f"{path}: train holds the classes {train.classes}, test holds {test.classes}; they must agree"
            )
        pixels = pixel_statistics(train.images)
        return both(path, *(labelled(path, *part, pixels) for part in (train, test)))
    pictures = read_pictures(path, size)
    counts = torch.bincount(pictures.labels).tolist()
    if 1 in counts:
        raise DataError(
            f"{path}: expected two images or more of each class, one to test with, got one of "
            f"{pictures.classes[counts.index(1)]}: add some, take the folder away, or make train/ and test/ yourself"
        )
    return held_out(*pictures)


# By what a recipe calls them: of its path, whether the files are the official ones, and the size of pictures.
READERS: dict[str, Callable[[Path, bool, int], Splits]] = {
    "digits": lambda path, official, size: read_digits(),
    "cifar10": lambda path, official, size: read_cifar10(path, official=official),
    "cifar100": lambda path, official, size: read_cifar100(path, official=official),
    "mnist": lambda path, official, size: read_mnist(path, official=official),
    "folder": lambda path, official, size: read_folder(path, size=size),
    "npz": lambda path, official, size: read_npz(path),
}


def load_arrays(data: bytes, path: Path) -> dict[bytes, Any]:
    """Return the dictionary pickled in ``data``; keys are byte strings.

    Args:
        data: a pickle of numbers, strings, lists and numpy arrays.
        path: where it came from, for the message.

    Raises:
        DataError: the pickle is truncated, names anything but numpy arrays, or is no dictionary.
    """
    try:
        value = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(
            f"{path}: expected a pickle of numpy arrays and nothing else, but {error}: fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a pickled dictionary, got {type(value).__name__}: fetch the file again")
    return value


def _folder(path: Path | str, name: str, member: str) -> Path:
    for folder in (Path(path), Path(path) / name):
        if (folder / member).is_file():
            return folder
    raise DataError(f"{path}: expected the folder {name} with the file {member}; check --data")


def _read(path: Path, md5: str | None) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --data") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise DataError(
            f"{path}: expected the official file with MD5 {md5}, got {found}: it is truncated or altered; "
            "fetch it again, or set data.official=false if it is meant to differ"
        )
    return data


def _cifar(batch: Mapping[bytes, Any], key: bytes, path: Path) -> tuple[Tensor, Tensor]:
    data, labels = batch.get(b"data"), batch.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{path}: expected data of uint8 rows of 3,072 values; fetch the file again")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(isinstance(n, int) for n in labels):
        raise DataError(f"{path}: expected {len(data)} {key.decode()}, one per image; fetch the file again")
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64)


def _names(path: Path, key: bytes, md5: str | None) -> tuple[str, ...]:
    """Return the names of the classes; of the names and not of the file, which is written in several ways."""
    names = load_arrays(_read(path, None), path).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{path}: expected the list {key.decode()}; fetch the file again")
    if md5 not in (None, hashlib.md5(b"\n".join(names), usedforsecurity=False).hexdigest()):
        raise DataError(
            f"{path}: the classes have other names, or another order, than the official ones, so that another class "
            "would be forgotten: fetch the file again, or set data.official=false if it is meant to differ"
        )
    return tuple(name.decode(errors="replace") for name in names)


def _idx(path: Path, magic: int, official: bool) -> Tensor:
    data = _read(path, MNIST_MD5[path.name] if official else None)
    axes = magic % 256
    header = 4 + 4 * axes
    found, *shape = struct.unpack(f">{1 + axes}I", data[:header].ljust(header, b"\0"))
    expected = header + math.prod(shape)
    if expected == header:
        raise DataError(f"{path}: expected one image or more, got the shape {tuple(shape)}; fetch the file again")
    if found != magic or len(data) != expected:
        raise DataError(
            f"{path}: expected an idx file with magic number {magic} and {expected} bytes, "
            f"got {found} and {len(data)}: it is truncated or altered; fetch it again"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
