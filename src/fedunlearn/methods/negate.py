"""NoT: Y. Khalil et al., *NoT: Federated Unlearning via Weight Negation*, CVPR 2025."""

from __future__ import annotations

import torch
from torch import nn

from fedunlearn.channels.checks import passed, placed
from fedunlearn.channels.plan import Classifier
from fedunlearn.errors import ModelError
from fedunlearn.federation.federation import Federation
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained


def negate(model: Classifier, fed: Federation, request: Request, settings: LocalSettings) -> Outcome:
    """Negate the weights and biases of the first convolution, then train on the images that stay."""
    negated = model.copy()
    called = map(negated.module.get_submodule, passed(negated.module, placed(negated.example, negated.module)).outputs)
    first = next((layer for layer in called if isinstance(layer, nn.Conv2d)), None)
    if first is None:
        raise ModelError("NoT negates the first convolution, and the model has none: choose another method")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.neg_()
    repaired = trained(negated, fed, request, settings, phase="negate")
    return Outcome(delivered(repaired, request), fed.cost("negate"))


NEGATE = Method(
    "negate",
    "NoT",
    "gradients on kept images",
    negate,
    settings=LocalSettings(),
    space={"lr": (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)},
    source="Khalil et al., CVPR 2025",
)
