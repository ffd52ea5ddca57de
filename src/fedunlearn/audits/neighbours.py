"""Audit: does the output on the forgotten class look like that of a retrained model?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View
from fedunlearn.audits.images import AuditImages


def mean_output(logits: Tensor, *, labels: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Return the mean probability of each kept class, the rows of other classes left out.

    ``mean_x softmax(logits[x, rows of kept])``, float64, shape ``(len(kept),)``.

    Args:
        logits: shape ``(images, rows)``.
        labels: the class of each row.
        kept: the kept classes, each with a row.

    Example:
        >>> mean_output(torch.tensor([[0.0, 9.0, 0.0]]), labels=[0, 1, 2], kept=[0, 2])
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    rows = [list(labels).index(label) for label in kept]
    return logits[:, rows].double().softmax(1).mean(0)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Return ``1/2 sum_k |p_k - q_k|`` of two distributions, shape ``(classes,)`` each; in [0, 1].

    Example:
        >>> total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
        0.5
    """
    return float((p.double() - q.double()).abs().sum() / 2)


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Return ``H((p + q) / 2) - (H(p) + H(q)) / 2`` with the entropy ``H`` in bits; in [0, 1].

    By entropies, as no ratio is formed: the quotients of ``KL(p | m)`` underflow for the smallest of probabilities.

    Example:
        >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        1.0
    """
    p, q = p.double(), q.double()
    entropy = torch.special.entr
    return float((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).sum()) / math.log(2)


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    if not references:
        return Found()
    output = _outputs(seen)
    expected = torch.stack([_outputs(reference) for reference in references]).mean(0)
    pairs = list(zip(output, expected))
    return Found(
        {"neighbours": Figure(sum(total_variation(p, q) for p, q in pairs) / len(pairs))},
        {
            "neighbours": {
                "jensen_shannon": sum(jensen_shannon(p, q) for p, q in pairs) / len(pairs),
                "output": output.tolist(),
                "retrained": expected.tolist(),
            }
        },
    )


def _outputs(view: View) -> Tensor:
    """Return the mean output on each forgotten class, shape ``(forgotten classes, kept classes)``."""
    images, labels = view.images, view.subject.labels
    of_class = [view.test.logits[images.test.labels == label] for label in images.forget]
    return torch.stack([mean_output(logits, labels=labels, kept=images.kept) for logits in of_class])


AUDIT = Audit(
    "neighbours",
    {
        "neighbours": FigureKind(
            "neighbours (TV)",
            "Without its row, does it answer its images otherwise than retrained models do (0: as they do)?",
            "apart",
        )
    },
    _measure,
)
