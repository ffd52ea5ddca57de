"""The criteria: how strongly each channel speaks for the classes to forget. All the maths of the ranking is here.

A criterion is any callable ``(stats, forget) -> ChannelScores``; the highest scores are pruned first, and a score
of 0 or less is never pruned. Notation of every docstring: ``a[u, c]`` is the mean activation of channel ``c`` over
the images of class ``u``, in one layer. Classes that nobody holds are left out of every sum and mean. Several
classes to forget are pooled into one: their images become one class ``t``.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedunlearn.arguments import is_whole, must_be
from fedunlearn.channels.stats import ChannelStats, Pooling, pooled
from fedunlearn.channels.taps import HOOKS
from fedunlearn.errors import PlanError
from fedunlearn.seeding import generator

REFERENCES = ("class", "channel")
_ROUNDED = 1e-12  # of a mean


@dataclass(frozen=True, eq=False)
class ChannelScores(Mapping[str, Tensor]):
    """Layer to scores, float64, shape ``(channels,)``; higher speaks more for the forgotten class."""

    scores: Mapping[str, Tensor]

    def __getitem__(self, layer: str) -> Tensor:
        return self.scores[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        tops = ", ".join(f"{layer} max {float(s.max()):.3g}" for layer, s in self.scores.items())
        return f"ChannelScores({tops})"


Criterion = Callable[[ChannelStats, Sequence[int]], ChannelScores]


# One class or several: Python's, NumPy's or torch's whole numbers, in any collection or array; names where known.
Classes = int | str | Iterable[int | str]


def forget_classes(forget: Classes, classes: int | Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of the classes to forget, sorted.

    Args:
        forget: one class or several, by number, or by name where ``classes`` has the names, which are compared in
            Unicode's composed form (NFC).
        classes: how many there are, or the name of each.

    Raises:
        PlanError: none, all, twice the same, one outside ``0 .. classes - 1``, or something else than a class.

    Example:
        >>> forget_classes(torch.tensor([4, 2]), 10), forget_classes("cat", ("ant", "cat", "dog"))
        ((2, 4), (1,))
    """
    names = () if isinstance(classes, int) else tuple(classes)
    count = classes if isinstance(classes, int) else len(names)
    wanted = [_number(one, names, count) for one in _one_by_one(forget)]
    if not wanted or len(set(wanted)) != len(wanted):
        raise PlanError(f"the classes to forget must be one or more different ones, got {wanted}")
    if len(wanted) == count:
        raise PlanError(f"all {count} classes are to be forgotten: at least one must stay; check unlearn.forget")
    return tuple(sorted(wanted))


def _one_by_one(forget: object) -> list[object]:
    """Return what ``forget`` holds; arrays and tensors become Python's own numbers."""
    value = forget.tolist() if hasattr(forget, "tolist") else forget
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return [value]
    return [one.tolist() if hasattr(one, "tolist") else one for one in value]


def _number(label: object, names: Sequence[str], count: int) -> int:
    if isinstance(label, str) and names:
        composed = [unicodedata.normalize("NFC", name) for name in names]
        if unicodedata.normalize("NFC", label) not in composed:
            several = ", several as in unlearn.forget=[9, 8]" if "," in label else ""
            quoted = ', a list of names as in unlearn.forget=["a", "b"]' if label.startswith("[") else ""
            near = difflib.get_close_matches(label.casefold(), {name.casefold(): name for name in names}, 1)
            meant = [name for name in names if near and name.casefold() == near[0]]
            hint = f" (did you mean {meant[0]!r}?)" if meant else ""
            raise PlanError(
                f"no class is named {label!r}{hint}; the classes are {', '.join(names)}: check unlearn.forget"
                f"{quoted or several}"
            )
        return composed.index(unicodedata.normalize("NFC", label))
    # A truth value is a number to Python, and 9.0 may be the outcome of a sum: neither is meant as a class.
    if isinstance(label, bool) or not isinstance(label, int):
        by_name = ", or by name" if names else "; names are known in recipes and where images are given"
        raise PlanError(
            f"the class to forget must be a whole number in 0 .. {count - 1}{by_name}, got {label!r} "
            f"({type(label).__name__}): check unlearn.forget"
        )
    if not 0 <= label < count:
        raise PlanError(f"the class to forget must lie in 0 .. {count - 1}, got {label}: check unlearn.forget")
    return label


