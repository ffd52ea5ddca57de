"""Audit: how far are the layers from those of a retrained model?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, linalg

from fedunlearn.audits.base import Audit, Figure, FigureKind, Found, Subject, View
from fedunlearn.audits.images import AuditImages


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations of the same images.

    With the columns of ``X`` and ``Y`` centred: ``|Y'X|^2 / (|X'X| |Y'Y|)``, Frobenius norms; 1 is equal up to
    rotation and scale. S. Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019.

    Args:
        x: shape ``(images, width)``.
        y: shape ``(images, other width)``.

    Returns:
        In [0, 1]; 0 where one of them is constant.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
        >>> round(linear_cka(x, 3 * x.flip(1) + 1), 6)
        1.0
    """
    x, y = _centred(x), _centred(y)
    scale = linalg.matrix_norm(x.T @ x) * linalg.matrix_norm(y.T @ y)
    return float(linalg.matrix_norm(y.T @ x) ** 2 / scale) if scale > 0 else 0.0


def procrustes(x: Tensor, y: Tensor) -> float:
    """Return the orthogonal Procrustes distance of two representations of the same images.

    With the columns centred and both scaled to Frobenius norm 1: ``min_Q |X - Y Q|^2 = 2 - 2 |X'Y|_*``, the nuclear
    norm; the narrower one counts as padded with zeros. In [0, 2].
    F. Ding, J.-S. Denain, J. Steinhardt, *Grounding Representation Similarity Through Statistical Testing*, 2021.

    Args:
        x: shape ``(images, width)``.
        y: shape ``(images, other width)``.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
        >>> abs(round(procrustes(x, 3 * x.flip(1) + 1), 6))
        0.0
    """
    x, y = _centred(x), _centred(y)
    scale = linalg.matrix_norm(x) * linalg.matrix_norm(y)
    if scale == 0:
        return 2.0
    return float(2 - 2 * linalg.matrix_norm(x.T @ y, "nuc") / scale)


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
    if not references:
        return Found()
    distances = {
        layer: {
            name: sum(distance(x, reference.layers[layer]) for reference in references) / len(references)
            for name, distance in (("cka", linear_cka), ("procrustes", procrustes))
        }
        for layer, x in seen.layers.items()
        if all(layer in reference.layers for reference in references)  # a network of another kind shares the features
    }
    figures = {name: Figure(value) for name, value in distances["features"].items()}
    return Found(figures, {"representation": distances})


AUDIT = Audit(
    "representation",
    {
        "cka": FigureKind(
            "features (CKA)", "How alike are the features to those of retrained models (100: the same)?", "near"
        ),
        "procrustes": FigureKind(
            "features (Procrustes)", "How far are the features from those of retrained models?", "apart", largest=2.0
        ),
    },
    _measure,
)
