"""The server's side of a job: ask, refuse what cannot be used by name, and go on if enough remains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from fedunlearn.data.images import MOST_IMAGES
from fedunlearn.errors import FederationError, listed, printable
from fedunlearn.federation.jobs import BY_RULES, SUM, Engine, Job, Layout, Reply
from fedunlearn.federation.ledger import Entry, Meter

_logger = logging.getLogger(__name__)
_Value = TypeVar("_Value")
QUORUM = 0.5
_NAMED = 5  # refused clients that the log names; rounds.jsonl has all of them


def ask(engine: Engine, job: Job, fold: Callable[[Iterator[Reply]], _Value]) -> tuple[_Value, Entry]:
    """Run ``job`` and return what ``fold`` makes of the replies that can be used, and what all of them cost.

    Args:
        engine: who runs the job.
        job: what the clients are asked.
        fold: reads the usable replies, in client-id order, while clients still work; they are not kept.

    Raises:
        FederationError: less than half of the clients asked gave a usable reply, those not counted whose rules let
            none stand for the few images that they hold.
    """
    asked = tuple(engine.clients if job.clients is None else job.clients)
    meter = Meter(job, engine.shape, len(asked))
    replies = _usable(engine, job, asked, meter)
    value = fold(replies)
    for _ in replies:  # what a fold leaves unread is counted all the same
        pass
    return value, meter.entry()


def _usable(engine: Engine, job: Job, asked: tuple[str, ...], meter: Meter) -> Iterator[Reply]:
    """Yield each usable reply, and count all."""
    expected = job.task.layout(job.model)
    answered, refused = 0, dict[str, list[str]]()
    for reply in _one_of_each(engine, job, asked):
        why = refusal(reply, job, expected)
        meter.count(reply, refused=why)
        if why is None:
            answered += len(reply.members) or 1
            yield reply
        else:
            refused.setdefault(why, []).append(reply.client)
            if sum(map(len, refused.values())) <= _NAMED:
                _warn(job, f"{reply.client} gave no usable reply: {why}")
    if (more := sum(map(len, refused.values())) - _NAMED) > 0:
        _warn(job, f"{more} more gave no usable reply")
    # Who holds too few images for its rules will never answer: it is no sign of a fleet that fails.
    able = len(asked) - sum(len(clients) for why, clients in refused.items() if BY_RULES in why)
    if answered < max(1, QUORUM * able):
        raise FederationError(
            f"{job.phase}, round {job.round + 1}: only {answered} of {len(asked)} clients gave "
            f"a usable reply, expected at least half ({_reasons(refused)}); mend them and run the same command again"
        )


def _reasons(refused: Mapping[str, Sequence[str]]) -> str:
    """Return why clients were refused, those of one reason together: a fleet has thousands."""
    return listed((f"{listed(clients)}: {why}" for why, clients in refused.items()), "; ")


def _one_of_each(engine: Engine, job: Job, asked: tuple[str, ...]) -> Iterator[Reply]:
    """Yield the first reply of every client that was asked; engines of other hands may bring more."""
    known, seen = {SUM, *asked}, set()
    for reply in engine.run(job):
        if reply.client in seen:
            _warn(job, f"{reply.client} answered twice: its first answer counts")
        elif not known.issuperset((reply.client, *reply.members)):
            _warn(job, f"{reply.client} was not asked")
        else:
            seen.add(reply.client)
            yield reply


def refusal(reply: Reply, job: Job, expected: Layout) -> str | None:
    """Return why ``reply`` cannot be used, or None if it can."""
    if reply.error is not None:
        return reply.error
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in reply.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"expected {printable(name)} {_shown(expected.get(name))}, got {_shown(found.get(name))}"
    for name, tensor in reply.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} has values that are not finite"
    if reply.images > MOST_IMAGES * max(1, len(reply.members)):
        return f"it reports {reply.images} images, more than any client holds"
    if reply.samples > MOST_IMAGES * max(1, len(reply.members)):
        return f"it reports to have seen {reply.samples} images, more than any client sees in a round"
    return job.task.flaw(reply)


def _shown(layout: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing of the name" if layout is None else f"of shape {layout[0]}, {str(layout[1]).removeprefix('torch.')}"


def _warn(job: Job, text: str) -> None:
    _logger.warning("%s, round %d: %s", job.phase, job.round + 1, text)