def tf_idf(
    stats: ChannelStats, forget: int | Sequence[int], *, reference: str = "class", smoothing: float = 1.0
) -> ChannelScores:
    """Score channels by term frequency times inverse document frequency (word = channel, document = class).

    With ``K`` classes that somebody holds, those to forget counted as one::

        tf[c]  = a[t, c] / sum_j a[t, j]
        idf[c] = log((smoothing + K) / (1 + #{u : a[u, c] >= r}))
        score  = tf * idf

    The reference ``r`` is ``mean_j a[u, j]``, the mean over the channels of class ``u``, for ``reference="class"``
    (the paper), or ``mean_u a[u, c]``, the mean over the classes of channel ``c``, for ``"channel"`` (the released
    code, which also has ``smoothing=0``). Source: Wang et al., *Federated Unlearning via Class-Discriminative
    Pruning*, WWW 2022. Textbook TF-IDF counts a word as present when it occurs at all; an activation always does,
    hence the reference.

    Args:
        stats: sums and counts.
        forget: class or classes to forget.
        reference: ``"class"`` or ``"channel"``.
        smoothing: the constant beside ``K``.

    Returns:
        Scores; 0 for every channel of a layer that is silent for the class.

    Raises:
        PlanError: the classes are not valid or held by nobody, or the reference is unknown.

    Example:
        >>> stats = ChannelStats({"conv": torch.tensor([[6.0, 2.0], [0.0, 2.0], [0.0, 2.0]])}, torch.ones(3).long())
        >>> tf_idf(stats, forget=0)["conv"]  # channel 0 fires for class 0 alone
        tensor([0.5199, 0.0719], dtype=torch.float64)
    """
    if reference not in REFERENCES:
        raise PlanError(f"unlearn.reference must be one of {', '.join(REFERENCES)}, got {reference!r}")

    def score(a: Tensor) -> Tensor:
        k = len(a)
        level = a.mean(1, keepdim=True) if reference == "class" else a.mean(0, keepdim=True)
        level = level - _ROUNDED * level.abs()  # of equal values the mean may round to more than they are
        idf = torch.log((smoothing + k) / (1 + (a >= level).sum(0).double()))
        return _ratio(a[0], a[0].sum()) * idf

    return _by_layer(stats, forget, score)


def contrast(stats: ChannelStats, forget: int | Sequence[int]) -> ChannelScores:
    """Score channels by how far class ``t`` stands above the mean of the others.

    ::

        score[c] = (a[t, c] - m[c]) / (a[t, c] + m[c]),   m[c] = mean over u != t of a[u, c]

    In [-1, 1]; 0 for silent channels. Arguments, result and errors as for ``tf_idf``.
    """

    def score(a: Tensor) -> Tensor:
        others = a[1:].mean(0)
        return _ratio(a[0] - others, a[0] + others)

    return _by_layer(stats, forget, score)


def margin(stats: ChannelStats, forget: int | Sequence[int]) -> ChannelScores:
    """Score channels by how far class ``t`` stands above the largest of the others.

    ::

        score[c] = (a[t, c] - m[c]) / (a[t, c] + m[c]),   m[c] = max over u != t of a[u, c]

    In [-1, 1]; 0 for silent channels. Arguments, result and errors as for ``tf_idf``.
    """

    def score(a: Tensor) -> Tensor:
        others = a[1:].max(0).values
        return _ratio(a[0] - others, a[0] + others)

    return _by_layer(stats, forget, score)


