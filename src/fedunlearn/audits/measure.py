"""All audits of one model.

``confusion`` is an audit of its own: what is each class named?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedunlearn.audits.linear_probe import linear_probe
from fedunlearn.audits.membership import membership, rmia, signal
from fedunlearn.audits.neighbours import jensen_shannon, mean_output, total_variation
from fedunlearn.audits.observe import Observed, observe
from fedunlearn.audits.prototypes import prototype_accuracy
from fedunlearn.audits.reestimation import reestimated
from fedunlearn.audits.relearn import relearn
from fedunlearn.audits.representation import linear_cka, procrustes
from fedunlearn.audits.rounding import rounded
from fedunlearn.audits.subject import AuditImages, Subject
from fedunlearn.data.images import LabelledImages
from fedunlearn.seeding import generator

SHOTS = (1, 5, 10)
BITS = (8, 4)
_DRAWS = 50
_DOUBLINGS = 5


@dataclass(frozen=True)
class Figure:
    """One figure of an audit.

    Attributes:
        value: the figure.
        error: its standard error on the images it was measured on; 0 where it has none of its own.
    """

    value: float
    error: float = 0.0


@dataclass(frozen=True, eq=False)
class Measured:
    """What the audits found of one model.

    Attributes:
        figures: by name, see ``verdict.KINDS``; an audit that could not be done has none.
        details: what a reader wants beside the figures: confusion, curves, distances per layer.
    """

    figures: dict[str, Figure]
    details: dict[str, Any]


@dataclass(frozen=True, eq=False)
class View:
    """What a model makes of the images of an audit.

    Attributes:
        test: of the test images.
        members: signal of membership of ``images.members``.
        others: of the test images that are not training images.
        output: mean output on the test images of each forgotten class, shape ``(forgotten classes, kept classes)``.
        layers: activations on ``images.compared``, the penultimate features under ``features``.
    """

    test: Observed
    members: Tensor
    others: Tensor
    output: Tensor
    layers: Mapping[str, Tensor]


def view(subject: Subject, images: AuditImages) -> View:
    """Return what ``subject`` makes of the images."""
    test, labels = images.test, subject.labels
    seen = observe(subject.model, test)
    members = torch.zeros(0, dtype=torch.float64)
    if len(images.members):  # every one of them may be a test image too
        members = signal(observe(subject.model, images.members).logits, images.members.labels, labels=labels)
    compared = observe(subject.model, test.take(images.compared), layers=True)
    outputs = [mean_output(seen.logits[test.labels == k], labels=labels, kept=images.kept) for k in images.forget]
    return View(
        seen,
        members,
        signal(seen.logits[images.others], test.labels[images.others], labels=labels),
        torch.stack(outputs),
        {**compared.layers, "features": compared.features},
    )


def measure_audits(
    subject: Subject, images: AuditImages, *, lr: float, own: View, references: Sequence[View]
) -> Measured:
    """Do all audits on one model.

    Args:
        subject: the model.
        images: what to audit with.
        lr: learning rate of relearning.
        own: what the model makes of the images.
        references: what retrained models make of them, this model not among them; without any, the audits that
            compare with retrained models are left out.
    """
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {}
    _accuracy(subject, images, own, figures, details)
    _features(subject, images, own, figures, details)
    _relearning(subject, images, lr, figures, details)
    if references:
        _against(images, own, references, figures, details)
    return Measured(figures, details)


def share(correct: int, total: int) -> Figure:
    """Return a share with its standard error after Agresti and Coull: ``sqrt(p (1-p) / n')``, ``n' = n + 4``.

    ``p = (correct + 2) / n'``, so that the error of 0 of 30 is not 0.

    Example:
        >>> share(0, 96)
        Figure(value=0.0, error=0.014)
    """
    p = (correct + 2) / (total + 4)
    return Figure(correct / total, (p * (1 - p) / (total + 4)) ** 0.5)


def confusion(logits: Tensor, truth: Tensor, *, labels: Sequence[int], classes: int) -> Tensor:
    """Return how many images of each class are given each name.

    ``counts[u, v] = #{x : truth[x] = u, labels[argmax_r logits[x, r]] = v}``

    Args:
        logits: shape ``(images, rows)``.
        truth: int64, shape ``(images,)``.
        labels: the class of each output row.
        classes: number of classes.

    Returns:
        int64, shape ``(classes, classes)``; the column of a class without a row is 0.

    Example:
        >>> confusion(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 2]), labels=[0, 1], classes=3)
        tensor([[1, 0, 0],
                [0, 0, 0],
                [0, 1, 0]])
    """
    named = torch.tensor(list(labels))[logits.argmax(1)]
    return torch.bincount(truth * classes + named, minlength=classes**2).reshape(classes, classes)


def _accuracy(
    subject: Subject, images: AuditImages, own: View, figures: dict[str, Figure], details: dict[str, Any]
) -> None:
    """U and R as delivered; U with the row in place, after re-estimation and after rounding."""
    classes = len(images.test.classes)
    table = confusion(own.test.logits, images.test.labels, labels=subject.labels, classes=classes)
    details["confusion"] = table.tolist()
    right, counts = table.diagonal(), table.sum(1)
    kept = list(images.kept)
    figures["retain"] = share(int(right[kept].sum()), int(counts[kept].sum()))
    if subject.row_kept is None:  # without a row U is 0 whatever the model knows
        return
    forgotten = images.forgotten(images.test)
    draw = generator(images.seed, "audit", "reestimation")
    fitted = reestimated(subject.row_kept, images.known.without(images.forget), draw=draw)
    figures["forget"] = _accuracy_on(subject.row_kept, forgotten)
    figures["reestimated"] = _accuracy_on(fitted, forgotten)
    for bits in BITS:
        figures[f"int{bits}"] = _accuracy_on(rounded(subject.row_kept, bits), forgotten)


def _accuracy_on(model: nn.Module, images: LabelledImages) -> Figure:
    return share(int((observe(model, images).logits.argmax(1) == images.labels).sum()), len(images))


def _features(
    subject: Subject, images: AuditImages, own: View, figures: dict[str, Figure], details: dict[str, Any]
) -> None:
    """Linear probe and prototypes."""
    known, test = observe(subject.model, images.known).features, own.test.features
    named = linear_probe(known, images.known.labels, test)
    of_class = torch.isin(images.test.labels, torch.tensor(images.forget))
    right = named == images.test.labels
    figures["probe"] = share(int(right[of_class].sum()), int(of_class.sum()))
    details["probe_retain"] = float(right[~of_class].double().mean())
    details["prototype_draws"] = {}
    for shots in SHOTS:
        shares = prototype_accuracy(
            known,
            images.known.labels,
            test[of_class],
            images.test.labels[of_class],
            shots=shots,
            draws=_DRAWS,
            generator=generator(images.seed, "audit", "prototypes", shots),
        )
        total = int(of_class.sum())
        error = share(round(float(shares.mean()) * total), total).error
        figures[f"prototype_{shots}"] = Figure(float(shares.mean()), error)
        details["prototype_draws"][str(shots)] = [float(shares.quantile(q)) for q in (0.05, 0.5, 0.95)]


def _relearning(
    subject: Subject, images: AuditImages, lr: float, figures: dict[str, Figure], details: dict[str, Any]
) -> None:
    forgotten = images.forgotten(images.test)
    curve = relearn(
        subject.model,
        images.known,
        forgotten,
        labels=subject.labels,
        lr=lr,
        doublings=_DOUBLINGS,
        draw=generator(images.seed, "audit", "relearn"),
    )
    error = share(round(curve.mean() * len(forgotten)), len(forgotten)).error
    figures["relearn"] = Figure(curve.mean(), error)
    details["relearn"] = {"samples": list(curve.samples), "forget": list(curve.forget)}


def _against(
    images: AuditImages, own: View, references: Sequence[View], figures: dict[str, Figure], details: dict[str, Any]
) -> None:
    """Neighbours, membership and representation, against retrained models."""
    expected = torch.stack([reference.output for reference in references]).mean(0)
    pairs = list(zip(own.output, expected))
    figures["neighbours"] = Figure(sum(total_variation(p, q) for p, q in pairs) / len(pairs))
    details["neighbours"] = {
        "jensen_shannon": sum(jensen_shannon(p, q) for p, q in pairs) / len(pairs),
        "output": own.output.tolist(),
        "retrained": expected.tolist(),
    }
    _membership(images, own, references, figures, details)
    _representation(own, references, figures, details)


def _membership(
    images: AuditImages, own: View, references: Sequence[View], figures: dict[str, Figure], details: dict[str, Any]
) -> None:
    details["membership"] = {"duplicates_left_out": images.duplicates}
    truth = images.test.labels[images.others]
    for name, classes in (("forget", images.forget), ("retain", images.kept)):
        inside = torch.isin(images.members.labels, torch.tensor(classes))
        outside = torch.isin(truth, torch.tensor(classes))
        if not bool(inside.any()) or not bool(outside.any()):  # all of them are duplicates
            continue
        found = membership(
            rmia(own.members[inside], torch.stack([reference.members[inside] for reference in references])),
            rmia(own.others[outside], torch.stack([reference.others[outside] for reference in references])),
        )
        details["membership"][name] = found.to_dict()
        if name == "forget":
            figures["membership"] = Figure(found.auc, found.auc_error)


def _representation(own: View, references: Sequence[View], figures: dict[str, Figure], details: dict[str, Any]) -> None:
    details["representation"] = {
        name: {
            kind: sum(distance(x, reference.layers[name]) for reference in references) / len(references)
            for kind, distance in (("cka", linear_cka), ("procrustes", procrustes))
        }
        for name, x in own.layers.items()
    }
    figures["cka"] = Figure(details["representation"]["features"]["cka"])
    figures["procrustes"] = Figure(details["representation"]["features"]["procrustes"])
