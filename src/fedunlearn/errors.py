"""The exceptions fedunlearn raises on purpose.

::

    FedUnlearnError
    ├── DataError         images, labels, files of images, partitions
    ├── ModelError        architectures that cannot be pruned, weights that do not fit
    ├── PlanError         scores, fractions, classes to forget, pruning plans
    ├── FederationError   clients, replies, too few of them
    ├── RecipeError       keys and values of a recipe
    ├── RunError          the folder a run writes into
    └── EvidenceError     keys and dossiers

Every message says what was expected, what came, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 5


def printable(text: str) -> str:
    """Return ``text`` as one line that a terminal shows as it is."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def listed(texts: Iterable[str], between: str = ", ") -> str:
    """Return the first five of ``texts``, and how many more there are: a fleet has thousands of clients."""
    every = list(texts)
    more = len(every) - _LISTED
    return between.join(every[:_LISTED]) + (f" and {more} more" if more > 0 else "")


class FedUnlearnError(Exception):
    """Base of every error that fedunlearn raises on purpose: one line, whatever names of files or fields it quotes."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class DataError(FedUnlearnError):
    """Images, labels or files of images are not what they should be."""


class ModelError(FedUnlearnError):
    """A model cannot be pruned, or weights do not fit it."""


class PlanError(FedUnlearnError):
    """Scores, a fraction, the classes to forget or a pruning plan are not valid."""


class FederationError(FedUnlearnError):
    """Clients are missing, or too few of them answered."""


class RecipeError(FedUnlearnError):
    """A recipe has an unknown key or a value outside its range."""


class RunError(FedUnlearnError):
    """The folder of a run cannot be used."""


class EvidenceError(FedUnlearnError):
    """A key cannot be used, or a dossier does not hold."""