def random_scores(stats: ChannelStats, forget: int | Sequence[int], *, seed: int = 0) -> ChannelScores:
    """Score channels uniformly in (0, 1] without looking at them: the control for every criterion."""
    wanted = _held_classes(stats, forget)
    scores = {}
    for layer, sums in stats.sums.items():
        draw = generator(seed, "random", layer, *wanted)
        scores[layer] = 1 - torch.rand(sums.shape[1], generator=draw, dtype=torch.float64)
    return ChannelScores(scores)


@dataclass(frozen=True)
class Ranking:
    """How channels are measured and ranked.

    Attributes:
        criterion: makes scores of statistics; the name of one in ``CRITERIA`` stands for it.
        hook: where a channel is read, see ``find_channels``.
        pooling: makes one of the clients' statistics: ``pooled``, ``mean_of_clients`` or ``capped(...)``.
        sample: at most so many images per client, for the statistics and for batch normalisation; all where None.

    Raises:
        PlanError: a value is none of these.
    """

    criterion: Criterion = tf_idf
    hook: str = "activation"
    pooling: Pooling = pooled
    sample: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.criterion, str) and self.criterion in CRITERIA:
            object.__setattr__(self, "criterion", CRITERIA[self.criterion])
        if not callable(self.criterion):
            raise PlanError(
                f"unlearn.criterion must be one of {', '.join(CRITERIA)}, or a function of statistics and classes, "
                f"got {self.criterion!r}"
            )
        if self.hook not in HOOKS:
            raise PlanError(f"unlearn.hook must be one of {', '.join(HOOKS)}, got {self.hook!r}")
        if not callable(self.pooling):
            raise PlanError(
                f"Ranking(pooling=...) must be pooled, mean_of_clients or capped(...), got {self.pooling!r}"
            )
        if self.sample is not None and not is_whole(self.sample, 1):
            raise PlanError(
                f"Ranking(sample=...) must be a whole number of at least 1, or None for all images, got {self.sample!r}"
            )

    def scores(self, stats: ChannelStats, forget: Sequence[int], *, seed: int) -> ChannelScores:
        """Return what the criterion makes of ``stats``; ``seed``, the federation's, owns the draw of random scores."""
        if self.criterion is random_scores:
            return random_scores(stats, forget, seed=seed)
        scores = self.criterion(stats, forget)
        must_be(Mapping, scores, "what a criterion returns", "ChannelScores, scores by layer", PlanError)
        return scores


CRITERIA: dict[str, Callable[..., ChannelScores]] = {
    "tf_idf": tf_idf,
    "contrast": contrast,
    "margin": margin,
    "random": random_scores,
}


def _by_layer(stats: ChannelStats, forget: int | Sequence[int], score: Callable[[Tensor], Tensor]) -> ChannelScores:
    """Apply ``score`` to the means of each layer, the forgotten classes pooled into row 0, absent classes left out."""
    wanted = _held_classes(stats, forget)
    target = torch.tensor(wanted)
    other = stats.counts > 0
    other[target] = False
    if not bool(other.any()):
        raise PlanError(f"no client holds an image of any class but {list(wanted)}: there is nothing to compare with")
    scores = {}
    for layer, sums in stats.sums.items():
        pooled = sums[target].sum(0) / stats.counts[target].sum()
        scores[layer] = score(torch.cat([pooled[None], sums[other] / stats.counts[other][:, None]]))
    return ChannelScores(scores)


def _held_classes(stats: ChannelStats, forget: int | Sequence[int]) -> tuple[int, ...]:
    """Return the classes to forget; refuse one without images in ``stats``."""
    wanted = forget_classes(forget, len(stats.counts))
    absent = [label for label in wanted if int(stats.counts[label]) == 0]
    if absent:
        raise PlanError(
            f"no client holds an image of class {absent[0]}, or enough of them to tell (privacy.min_count, min_images "
            "of a site, unlearn.sample): there is nothing to score it by"
        )
    return wanted


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return ``above / below``, and 0 where ``below`` is 0."""
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))
