"""Every random draw has an owner: one seed, split by a key such as phase, round and client."""

import zlib

import torch


def generator(seed: int, *key: object) -> torch.Generator:
    """Return a generator whose stream depends on ``seed`` and ``key`` alone, in every process."""
    text = "/".join(str(part) for part in (seed, *key))
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))
