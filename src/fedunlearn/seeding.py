"""Every random draw has an owner: one seed, split by a key such as phase, round and client."""

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, *key: object) -> torch.Generator:
    """Return a generator whose stream depends on ``seed`` and ``key`` alone, in every process."""
    text = "/".join(str(part) for part in (seed, *key))
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


_drawing = threading.Lock()


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Seed what layers draw from, such as dropout, and put back what others draw from it afterwards.

    One thread at a time: torch has one generator for the whole process.
    """
    on_gpu = device.type == "cuda"
    with _drawing, torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield
