"""The original model goes on learning the kept classes, nothing is removed: a method, and the control of equal cost."""

from __future__ import annotations

from dataclasses import replace

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.methods.base import LocalSettings, Method, Outcome, Request, delivered, trained

_FEW = 10  # rounds of which half a one would be a cost of its own


def finetune(model: Classifier, fed: Federation, request: Request, settings: LocalSettings) -> Outcome:
    """Train ``model`` on the kept classes; beside unlearning until clients have spent about as many operations.

    Statistics and re-estimation count. With ``F`` the operations of unlearning, ``f`` those of training on one image,
    ``n`` the images of the clients of a round and ``e`` the local epochs of the repair, there are ``F / (f n e)``
    rounds; where these are fewer than ten, as many as unlearning had, with ``F / (f r n)`` epochs in each of the ``r``.
    """
    if request.spent is None or settings.epochs is not None:
        tuned = trained(model, fed, request, settings, phase="finetune")
        return Outcome(delivered(tuned, request), fed.cost("finetune"))
    cost = request.spent
    _, per_image = flops_per_image(model.module, model.shape)
    passes = cost.client_flops / per_image / request.images
    # More rounds of the repair's length, not longer ones: these can end in a batch of a few images, which costs R.
    epochs = request.repair.training.local_epochs
    rounds = round(passes / epochs)
    if rounds < _FEW:
        rounds = max(1, cost.rounds)
        epochs = passes / rounds
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
