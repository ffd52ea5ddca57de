"""The server's side of a job: ask, refuse what cannot be used by name, and go on if enough remains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from fedunlearn.errors import FederationError
from fedunlearn.federation.client import batch_norm_layers
from fedunlearn.federation.jobs import MOST_IMAGES, SUM, Engine, Evaluate, Job, Measure, Reestimate, Reply, Train
from fedunlearn.federation.ledger import Entry, entry_for

_logger = logging.getLogger(__name__)
QUORUM = 0.5

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name to shape and type


def collect(engine: Engine, job: Job) -> tuple[list[Reply], Entry]:
    """Run ``job`` and return the replies that can be used, in client-id order, with the ledger entry.

    Raises:
        FederationError: less than half of the clients asked gave a usable reply.
    """
    replies = _one_of_each(engine.run(job), engine.clients if job.clients is None else job.clients, job)
    expected = _expected(job)
    refused = {reply.client: why for reply in replies if (why := refusal(reply, job, expected)) is not None}
    for client, why in refused.items():
        _logger.warning("%s, round %d: %s gave no usable reply: %s", job.phase, job.round + 1, client, why)
    used = [reply for reply in replies if reply.client not in refused]
    asked = len(engine.clients if job.clients is None else job.clients)
    answered = sum(len(reply.members) or 1 for reply in used)
    if answered < max(1, QUORUM * asked):
        why = "; ".join(f"{client}: {reason}" for client, reason in refused.items())
        raise FederationError(
            f"{job.phase}, round {job.round + 1}: only {answered} of {asked} clients gave a usable reply, "
            f"expected at least half ({why}); mend them and run the same command again"
        )
    return used, entry_for(job, engine.shape, asked, replies, refused)


def _one_of_each(replies: Sequence[Reply], asked: Sequence[str], job: Job) -> list[Reply]:
    """Return the first reply of every client that was asked; engines of other hands may bring more."""
    first: dict[str, Reply] = {}
    for reply in replies:
        if reply.client in first or not {reply.client, *reply.members} - {SUM} <= set(asked):
            why = "answered twice: its first answer counts" if reply.client in first else "was not asked"
            _logger.warning("%s, round %d: %s %s", job.phase, job.round + 1, reply.client, why)
        else:
            first[reply.client] = reply
    return list(first.values())


def refusal(reply: Reply, job: Job, expected: Layout) -> str | None:
    """Return why ``reply`` cannot be used, or None if it can."""
    if reply.error is not None:
        return reply.error
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in reply.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"expected {name} {_shown(expected.get(name))}, got {_shown(found.get(name))}"
    for name, tensor in reply.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} has values that are not finite"
        if not _may_be_negative(name, job) and bool((tensor < 0).any()):
            return f"{name} has negative values"
    if reply.images < 1 and isinstance(job, (Reestimate, Train)):
        return f"it reports {reply.images} images"
    if reply.images > MOST_IMAGES * max(1, len(reply.members)):
        return f"it reports {reply.images} images, more than any client holds"
    return _contradiction(reply) if isinstance(job, Measure) else None


def _shown(layout: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing of the name" if layout is None else f"of shape {layout[0]}, {str(layout[1]).removeprefix('torch.')}"


def _contradiction(reply: Reply) -> str | None:
    """Return what no honest statistics say, or None."""
    counts = reply.tensors["counts"]
    if int(counts.sum()) > reply.images or bool((counts > reply.tensors["held"]).any()):
        return f"it counts {int(counts.sum())} images of {int(reply.tensors['held'].sum())} that it holds"
    absent = counts == 0
    for name, sums in reply.tensors.items():
        if name.startswith("sums.") and bool((sums[absent] != 0).any()):
            return f"{name} has values for classes of which it counts no image"
    return None


def _may_be_negative(name: str, job: Job) -> bool:
    match job:
        case Train():
            return not name.endswith("running_var")
        case Reestimate():
            return name.startswith("mean:")
        case _:
            return False


def _expected(job: Job) -> Layout:
    """Return shape and type of each tensor that answers ``job``."""
    sums, whole = torch.float64, torch.int64
    match job:
        case Measure():
            widths = {layer: int(job.model.get_submodule(layer).get_parameter("weight").shape[0]) for layer in job.taps}
            counts: Layout = {"counts": ((job.classes,), whole), "held": ((job.classes,), whole)}
            return {**counts, **{f"sums.{layer}": ((job.classes, width), sums) for layer, width in widths.items()}}
        case Reestimate():
            layers = batch_norm_layers(job.model).items()
            parts = {f"{kind}:{name}": layer.num_features for name, layer in layers for kind in ("mean", "square")}
            return {"images": ((), sums), **{name: ((width,), sums) for name, width in parts.items()}}
        case Train():
            return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in job.model.state_dict().items()}
        case Evaluate():
            return {"correct": ((), whole), "counts": ((), whole)}
    raise FederationError(f"the server knows Measure, Reestimate, Train and Evaluate, got {type(job).__name__}")
