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
    fed = setting.recipe.federation
    common: dict[str, Any] = {
        "forget": setting.forget,
        "clients": unlearned.clients,
        "participation": fed.participation,
        "journal": journal,
    }
    tuned = copy.deepcopy(original)
    finetune(
        tuned,
        setting.engine,
        training=setting.recipe.repair(),
        rounds=max(1, unlearned.cost.rounds),
        flops=unlearned.cost.client_flops,
        images=int(_images_kept(setting, unlearned)),
        seed=fed.seed,
        **common,
    )
    blocks: dict[str, Any] = {"controls": {"finetune": _row_removed(setting, tuned)}, "cost": {}}
    blocks["controls"]["finetune"]["cost"] = asdict(Cost.of(journal.entries("finetune")))

    seed = fed.seed + 1  # not the original's initial weights
    retrained = new_model(setting.recipe, setting.splits.train, seed=seed)
    cache = RetrainedCache.of(setting.recipe, setting.forget, data)
    kept = None if cache is None or journal.steps("retrain") else cache.restore(retrained)
    cached = kept is not None
    steps = kept or retrain(
        retrained,
        setting.engine,
        training=setting.recipe.training(),
        rounds=setting.recipe.train.rounds,
        validate=setting.recipe.data.validation > 0,
        seed=seed,
        **common,
    )
    if cache is not None and not cached:
        cache.store(retrained, steps)
    blocks["oracles"] = {f"retrained-{seed}": _row_removed(setting, retrained) | {"cached": cached}}
    if reached is not None:
        blocks["cost"]["retrain"] = _cost_until(steps, reached)
        # Weights from elsewhere may have been trained on what is validation data here.
        blocks["cost"]["retrain"]["validation_unseen"] = setting.weights is None
        blocks["speedup"] = speedup(asdict(unlearned.cost), blocks["cost"]["retrain"])
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
