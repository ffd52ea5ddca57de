"""Cores and threads: one worker thread per core, one torch thread each."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class _Users:
    """Who keeps torch to one thread now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    number: int = 0
    threads: int = 1  # as many as torch had before the first


_users = _Users()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread per calling thread while the context lasts.

    OpenMP threads that find their core taken wait by spinning: beside other work, small batches on two such threads
    were measured 30 times slower than on one. Contexts may overlap in any order; the last to end restores the number.
    """
    with _users.lock:
        if _users.number == 0:
            _users.threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _users.number += 1
    try:
        yield
    finally:
        with _users.lock:
            _users.number -= 1
            if _users.number == 0:
                torch.set_num_threads(_users.threads)
