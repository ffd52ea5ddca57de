"""Audit: can it be told who was in the training set?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View
from fedunlearn.audits.images import AuditImages
from fedunlearn.errors import EvidenceError

_FALSE_POSITIVES = 0.01
_LEVEL = 0.95


@dataclass(frozen=True)
class Membership:
    """How well a score tells members from others.

    Attributes:
        auc: probability that a member scores higher than another image; 0.5 is chance.
        auc_error: its standard error.
        tpr: share of the members that score above all but 1 % of the others; 0.01 is chance.
        tpr_interval: its exact (Clopper-Pearson) 95 % confidence interval, for the threshold as drawn.
        members: how many.
        others: how many.
    """

    auc: float
    auc_error: float
    tpr: float
    tpr_interval: tuple[float, float]
    members: int
    others: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with the 95 % interval of the AUC."""
        from scipy import special  # slow to import

        half = float(special.ndtri((1 + _LEVEL) / 2)) * self.auc_error
        return asdict(self) | {"auc_interval": [max(0.0, self.auc - half), min(1.0, self.auc + half)]}


def signal(logits: Tensor, truth: Tensor, *, labels: Sequence[int]) -> Tensor:
    """Return the log-probability of each image's class, or of the likeliest class where the image's class has no row.

    Args:
        logits: shape ``(images, rows)``.
        truth: int64, shape ``(images,)``.
        labels: the class of each row.

    Example:
        >>> signal(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 5]), labels=[0, 1]).exp()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    log_probabilities = logits.double().log_softmax(1)
    value = log_probabilities.max(1).values
    for row, label in enumerate(labels):
        of_class = truth == label
        value[of_class] = log_probabilities[of_class, row]
    return value


def rmia(target: Tensor, references: Tensor) -> Tensor:
    """Return the score of each image in the robust membership inference attack, offline form.

    With ``p`` the target's probability and ``q`` the mean of the reference models', the attack scores an image by the
    share of other images ``z`` with ``(p(x) / q(x)) / (p(z) / q(z)) >= 1``. For one target that share grows with
    ``p(x) / q(x)`` alone, so its logarithm is returned: the same order of images, without ties::

        score(x) = log p(x) - log q(x)

    S. Zarifzadeh, P. Liu, R. Shokri, *Low-Cost High-Power Membership Inference Attacks*, ICML 2024.

    Args:
        target: ``log p(x)``, shape ``(images,)``.
        references: ``log`` of each reference model's probability, shape ``(models, images)``.

    Returns:
        float64, shape ``(images,)``.

    Example:
        >>> rmia(torch.tensor([0.9, 0.2]).log(), torch.tensor([[0.2, 0.4], [0.4, 0.4]]).log()).exp()
        tensor([3.0000, 0.5000], dtype=torch.float64)
    """
    models = torch.tensor(float(len(references)), dtype=torch.float64)
    return target.double() - (references.double().logsumexp(0) - models.log())


def membership(members: Tensor, others: Tensor) -> Membership:
    """Return how well a score tells members from others.

    The standard error of the AUC ``A`` of ``m`` members and ``n`` others is that of Hanley and McNeil (1982)::

        sqrt((A (1-A) + (m-1) (A/(2-A) - A^2) + (n-1) (2 A^2/(1+A) - A^2)) / (m n))

    Args:
        members: scores, shape ``(m,)``.
        others: scores, shape ``(n,)``.

    Raises:
        EvidenceError: there are no scores on one side, or a score is not finite.

    Example:
        >>> membership(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])).auc
        1.0
    """
    from scipy.stats import binomtest  # slow to import
    from sklearn.metrics import roc_auc_score

    m, n = len(members), len(others)
    wrong = int((~members.isfinite()).sum() + (~others.isfinite()).sum())
    if not m or not n or wrong:
        raise EvidenceError(
            f"membership needs scores of at least one member and one other image, all of them finite: got {m} and "
            f"{n}, {wrong} of them NaN or infinite; a model whose outputs are not finite cannot be audited"
        )
    truth = torch.cat([torch.ones(m), torch.zeros(n)])
    auc = float(roc_auc_score(truth.numpy(), torch.cat([members, others]).numpy()))
    spread = auc * (1 - auc) + (m - 1) * (auc / (2 - auc) - auc**2) + (n - 1) * (2 * auc**2 / (1 + auc) - auc**2)
    threshold = others.sort().values[-1 - int(_FALSE_POSITIVES * n)]
    found = int((members > threshold).sum())
    error = float(max(spread, 0.0) / (m * n)) ** 0.5
    interval = binomtest(found, m).proportion_ci(confidence_level=_LEVEL, method="exact")
    return Membership(auc, error, found / m, (float(interval.low), float(interval.high)), m, n)


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    if not references:
        return Found()
    found = Found(details={"membership": {"duplicates_left_out": images.duplicates}})
    members, others = _signal_of_members(seen), _signal_of_others(seen)
    members_of_references = torch.stack([_signal_of_members(reference) for reference in references])
    others_of_references = torch.stack([_signal_of_others(reference) for reference in references])
    for name, classes in (("forget", images.forget), ("retain", images.kept)):
        inside = torch.isin(images.members.labels, torch.tensor(classes))
        outside = torch.isin(images.test.labels[images.others], torch.tensor(classes))
        if not bool(inside.any()) or not bool(outside.any()):  # all of them are duplicates
            continue
        told = membership(
            rmia(members[inside], members_of_references[:, inside]),
            rmia(others[outside], others_of_references[:, outside]),
        )
        found.details["membership"][name] = told.to_dict()
        if name == "forget":
            found.figures["membership"] = Figure(told.auc, told.auc_error)
    return found


def _signal_of_members(view: View) -> Tensor:
    return signal(view.members, view.images.members.labels, labels=view.subject.labels)


def _signal_of_others(view: View) -> Tensor:
    others, test = view.images.others, view.images.test
    return signal(view.test.logits[others], test.labels[others], labels=view.subject.labels)


AUDIT = Audit(
    "membership",
    {
        "membership": FigureKind(
            "membership AUC",
            "Can its training images be told from its test images (chance: 50)?",
            "class",
            "training images told from others (50 % is guessing)",
        )
    },
    _measure,
)
