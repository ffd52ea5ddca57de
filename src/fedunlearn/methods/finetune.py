"""Control of equal cost: the original model goes on learning the kept classes, nothing is removed."""

from __future__ import annotations

from dataclasses import replace

from fedunlearn.channels.plan import Classifier
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.methods.base import Method, Outcome, Request, delivered


def finetune(model: Classifier, fed: Federation, request: Request) -> Outcome:
    """Train ``model`` on the kept classes until the clients have spent about as many operations as unlearning took.

    Statistics and re-estimation count. With ``F`` the operations of unlearning, ``f`` those of training on one image,
    ``n`` the images of a round and ``r`` rounds, the local epochs of each round are ``F / (f r n)``.
    """
    cost = request.unlearned.cost
    rounds = max(1, cost.rounds)
    _, per_image = flops_per_image(model.module, model.shape)
    epochs = cost.client_flops / per_image / (rounds * int(request.images))
    training = replace(request.repair.training, local_epochs=epochs, objective=None)
    kept = fed.keeping(exclude=request.forget, clients=request.unlearned.clients)
    tuned = train_rounds(model, kept, training, rounds=rounds, phase="finetune", server=request.repair.server)
    return Outcome(delivered(tuned, request), fed.cost("finetune"))


FINETUNE = Method("finetune", "fine-tuning only", "gradients on kept images", finetune)
