"""Open the official CIFAR pickles without running what a pickle names."""

import io
import pickle
from pathlib import Path
from typing import Any

from fedunlearn.errors import DataError

# What numpy arrays and Python 2 strings need, under their old and new names; nothing else is looked up.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


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
