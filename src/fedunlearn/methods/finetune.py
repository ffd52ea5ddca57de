"""The original model goes on learning the kept classes, nothing is removed: a method, and the control of equal cost."""

from __future__ import annotations

from dataclasses import replace

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained


def finetune(model: Classifier, fed: Federation, request: Request, settings: LocalSettings) -> Outcome:
    """Train ``model`` on the kept classes; beside unlearning until clients have spent about as many operations.

    Statistics and re-estimation count. With ``F`` the operations of unlearning, ``f`` those of training on one image,
    ``n`` the images of a round and ``r`` rounds, the local epochs of each round are then ``F / (f r n)``.
    """
    if request.spent is None or settings.epochs is not None:
        tuned = trained(model, fed, request, settings, objective=None, phase="finetune")
        return Outcome(delivered(tuned, request), fed.cost("finetune"))
    cost = request.spent
    rounds = max(1, cost.rounds)
    _, per_image = flops_per_image(model.module, model.shape)
    epochs = cost.client_flops / per_image / (rounds * int(request.images))
    lr = request.repair.training.lr if settings.lr is None else settings.lr
    training = replace(request.repair.training, lr=lr, local_epochs=epochs, objective=None)
    kept = fed.keeping(exclude=request.forget, clients=request.clients)
    tuned = train_rounds(model, kept, training, rounds=rounds, phase="finetune", server=request.repair.server)
    return Outcome(delivered(tuned, request), fed.cost("finetune"))


FINETUNE = Method(
    "finetune",
    "fine-tuning only",
    "gradients on kept images",
    finetune,
    settings=LocalSettings(),
    space={"lr": (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)},
    matched=True,
)
