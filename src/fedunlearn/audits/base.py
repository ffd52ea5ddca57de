"""What an audit is: the model it looks at, what that model makes of the images, and the figures that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from fedunlearn.arguments import must_be
from fedunlearn.audits.images import AuditImages
from fedunlearn.audits.observe import Observed, observe
from fedunlearn.channels.plan import Classifier
from fedunlearn.errors import ModelError

Kind = Literal["class", "apart", "near"]


@dataclass(frozen=True, eq=False)
class Shipped:
    """The file in which a model is delivered.

    Attributes:
        path: the ``.safetensors`` file.
        state: tensors of the original model by name.
    """

    path: Path
    state: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to audit.

    Attributes:
        model: the model as it is delivered, with the class of each of its output rows.
        row_kept: the same model with a row for every class, where it is known: without a row for the forgotten class
            a model never names it, whatever the model knows. ``model`` itself where that has all rows in order.
        shipped: the file of the model, where the original is known.

    Raises:
        ModelError: a model is no classifier.
    """

    model: Classifier
    row_kept: Classifier | None = None
    shipped: Shipped | None = None

    def __post_init__(self) -> None:
        for name, model in (("model", self.model), ("row_kept", self.row_kept or self.model)):
            must_be(
                Classifier, model, f"Subject({name})", "a Classifier, such as Classifier(module, shape)", ModelError
            )

    @staticmethod
    def without_rows(model: Classifier, classes: Collection[int]) -> Subject:
        """Return ``model``, which has a row for every class, as it is delivered: without the rows of ``classes``."""
        return Subject(model.without_rows(classes), model)

    def checked(self, name: str, classes: int, forget: Collection[int]) -> Subject:
        """Return the subject with the class of each output row, held against the images of an audit.

        Args:
            name: of the model, in messages.
            classes: number of classes of the images.
            forget: the forgotten classes.

        Raises:
            ModelError: rows, labels and classes do not fit together, a kept class has no row, some classes to forget
                have one and others not, ``row_kept`` has not a row for every class in order, or weights are not finite.
        """
        try:
            model = self.model.checked(classes)
            row_kept = None if self.row_kept is None else self.row_kept.checked(classes)
        except ModelError as error:
            raise ModelError(f"the audit of {name}: {error}") from error
        lacking = sorted(set(range(classes)) - set(forget) - set(model.labels or ()))
        if lacking:
            raise ModelError(
                f"the audit of {name}: the model has no output row for class {lacking[0]}, which stays: "
                f"only those of {sorted(forget)} may be missing"
            )
        if row_kept is None and model.labels == tuple(range(classes)):
            row_kept = model  # its rows are in place, so what it names is known
        there = sorted(set(model.labels or ()) & set(forget))
        if row_kept is None and there:  # what it names of them would be told by no figure
            raise ModelError(
                f"the audit of {name}: its output rows are of the classes {list(model.labels or ())}, {there} of those "
                f"to forget among them: expected all of 0 .. {classes - 1} in this order, or none of "
                f"{sorted(forget)}; give them in order, or audit the classes whose rows are gone"
            )
        if row_kept is not None and row_kept.labels != tuple(range(classes)):
            raise ModelError(
                f"the audit of {name}: row_kept must have a row for each class 0 .. {classes - 1} in this order, its "
                f"rows are {list(row_kept.labels or ())}: give the model before rows were removed, or None"
            )
        return Subject(model, row_kept, self.shipped)

    @property
    def labels(self) -> tuple[int, ...]:
        """The class of each output row of the delivered model."""
        return row_labels(self.model)


def row_labels(model: Classifier) -> tuple[int, ...]:
    """Return the class of each output row of ``model``."""
    return tuple(range(model.rows)) if model.labels is None else model.labels


@dataclass(frozen=True, eq=False)
class View:
    """What the delivered model makes of the images: each part is computed when it is first asked for, and kept.

    Attributes:
        subject: the model.
        images: the images of the audit.
        before: whether it is the original, which relearns with its own row: without it, it is ``head_only``.
    """

    subject: Subject
    images: AuditImages
    before: bool = False

    @cached_property
    def test(self) -> Observed:
        """What the model makes of the test images."""
        return observe(self.subject.model, self.images.test)

    @cached_property
    def known(self) -> Observed:
        """What the model makes of the training images of all classes."""
        return observe(self.subject.model, self.images.known)

    @cached_property
    def members(self) -> Tensor:
        """Logits of ``images.members``, shape ``(images, rows)``."""
        members = self.images.members
        if len(members) == 0:  # every one of them is a test image too
            return torch.zeros((0, len(self.subject.labels)))
        return observe(self.subject.model, members).logits

    @cached_property
    def layers(self) -> dict[str, Tensor]:
        """Activations on ``images.compared`` by layer, the penultimate features under ``features``."""
        compared = observe(self.subject.model, self.images.test.take(self.images.compared), layers=True)
        return {**compared.layers, "features": compared.features}


