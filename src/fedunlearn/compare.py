"""What unlearning is held against: fine-tuning only at equal cost, and retraining from fresh weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from fedunlearn.cache import RetrainedCache
from fedunlearn.evaluate import evaluate
from fedunlearn.federation.ledger import Cost
from fedunlearn.groups import head_layer
from fedunlearn.journal import Journal, Step
from fedunlearn.methods.finetune import finetune
from fedunlearn.methods.retrain import retrain
from fedunlearn.plan import plan_without_rows
from fedunlearn.prune import prune
from fedunlearn.setting import Setting, new_model
from fedunlearn.unlearn import Unlearned


def compare(
    setting: Setting,
    original: nn.Module,
    unlearned: Unlearned,
    journal: Journal,
    *,
    data: str,
    reached: float | None,
) -> dict[str, Any]:
    """Return the blocks ``controls``, ``oracles``, ``cost`` and ``speedup`` of result.json.

    Args:
        setting: the run.
        original: the model before unlearning.
        unlearned: the result to compare with.
        journal: of the run.
        data: fingerprint of the images, for the cache of retrained models.
        reached: accuracy of the unlearned model on validation images of the kept classes, which retraining has to
            reach; no speed-up where None.
    """
    retrained, steps, cached = _retrained(setting, unlearned, journal, data)
    oracle = _row_removed(setting, retrained) | {"cached": cached}
    blocks: dict[str, Any] = {
        "controls": {"finetune": _finetuned(setting, original, unlearned, journal)},
        "oracles": {f"retrained-{_oracle_seed(setting)}": oracle},
        "cost": {},
    }
    if reached is not None:
        # Weights from elsewhere may have been trained on what is validation data here.
        retraining = _cost_until(steps, reached) | {"validation_unseen": setting.weights is None}
        blocks["cost"]["retrain"] = retraining
        blocks["speedup"] = speedup(asdict(unlearned.cost), retraining)
        if cached:  # seconds of another day, perhaps of another machine
            blocks["speedup"].pop("client_seconds", None)
    return blocks


def speedup(unlearned: Mapping[str, Any], retrained: Mapping[str, Any]) -> dict[str, float]:
    """Return retraining cost over unlearning cost, of two cost blocks of result.json."""
    pairs = {name: (retrained[name], unlearned[name]) for name in ("client_flops", "rounds", "client_seconds")}
    pairs["bytes"] = (
        retrained["bytes_up"] + retrained["bytes_down"],
        unlearned["bytes_up"] + unlearned["bytes_down"],
    )
    return {name: above / below for name, (above, below) in pairs.items() if below}


def _finetuned(setting: Setting, original: nn.Module, unlearned: Unlearned, journal: Journal) -> dict[str, Any]:
    """Return the block of fine-tuning only, with as many operations as unlearning took."""
    fed = setting.recipe.federation
    model = copy.deepcopy(original)
    finetune(
        model,
        setting.engine,
        training=setting.recipe.repair(),
        rounds=max(1, unlearned.cost.rounds),
        flops=unlearned.cost.client_flops,
        images=int(_images_kept(setting, unlearned)),
        forget=setting.forget,
        clients=unlearned.clients,
        participation=fed.participation,
        seed=fed.seed,
        journal=journal,
    )
    return _row_removed(setting, model) | {"cost": asdict(Cost.of(journal.entries("finetune")))}


def _retrained(
    setting: Setting, unlearned: Unlearned, journal: Journal, data: str
) -> tuple[nn.Module, list[Step], bool]:
    """Return the retrained model, its rounds, and whether both were kept from an earlier run."""
    recipe, seed = setting.recipe, _oracle_seed(setting)
    model = new_model(recipe, setting.splits.train, seed=seed)
    cache = RetrainedCache.of(recipe, setting.forget, data)
    if cache is not None and not journal.steps("retrain"):
        kept = cache.restore(model)
        if kept is not None:
            return model, kept, True
    steps = retrain(
        model,
        setting.engine,
        training=recipe.training(),
        rounds=recipe.train.rounds,
        forget=setting.forget,
        clients=unlearned.clients,
        participation=recipe.federation.participation,
        validate=recipe.data.validation > 0,
        seed=seed,
        journal=journal,
    )
    if cache is not None:
        cache.store(model, steps)
    return model, steps, False


def _oracle_seed(setting: Setting) -> int:
    """Return a seed that is not the original's: the oracle shares neither its initial weights nor its draws."""
    return setting.recipe.federation.seed + 1


def _cost_until(steps: list[Step], accuracy: float) -> dict[str, Any]:
    """Return what training cost until its validation accuracy first reached ``accuracy``; all of it if it never did.

    Its evaluations are not counted, which is in favour of retraining.
    """
    first = next((k for k, step in enumerate(steps, 1) if (step.validation or 0.0) >= accuracy), None)
    spent = [entry for step in steps[:first] for entry in step.entries if entry.job == "train"]
    return asdict(Cost.of(spent)) | {"reached": first is not None}


def _images_kept(setting: Setting, unlearned: Unlearned) -> float:
    """Return how many images of the kept classes the clients of a round hold, on average."""
    rows = [setting.engine.clients.index(name) for name in unlearned.clients]
    kept = setting.table[rows][:, list(unlearned.labels)].sum()
    return float(kept) * setting.recipe.federation.participation


def _row_removed(setting: Setting, model: nn.Module) -> dict[str, Any]:
    """Return the block of a model that keeps its channels but loses the rows of the forgotten classes."""
    test = setting.splits.test
    labels = [label for label in range(len(test.classes)) if label not in setting.forget]
    head = head_layer(model, torch.zeros((1, *test.shape)))
    shipped = prune(model, plan_without_rows(model, head, setting.forget))
    return evaluate(shipped, test, forget=setting.forget, labels=labels, row_kept=model)
