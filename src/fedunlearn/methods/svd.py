"""SVD projection: S. Kodge et al., *Deep Unlearning: Fast and Efficient Gradient-free Class Forgetting*, TMLR 2024."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedunlearn.arguments import is_positive
from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.measuring import summed
from fedunlearn.federation.sums import Moments
from fedunlearn.methods.base import Method, Outcome, Request, delivered
from fedunlearn.training.moments import moment_layers
from fedunlearn.training.objectives.base import in_range


@dataclass(frozen=True)
class Svd:
    """Settings: the scales of the two spaces; as published for CIFAR-10 (1000 and 30 for CIFAR-100)."""

    kept: float = 100.0
    forgotten: float = 3.0

    def __post_init__(self) -> None:
        in_range(self, kept=is_positive, forgotten=is_positive)


def svd(model: Classifier, fed: Federation, request: Request, settings: Svd) -> Outcome:
    """Take out of the weights of each layer what the forgotten classes' inputs span and the others' do not.

    ``W <- W (I - P_f + P_r P_f)``: an input loses its part in the forgotten classes' space, but for what of that part
    lies in the others'. (The released code multiplies by the transpose of ``I - P_f (I - P_r)``; not transposed,
    it leaves the inputs that stay as they are, and forgets little.)
    """
    stay = fed.besides(request.forget)
    sample = request.rank.sample
    holders = fed.keeping(clients=request.holders)
    gone, _ = summed(model, holders, Moments(exclude=stay, sample=sample), phase="svd-forgotten")
    able = fed.keeping(clients=request.clients)
    kept, _ = summed(model, able, Moments(exclude=request.forget, sample=sample), phase="svd-kept")
    edited = model.copy()
    with torch.no_grad():
        for name, layer in moment_layers(edited.module).items():
            if not (gone[name].any() and kept[name].any()):
                continue  # clients told nothing of it, and what is told of one kind alone protects nothing
            w = layer.weight
            p_f, p_r = projection(gone[name], settings.forgotten), projection(kept[name], settings.kept)
            left = w.flatten(1).double() @ (torch.eye(len(p_f), dtype=torch.float64) - p_f + p_r @ p_f)
            w.copy_(left.reshape(w.shape))
    return Outcome(delivered(edited, request), fed.cost("svd"))


def projection(moments: Tensor, scale: float) -> Tensor:
    """Return ``U diag(a s / ((a - 1) s + 1)) U^T`` with ``U`` the eigenvectors and ``s`` the shares of the eigenvalues.

    Args:
        moments: ``sum x x^T``, shape ``(d, d)``; all zeros give zeros.
        scale: ``a``; 1 weighs each direction by its share, a large one makes a projection.
    """
    values, vectors = torch.linalg.eigh(moments)
    shares = values.clamp_min(0) / values.clamp_min(0).sum().clamp_min(1e-300)
    found: Tensor = (vectors * (scale * shares / ((scale - 1) * shares + 1))) @ vectors.T
    return found


SVD = Method(
    "svd",
    "SVD projection",
    "forward passes over images of all classes",
    svd,
    settings=Svd(),
    space={"kept": (3.0, 10.0, 30.0, 100.0, 1000.0), "forgotten": (3.0, 10.0, 30.0, 100.0)},
    source="Kodge et al., TMLR 2024",
    other_sums=True,
    sums=True,
)
