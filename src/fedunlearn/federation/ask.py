"""The server's side of a job: ask, refuse what cannot be used by name, and go on if enough remains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch

from fedunlearn.errors import FederationError
from fedunlearn.federation.jobs import MOST_IMAGES, SUM, Engine, Evaluate, Job, Measure, Reestimate, Reply, Train
from fedunlearn.federation.ledger import Entry, Meter
from fedunlearn.training.batch_norm import batch_norm_layers

_logger = logging.getLogger(__name__)
QUORUM = 0.5

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name to shape and type


class Answers:
    """The replies to a job that can be used, in client-id order, and then what all of them cost.

    They are read once, as clients give them, and not kept: iterate, then ask for ``entry``.

    Args:
        engine: who runs the job.
        job: what the clients are asked.
    """

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self._job = job
        self._asked = engine.clients if job.clients is None else job.clients
        self._meter = Meter(job, engine.shape, len(self._asked))

    def __iter__(self) -> Iterator[Reply]:
        """Yield each usable reply.

        Raises:
            FederationError: at the end: less than half of the clients asked gave one.
        """
        expected = _expected(self._job)
        answered, refused = 0, []
        for reply in self._one_of_each():
            why = refusal(reply, self._job, expected)
            self._meter.count(reply, refused=why)
            if why is None:
                answered += len(reply.members) or 1
                yield reply
            else:
                self._warn(f"{reply.client} gave no usable reply: {why}")
                refused.append(f"{reply.client}: {why}")
        if answered < max(1, QUORUM * len(self._asked)):
            raise FederationError(
                f"{self._job.phase}, round {self._job.round + 1}: only {answered} of {len(self._asked)} clients gave "
                f"a usable reply, expected at least half ({'; '.join(refused)}); mend them and run the same command "
                "again"
            )

    @property
    def entry(self) -> Entry:
        """The ledger entry of the replies read so far."""
        return self._meter.entry()

    def _one_of_each(self) -> Iterator[Reply]:
        """Yield the first reply of every client that was asked; engines of other hands may bring more."""
        asked, seen = {SUM, *self._asked}, set()
        for reply in self._engine.run(self._job):
            if reply.client in seen:
                self._warn(f"{reply.client} answered twice: its first answer counts")
            elif not asked.issuperset((reply.client, *reply.members)):
                self._warn(f"{reply.client} was not asked")
            else:
                seen.add(reply.client)
                yield reply

    def _warn(self, text: str) -> None:
        _logger.warning("%s, round %d: %s", self._job.phase, self._job.round + 1, text)


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
