"""What a server has its clients measure: the channels' statistics, and those of batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedunlearn.arguments import must_be
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.stats import ChannelStats, Pooling, pooled
from fedunlearn.errors import FederationError, ModelError
from fedunlearn.federation.ask import ask
from fedunlearn.federation.averaging import evened, outweighing
from fedunlearn.federation.federation import Federation, check_somebody
from fedunlearn.federation.jobs import Reply
from fedunlearn.federation.journal import Step
from fedunlearn.federation.sums import Gradients, Moments
from fedunlearn.federation.tasks import Measure, Reestimate
from fedunlearn.training.batch_norm import batch_norm_layers, fit_batch_norm

_IMAGES = "images:"  # no parameter and no layer has this name


@dataclass(frozen=True, eq=False)
class Holdings:
    """What is known of the classes that clients hold.

    Attributes:
        counts: client to its images of each class, int64, shape ``(classes,)``; of a client that did not answer, or
            answered under secure aggregation, nothing is known.
        clients: ids of all clients.
    """

    counts: Mapping[str, Tensor]
    clients: tuple[str, ...]

    def with_images_besides(self, classes: Sequence[int]) -> tuple[str, ...]:
        """Return the clients that hold images of other classes, and those of whom nothing is known."""
        # A client that reports nothing by its rules may hold images of the kept classes all the same.
        return self._who(lambda counts: int(counts.sum() - counts[list(classes)].sum()) > 0)

    def with_images_of(self, classes: Sequence[int]) -> tuple[str, ...]:
        """Return the clients that hold images of these classes, and those of whom nothing is known."""
        return self._who(lambda counts: bool(counts[list(classes)].any()))

    def _who(self, holds: Callable[[Tensor], bool]) -> tuple[str, ...]:
        """Return the clients whose counts say that they hold some, and those that tell nothing."""
        known = {name: counts for name, counts in self.counts.items() if bool(counts.any())}
        return tuple(name for name in self.clients if name not in known or holds(known[name]))


def measure(
    model: Classifier,
    fed: Federation,
    *,
    hook: str = "activation",
    phase: str = "measure",
    pooling: Pooling = pooled,
    sample: int | None = None,
) -> tuple[ChannelStats, Holdings]:
    """Return the clients' statistics, merged in client-id order, and what each client holds.

    Args:
        model: whose channels are read.
        fed: all its clients are asked.
        hook: where, see ``find_channels``.
        phase: name of the step in the journal and in every draw.
        pooling: makes one of the clients' statistics.
        sample: at most so many images per client.

    Raises:
        FederationError: too few clients gave usable replies, or only their sum is known where each is needed.
        RunError: the journal holds the phase of another request.
    """
    clients = tuple(fed.engine.clients if fed.clients is None else fed.clients)
    task = Measure(hook=hook, classes=fed.engine.classes, sample=sample)
    named = None if fed.grows() else sorted(fed.engine.clients)
    about = fed.about(weights=model, **vars(task), pooling=pooling, clients=named)
    recorded = fed.journal.finished(phase, [about])
    if recorded:
        saved = fed.journal.state(phase)
        names, rows = recorded[0].entries[0].clients, saved.pop("held")
        if fed.grows():  # who has not come back yet may do so
            clients = tuple(sorted({*clients, *names}))
        return ChannelStats.from_tensors(saved), Holdings(dict(zip(names, rows)), clients)
    held: dict[str, Tensor] = {}

    def parts(replies: Iterator[Reply]) -> Iterator[ChannelStats]:
        for reply in replies:
            if reply.members and pooling is not pooled:
                raise FederationError(
                    "under secure aggregation only the sum of the statistics is known: "
                    "unlearn.mean_of_clients and unlearn.influence need those of each client"
                )
            if not reply.members:
                held[reply.client] = reply.tensors["held"]
            yield ChannelStats.from_tensors({name: tensor for name, tensor in reply.tensors.items() if name != "held"})

    fed.journal.report(phase, 0, 1)
    job = replace(fed.job(task, model, phase=phase), clients=None)
    stats, entry = ask(fed.engine, job, lambda replies: pooling(parts(replies)))
    must_be(ChannelStats, stats, "what a pooling returns", "ChannelStats, as pooled() makes them", FederationError)
    known = torch.stack(list(held.values())) if held else torch.zeros(0, fed.engine.classes)
    fed.journal.finish(Step(phase, 0, (entry,), about=about), {**stats.tensors(), "held": known})
    fed.journal.report(phase, 1, 1)
    return stats, Holdings(held, clients)


def reestimate(model: Classifier, fed: Federation, *, sample: int | None = None) -> Classifier:
    """Return ``model`` with batch normalisation statistics that fit the kept classes; no labels, no gradients.

    Over the batches ``b`` of all clients, of ``n_b`` images with mean ``m_b`` and variance ``v_b`` per channel::

        mean = sum_b n_b m_b / sum_b n_b
        var  = sum_b n_b (v_b + m_b^2) / sum_b n_b - mean^2

    Clients send the sums, so secure aggregation applies. Each layer normalises by the batch while its successors are
    measured, as in training: the statistics of the first layer do not depend on who holds which image, those of deeper
    layers do where clients hold few classes each.

    Args:
        model: the pruned model.
        fed: the clients that hold images of the kept classes.
        sample: at most so many images per client.

    Raises:
        FederationError: too few usable replies.
        RunError: the journal holds the step of another request.
    """
    must_be(Classifier, model, "reestimate(model)", "a Classifier, such as Classifier(module, shape)", ModelError)
    phase = "reestimate"
    fitted = model.copy()
    task = Reestimate(exclude=fed.exclude, sample=sample)
    about = fed.about(weights=model, **vars(task), clients=fed.named())
    if fed.journal.finished(phase, [about]):
        fitted.module.load_state_dict(fed.journal.state(phase))
        return fitted
    if not batch_norm_layers(fitted.module):
        return fitted
    check_somebody(fed)
    fed.journal.report(phase, 0, 1)
    job = fed.job(task, model, phase=phase)
    sums, entry = ask(fed.engine, job, evened)
    fit_batch_norm(fitted.module, sums)
    fed.journal.finish(Step(phase, 0, (entry,), about=about), fitted.module.state_dict())
    fed.journal.report(phase, 1, 1)
    return fitted


def summed(
    model: Classifier, fed: Federation, task: Gradients | Moments, *, phase: str
) -> tuple[dict[str, Tensor], int]:
    """Return what the clients of ``fed`` answer to ``task``, added up, and over how many images.

    Of three clients or more, none weighs more than all others together, as in ``evened``.

    Args:
        model: the model.
        fed: the clients that are asked.
        task: what they sum.
        phase: name of the step in the journal and in every draw.

    Raises:
        FederationError: too few usable replies.
        RunError: the journal holds the step of another request.
    """
    about = fed.about(weights=model, **vars(task), clients=fed.named())
    if fed.journal.finished(phase, [about]):
        saved = fed.journal.state(phase)
        return saved, int(saved.pop(_IMAGES))
    check_somebody(fed)
    fed.journal.report(phase, 0, 1)

    sums, entry = ask(fed.engine, fed.job(task, model, phase=phase), _total)
    fed.journal.finish(Step(phase, 0, (entry,), about=about), sums)
    fed.journal.report(phase, 1, 1)
    return sums, int(sums.pop(_IMAGES))


def _total(replies: Iterator[Reply]) -> dict[str, Tensor]:
    """Return the sum of the answers; the largest one is kept apart too, and no other: they may be many and large."""
    sums: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    claims: dict[str, int] = {}
    largest: Reply | None = None
    for reply in replies:
        claims[reply.client] = reply.images
        _add(sums, reply.tensors)
        less: Reply | None = reply
        if largest is None or reply.images > largest.images:
            largest, less = reply, largest
        if less is not None:
            _add(others, less.tensors)
    found = outweighing(claims)
    if found is None or largest is None:
        return {_IMAGES: torch.tensor(sum(claims.values())), **sums}
    client, factor = found
    _add(others, {name: tensor * factor for name, tensor in largest.tensors.items()})
    return {_IMAGES: torch.tensor(2 * (sum(claims.values()) - claims[client])), **others}


def _add(sums: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        sums[name] = sums[name] + tensor if name in sums else tensor
