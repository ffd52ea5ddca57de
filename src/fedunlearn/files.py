"""Files that are there whole or not at all, and the folder of caches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

PART = ".part"  # ends the name of a file that is being written


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, then sync it to disk and put it in place of ``path``."""
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        with _named(path):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)  # noqa: PTH105 (the name says that it replaces)
    finally:
        part.unlink(missing_ok=True)


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file and sync it to disk; where that fails, nothing of it stays."""
    with _named(path), path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            left = line + b"\n"
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:  # another line must not go on from half of this one
            file.truncate(before)
            raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give an error of the disk the name of the file: a full one gives none, or that of the part that is written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and not str(error.filename).endswith(PART)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` as safetensors, whole or not at all."""
    state: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        # A module under two names has one tensor under both, and two may be parts of one: safetensors writes each.
        place = values.untyped_storage().data_ptr()
        state[name] = values.clone() if place in places else values
        places.add(place)
    write_bytes(path, save(state, dict(metadata)))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``, whole or not at all."""
    with written(path) as part:
        part.write_bytes(data)


def cache_folder() -> Path:
    """Return where caches are kept: ``$FEDUNLEARN_CACHE``, or ``fedunlearn`` in the user's cache folder."""
    named, base = os.environ.get("FEDUNLEARN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path(base or Path.home() / ".cache") / "fedunlearn"
    except RuntimeError:  # a user without a home, as in containers: caches read and write nothing there
        return Path(os.devnull) / "fedunlearn"
