"""The right to write into the folder of a run: one process at a time, and of its journals there the newest."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path
from typing import TextIO

from fedunlearn.errors import RunError

LOCK = "lock"


class FolderLock:
    """The right to write into a folder, until ``leave`` or until nobody holds it any more.

    The system drops the lock of a process that ends in whatever way, so what a kill leaves behind keeps nobody out. A
    process does not keep itself out: a notebook may open a journal again whose old one is still about.

    Args:
        folder: the folder, which is there.

    Raises:
        RunError: another process writes there.
        OSError: the folder cannot be written.
    """

    _file: TextIO
    _process: int

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / LOCK
        before = _HELD.get(self._path)
        mine = before is not None and before._process == os.getpid()  # a fork knows the locks of its parent
        self._file = before._file if before is not None and mine else _locked(self._path, folder)
        self._process = os.getpid()
        self._drop = weakref.finalize(self, _dropped, self._path, self._file, self._process)

    @property
    def newest(self) -> bool:
        """Whether nobody else of this process took the folder since."""
        return _HELD.get(self._path) is self

    def take(self) -> None:
        """Be the one of this process that writes."""
        _HELD[self._path] = self

    def leave(self) -> None:
        """Let others write."""
        if self.newest:
            del _HELD[self._path]
        self._drop()


_HELD: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()  # of this process


def _locked(path: Path, folder: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            file.seek(0)
            number = file.read().strip()
            file.close()
            raise RunError(
                f"{folder} is being written by process {number or 'another'}: wait until it has ended, or choose "
                "another --out"
            ) from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()  # who held it has removed it since it was opened here


def _dropped(path: Path, file: TextIO, process: int) -> None:
    if process == os.getpid() and path not in _HELD and not file.closed:
        path.unlink(missing_ok=True)  # while it is locked: nobody else can hold a file of this name
        file.close()