@dataclass(frozen=True)
class Figure:
    """One figure of an audit.

    Attributes:
        value: the figure.
        error: its standard error on the images it was measured on; 0 where none is known.
    """

    value: float
    error: float = 0.0


def share(correct: int, total: int) -> Figure:
    """Return a share with its standard error after Agresti and Coull: ``sqrt(p (1-p) / n')``, ``n' = n + 4``.

    ``p = (correct + 2) / n'``, so that the error of 0 of 30 is not 0.

    Example:
        >>> share(0, 96)
        Figure(value=0.0, error=0.014)
    """
    p = (correct + 2) / (total + 4)
    return Figure(correct / total, (p * (1 - p) / (total + 4)) ** 0.5)


def alike(features: Tensor) -> bool:
    """Return whether each feature, shape ``(images, width)``, is the same in all images as far as rounding goes.

    Whatever is named by such features is named as one class: which one, rounding or the order of the classes decides.
    Each channel by itself: beside a large constant one, any other would pass for rounding.
    """
    return bool(((features - features[:1]).abs().amax(0) <= 1e-5 * features.abs().amax(0)).all())


def by_class(right: Tensor, truth: Tensor) -> Figure:
    """Return the mean over classes of the share of their images that are right: ``1/K sum_k p_k``.

    Its error is ``sqrt(sum_k e_k^2) / K``, ``e_k`` that of ``share``. A rare class weighs as any other: in one share of
    all images, five of its own beside a thousand of another would not be seen.

    Args:
        right: bool, shape ``(images,)``, at least one.
        truth: classes, int64, shape ``(images,)``.

    Example:
        >>> by_class(torch.tensor([True] + [False] * 99), torch.tensor([1] + [0] * 99)).value
        0.5
    """
    of_class = [right[truth == label] for label in torch.unique(truth)]
    shares = [share(int(rows.sum()), len(rows)) for rows in of_class]
    return Figure(fmean(one.value for one in shares), math.hypot(*(one.error for one in shares)) / len(shares))


def error_by_class(mean: float, truth: Tensor) -> float:
    """Return the error of ``by_class`` where each class has the share ``mean``: of a mean over draws or training."""
    counts = torch.unique(truth, return_counts=True)[1].tolist()
    return math.hypot(*(share(round(mean * n), n).error for n in counts)) / len(counts)


@dataclass(frozen=True, eq=False)
class Found:
    """What audits found of one model.

    Attributes:
        figures: by name; an audit that could not be done gives none.
        details: what a reader wants beside the figures: confusion, curves, distances per layer.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FigureKind:
    """What a figure says.

    Attributes:
        label: its name in the report.
        question: what it answers.
        kind: what a value above the band says. ``"class"``: the model knows more of the forgotten class than a
            retrained model does. ``"apart"``: the model is further from the retrained models than they are from each
            other. ``"near"``: the opposite of ``"apart"``.
        plain: what it counts, for a reader who knows no audit; the label where empty.
        largest: largest value that the figure can take.
        fixed: the one value that passes, whatever the retrained models give; None where they set the band.
    """

    label: str
    question: str
    kind: Kind
    plain: str = ""
    largest: float = 1.0
    fixed: float | None = None


@dataclass(frozen=True, eq=False)
class Audit:
    """One audit: a row of the table.

    Attributes:
        name: unlike that of any other audit.
        figures: what it measures, by name; the names are those in result.json.
        measure: called with the model, the images, what the model makes of them, and what retrained models, this one
            not among them, make of them; an audit that compares with retrained models finds nothing without any.
        resumed: whether figures that were read back stand; not those of what may change while the model stays.
    """

    name: str
    figures: Mapping[str, FigureKind]
    measure: Callable[[Subject, AuditImages, View, Sequence[View]], Found]
    resumed: bool = True
