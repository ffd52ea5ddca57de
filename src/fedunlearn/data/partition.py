"""Partitions: which client holds which image. Every image lands on exactly one client."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedunlearn.arguments import is_fraction, is_number, is_positive, is_whole, must_be
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import DataError
from fedunlearn.seeding import generator

PARTITIONS = ("iid", "dirichlet", "bias", "group")
_DIRICHLET_TRIES = 100


def partition(
    images: LabelledImages,
    *,
    by: str = "iid",
    clients: int | None = None,
    alpha: float | None = None,
    bias: float | None = None,
    seed: int = 0,
) -> dict[str, LabelledImages]:
    """Split ``images`` over clients; the result maps client ids, in order, to views of one array.

    Args:
        images: what to split.
        by: ``"iid"``: equal random parts. ``"dirichlet"``: each class is shared out in proportions
            drawn from Dirichlet(``alpha``). ``"bias"``: a share ``bias`` of a client's images comes
            from its preferred class (client ``k`` prefers class ``k mod classes``), the rest evenly
            from the others, where classes are of one size; ``1 / classes`` is IID. ``"group"``: one client per value of
            ``images.groups``; with fewer ``clients``, group ``i`` goes to client ``i mod clients``.
        clients: how many; only ``"group"`` can do without.
        alpha: concentration of ``"dirichlet"``, above 0: small is skewed.
        bias: share for ``"bias"``, in [0, 1].
        seed: owner of every draw.

    Returns:
        Client id to images. No client is empty.

    Raises:
        DataError: arguments out of range, or a client would be empty.

    Example:
        >>> import fedunlearn as fu
        >>> train, test = fu.read_digits()
        >>> {name: len(images) for name, images in fu.partition(train, by="iid", clients=3, seed=0).items()}
        {'client-0': 480, 'client-1': 479, 'client-2': 479}
    """
    must_be(LabelledImages, images, "partition(images)", "LabelledImages, as the readers give", DataError)
    if not is_whole(seed, 0):
        raise DataError(f"partition(seed=...) must be a whole number of at least 0, got {seed!r}")
    if clients is not None and not is_whole(clients, 0):
        raise DataError(f"partition(clients=...) must be a whole number of at least 1, got {clients!r}")
    if by not in PARTITIONS:
        raise DataError(f"a partition must be one of {', '.join(PARTITIONS)}, got {by!r}")
    _check_skew(by, alpha, bias)
    if by == "group":
        owner, names = _by_group(images, clients)
    else:
        if not clients:
            raise DataError(f"the {by} partition needs a number of clients of at least 1, got {clients}")
        if clients > len(images):
            raise DataError(f"{len(images)} images cannot go to {clients} clients without leaving one empty")
        draw = generator(seed, "partition", by)
        if by == "iid":
            owner = torch.arange(len(images)) % clients
            owner = owner[torch.randperm(len(images), generator=draw)]
        elif by == "dirichlet":
            owner = _by_dirichlet(images, clients, alpha, draw)
        else:
            owner = _by_bias(images, clients, bias, draw)
        names = [f"client-{k:0{len(str(clients - 1))}d}" for k in range(clients)]
    sizes = torch.bincount(owner, minlength=len(names))
    if int(sizes.min()) == 0:
        empty = names[int(sizes.argmin())]
        raise DataError(f"the {by} partition leaves {empty} without images: use fewer clients or a milder skew")
    ordered = images.take(torch.argsort(owner, stable=True))
    stops = sizes.cumsum(0).tolist()
    return {name: ordered.take(slice(stop - n, stop)) for name, stop, n in zip(names, stops, sizes.tolist())}


def hold_out(
    clients: Mapping[str, LabelledImages], fraction: float, *, seed: int = 0
) -> tuple[dict[str, LabelledImages], dict[str, LabelledImages]]:
    """Split each client's images into training and validation images of its own.

    Args:
        clients: client id to images.
        fraction: share for validation, in [0, 1); rounded per client, never all of its images.
        seed: owner of the draw.

    Returns:
        Training images of every client, and validation images of those that have any.

    Raises:
        DataError: ``fraction`` is out of range.
    """
    if not is_fraction(fraction):
        raise DataError(f"the validation share must lie in [0, 1), got {fraction!r}")
    train, validation = {}, {}
    for name, images in clients.items():
        held = min(round(fraction * len(images)), len(images) - 1)
        if held < 1:
            train[name] = images
            continue
        order = torch.randperm(len(images), generator=generator(seed, "validation", name))
        train[name] = images.take(order[held:].sort().values)
        validation[name] = images.take(order[:held].sort().values)
    return train, validation


def class_table(clients: Mapping[str, LabelledImages]) -> Tensor:
    """Return the images per client and class, int64, shape ``(clients, classes)``."""
    return torch.stack([images.counts() for images in clients.values()])


def _check_skew(by: str, alpha: float | None, bias: float | None) -> None:
    for name, value, of in (("alpha", alpha, "dirichlet"), ("bias", bias, "bias")):
        if value is not None and by != of:
            raise DataError(f"{name} is of the partition {of}, and the partition is {by}: leave it out, or name {of}")


def _by_group(images: LabelledImages, clients: int | None) -> tuple[Tensor, list[str]]:
    if images.groups is None:
        raise DataError("the group partition needs images with groups (mnist with writers.npz, or npz with groups)")
    values, owner = torch.unique(images.groups, return_inverse=True)
    if clients:
        if clients > len(values):
            raise DataError(f"there are {len(values)} groups, too few for {clients} clients: take 0 for one each")
        return owner % clients, [f"client-{k:0{len(str(clients - 1))}d}" for k in range(clients)]
    width = len(str(int(values.max())))
    return owner, [f"group-{int(value):0{width}d}" for value in values]


def _by_dirichlet(images: LabelledImages, clients: int, alpha: float | None, draw: torch.Generator) -> Tensor:
    if alpha is None or not is_positive(alpha):
        raise DataError(f"the dirichlet partition needs alpha above 0, got {alpha!r}")
    for _ in range(_DIRICHLET_TRIES):
        # A Dirichlet draw is a row of Gamma draws over its sum; float64 keeps small alphas from underflow.
        concentration = torch.full((len(images.classes), clients), alpha, dtype=torch.float64)
        gamma = torch._standard_gamma(concentration, generator=draw).clamp_min(1e-300)
        owner = _share_out(images, gamma / gamma.sum(1, keepdim=True), draw)
        if int(torch.bincount(owner, minlength=clients).min()) > 0:
            return owner
    raise DataError(
        f"dirichlet with alpha {alpha} left a client empty in {_DIRICHLET_TRIES} draws: "
        "use a larger alpha or fewer clients"
    )


def _by_bias(images: LabelledImages, clients: int, bias: float | None, draw: torch.Generator) -> Tensor:
    classes = len(images.classes)
    if bias is None or not is_number(bias) or not 0 <= bias <= 1:
        raise DataError(f"the bias partition needs a share in [0, 1], got {bias!r}")
    if clients % classes:
        raise DataError(
            f"the bias partition needs clients in a multiple of the {classes} classes, so that each class is preferred "
            f"by as many, got {clients}"
        )
    shares = torch.full((classes, clients), (1 - bias) / max(classes - 1, 1), dtype=torch.float64)
    for client in range(clients):
        shares[client % classes, client] = bias
    return _share_out(images, shares / shares.sum(1, keepdim=True), draw)


def _share_out(images: LabelledImages, shares: Tensor, draw: torch.Generator) -> Tensor:
    """Give each class's images, shuffled, to clients in the proportions of its row of ``shares``."""
    owner = torch.empty(len(images), dtype=torch.int64)
    for label, row in enumerate(shares):
        rows = (images.labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=draw)]
        stops = (row.cumsum(0) * len(rows)).round().long()
        stops[-1] = len(rows)
        owner[rows] = torch.searchsorted(stops, torch.arange(len(rows)), right=True)
    return owner
