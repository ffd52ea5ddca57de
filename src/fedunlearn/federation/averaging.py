"""What a server makes of its clients' states: their average, and how it moves on from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedunlearn.arguments import is_fraction, is_positive
from fedunlearn.errors import RecipeError
from fedunlearn.federation.jobs import Reply
from fedunlearn.training.sgd import constant

_logger = logging.getLogger(__name__)
_CROWD = 3  # of two clients, one may well hold most images


@dataclass(frozen=True)
class Server:
    """How the learning rate changes from round to round, and what the server makes of the clients' average.

    With momentum ``b`` the server moves on as the averages did before (FedAvgM: T. Hsu, H. Qi, M. Brown, *Measuring the
    Effects of Non-Identical Data Distribution for Federated Visual Classification*, 2019)::

        v = b v + (average - w)        w = w + v

    Buffers, such as the statistics of batch normalisation, are the clients' average at any momentum.

    Attributes:
        schedule: factor of the learning rate in ``round`` of ``rounds``.
        momentum: ``b``; 0 is plain averaging.

    Raises:
        RecipeError: the momentum does not lie in ``[0, 1)``, or the schedule is no function.
    """

    schedule: Callable[[int, int], float] = constant
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise RecipeError(f"Server(schedule) must be a function, such as one_cycle, got {self.schedule!r}")
        if not is_fraction(self.momentum):
            raise RecipeError(f"Server(momentum=...) must be at least 0 and below 1, got {self.momentum!r}")

    def rates(self, lr: float, rounds: int) -> list[float]:
        """Return the learning rate of each round, of which ``lr`` is the highest where the schedule goes up to 1.

        Raises:
            RecipeError: the schedule fails, or gives something else than numbers above 0.
        """
        try:
            factors = [self.schedule(round, rounds) for round in range(rounds)]
        except Exception as error:  # the user's own function can fail in any way
            raise RecipeError(
                f"Server(schedule) failed ({type(error).__name__}: {error}): it is called as schedule(round, rounds)"
            ) from error
        for factor in factors:
            if not is_positive(factor):
                raise RecipeError(f"Server(schedule) must give numbers above 0, got {factor!r}")
        return [lr * factor for factor in factors]

    def moved(
        self, model: nn.Module, average: Mapping[str, Tensor], velocity: dict[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the next state of ``model``; ``velocity``, by parameter, is brought up to date in place."""
        if not self.momentum:
            return average
        state = dict(average)
        # A module may stand under two names, and the state under both.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.is_floating_point():  # counts do not move
                continue
            before = parameter.detach().cpu()
            moving = average[name] - before
            if name in velocity:
                moving += self.momentum * velocity[name]
            velocity[name] = moving
            state[name] = before + moving
        return state


def averaged(replies: Iterable[Reply]) -> dict[str, Tensor]:
    """Return the average of the clients' states, and say who claims more images than all others together."""
    claims: dict[str, int] = {}

    def updates() -> Iterator[tuple[Mapping[str, Tensor], int]]:
        for reply in replies:
            claims[reply.client] = reply.images
            yield reply.tensors, reply.images

    state = fedavg(updates())
    outweighing(claims)
    return state


def evened(replies: Iterable[Reply]) -> list[Mapping[str, Tensor]]:
    """Return the sums of the clients; of three or more, none weighs more than all others together."""
    found = {reply.client: reply for reply in replies}
    heavy, factor = outweighing({client: reply.images for client, reply in found.items()}) or ("", 1.0)
    return [
        {name: tensor * factor for name, tensor in reply.tensors.items()} if client == heavy else reply.tensors
        for client, reply in found.items()
    ]


def outweighing(claims: Mapping[str, int]) -> tuple[str, float] | None:
    """Return who claims more images than all others together, and say so; and the factor by which it weighs as they do.

    A number of images is a client's own claim. None where there is no such client, or of fewer than three.
    """
    total = sum(claims.values())
    for client, images in claims.items():
        others = total - images
        if len(claims) >= _CROWD and images > others:
            _logger.warning(
                "%s says that it has %d images, more than all others together (%d): it counts as %d, so that no client "
                "decides alone",
                *(client, images, others, others),
            )
            return client, others / images
    return None


def fedavg(updates: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Average states, weighted by images, batch normalisation buffers included.

    ::

        state[n] = sum_k images_k * state_k[n] / sum_k images_k

    Of three clients or more, none weighs more than all others together: a number of images is a client's own claim.

    Args:
        updates: states by tensor name, each with its number of images, which is above 0.

    Returns:
        The average: floats summed in float64 in the order given and returned in their own type; of integer buffers
        (batch counters) the largest, so that they stay integers.
    """
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    total = clients = most = 0
    heaviest: Mapping[str, Tensor] = {}
    for state, images in updates:
        total += images
        clients += 1
        if images > most:
            heaviest, most = state, images
        for name, tensor in state.items():
            types[name] = tensor.dtype
            if tensor.is_floating_point():
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
                sums[name].add_(tensor, alpha=images)
            else:
                sums[name] = torch.maximum(sums[name], tensor) if name in sums else tensor
    excess = 2 * most - total
    if clients >= _CROWD and excess > 0:  # taken off here, as an honest sum is to add up in its order
        total -= excess
        for name, value in sums.items():
            if types[name].is_floating_point:
                value.sub_(heaviest[name].double(), alpha=excess)
    return {
        name: (value / total).to(types[name]) if types[name].is_floating_point else value
        for name, value in sums.items()
    }
