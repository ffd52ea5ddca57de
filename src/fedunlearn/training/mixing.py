"""Batches of which a part is of the forgotten classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from fedunlearn.data.batches import sizes
from fedunlearn.data.images import LabelledImages

Drawn = Callable[..., Iterator[tuple[Tensor, Tensor]]]


def is_forgotten(labels: Tensor, forget: Sequence[int]) -> Tensor:
    """Return which of ``labels`` are among the classes ``forget``, bool."""
    return torch.isin(labels, torch.tensor(list(forget), device=labels.device))


def each_of(size: int, share: float, classes: int = 1) -> int:
    """Return how many images of each of ``k`` forgotten classes a batch has: about ``s / (1 + (k - 1) s)`` of it.

    Each has as many beside the kept ones as one class alone, whose part is ``s``; at least one, as the kept ones where
    the batch has room.

    Example:
        >>> each_of(64, 0.25), each_of(64, 0.25, classes=3)  # beside 48 kept ones, and beside 31
        (16, 11)
    """
    part = share / (1 + (classes - 1) * share)
    return max(1, min(round(part * size), (size - 1) // classes))


def again_and_again(drawn: Drawn, forgotten: Sequence[LabelledImages], each: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield about ``each`` images of every set in ``forgotten``, without end; of a set each once before any again."""
    streams = [_endless(drawn, part, each) for part in forgotten]
    while True:
        images, labels = zip(*(next(stream) for stream in streams))
        yield torch.cat(images), torch.cat(labels)


def _endless(drawn: Drawn, forgotten: LabelledImages, each: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from drawn(forgotten, each, limit=None)


def mixed(
    drawn: Drawn,
    erased: Iterator[tuple[Tensor, Tensor]],
    few: int,
    kept: LabelledImages,
    size: int,
    *,
    limit: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of about ``size`` images, ``few`` of each from ``erased``.

    Args:
        drawn: draws shuffled batches: ``drawn(images, size, limit=...)``.
        erased: see ``again_and_again``.
        few: images that it yields at a time.
        kept: images of the other classes; each at most once.
        size: images in a batch.
        limit: stop after about so many images.
    """
    for images, labels in drawn(kept, max(1, size - few), limit=_kept(len(kept), size, few, limit)):
        forgotten = next(erased)
        yield torch.cat([images, forgotten[0]]), torch.cat([labels, forgotten[1]])


def fewest(kept: int, forgotten: Sequence[int], size: int, each: int, limit: int) -> int:
    """Return how many different images of a kind, whichever are fewest, the first pass of ``mixed`` takes.

    Args:
        kept: images of the other classes.
        forgotten: images in each of the sets that are mixed in.
        size: images in a batch.
        each: of these, images of each set.
        limit: about as many images in a pass.

    Example:
        >>> fewest(1000, [100], size=64, each=16, limit=128)  # of 96 and 32
        32
    """
    drawn = _passed(kept, size, each * len(forgotten), limit)
    return min(sum(drawn), *forgotten, max(1, len(drawn)) * each)


def fewest_by_turns(
    kept: int,
    forgotten: Sequence[int],
    size: int,
    each: int,
    limit: int,
    turn: Callable[[float, float | None], int | None],
) -> int:
    """Return how many different images of a kind, whichever are fewest, steps of one kind are sure to take.

    Each turn on images to forget counts alone: while a model is as received, a step away from that has no gradient. The
    others count pass by pass, in which each is drawn once; of a set, what is drawn before it begins anew.

    Args:
        kept: images of the other classes.
        forgotten: images in each of the sets that are mixed in.
        size: images in a batch.
        each: of these, images of each set.
        limit: about as many images in all passes.
        turn: see ``ByTurns``.

    Example:
        >>> first = lambda progress, earlier: 0 if progress < 0.5 else None
        >>> fewest_by_turns(1000, [100], 64, 16, 128, first)  # a step of 16, a step of 48
        16
    """
    streams = [_rounds_of(sizes(count, each)) for count in forgotten]
    away: dict[int, list[Counter[int]]] = {}
    done, earlier, most = 0, None, 0
    while done < limit:
        others = 0
        for part in _passed(kept, size, each * len(forgotten), limit - done):
            drawn = [next(stream) for stream in streams]
            of = turn(done / limit, earlier)
            if of is None:
                others += part
            else:
                for counts, (time, number) in zip(away.setdefault(of, [Counter() for _ in streams]), drawn):
                    counts[time] += number
            earlier = done / limit
            done += part + sum(number for _, number in drawn)
        most = max(most, others)
    return min([most, *(max(counts.values()) for turns in away.values() for counts in turns)])


def _rounds_of(batches: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the batches of a set again and again, each with how often the set was drawn before."""
    return ((time, number) for time in count() for number in batches)


def _passed(kept: int, size: int, few: int, limit: int) -> list[int]:
    """Return how many images of the other classes each batch of a pass of ``mixed`` has."""
    return sizes(_kept(kept, size, few, limit), max(1, size - few))


def _kept(kept: int, size: int, few: int, limit: int) -> int:
    return min(kept, max(1, round(limit * max(1, size - few) / size)))
