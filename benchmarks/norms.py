"""What takes the place of re-estimation where a network has no batch normalisation?

``python -m benchmarks.norms DATA OUT`` trains ResNet20 with batch normalisation and with group normalisation on the
first fifth of CIFAR-10 over ten clients of Dirichlet .1, three seeds each, and prunes each for class 9. R and U after
pruning, after a correction of the normalisation alone, and after the repair are written to benchmarks/norms.json.

With batch normalisation the correction is re-estimation. With group normalisation it is one tried here: scale and
shift of each channel are changed, layer after layer, until its outputs on kept images have the mean and the deviation
that they had before pruning.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.own_networks import SETTINGS, write_part
from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages
from fedunlearn.federation.journal import Journal
from fedunlearn.run.commands import run
from fedunlearn.run.experiment import original_model, prepare
from fedunlearn.run.forgetting import unlearned_model
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.result import evaluate

OUT = Path(__file__).parent / "norms.json"
NETWORKS = {"batch": "resnet20", "group": "benchmarks.own_networks:resnet20_gn"}
SEEDS = (0, 1, 2)
FORGET = 9
IMAGES = 1_000  # training images of the other classes that the correction of group normalisation sees
_SETTINGS = (
    *(setting for setting in SETTINGS if not setting.startswith(("erase.", "audit."))),
    "model.shortcut=B",
    "federation.partition=dirichlet",
    "federation.alpha=0.1",
    # All clients in each round: of two in a round, whose classes change, batch normalisation learned nothing (R 9 %).
    "federation.participation=1.0",
    "train.rounds=200",
    "unlearn.rounds=20",
)


def rescaled(pruned: Classifier, original: nn.Module, images: LabelledImages) -> Classifier:
    """Return ``pruned`` with the normalisations' outputs on ``images`` as in ``original``, by channel."""
    net = copy.deepcopy(pruned.module).eval()
    batch = images.pixels(slice(None))
    for name in [name for name, module in net.named_modules() if isinstance(module, nn.GroupNorm)]:
        kept = torch.tensor(pruned.plan.kept.get(f"{name}.weight", {}).get(0, range(_width(net, name))))
        before, after = _outputs(original, name, batch)[:, kept], _outputs(net, name, batch)
        scale = _deviation(before) / _deviation(after).clamp(min=1e-6)
        norm = net.get_submodule(name)
        with torch.no_grad():
            norm.get_parameter("bias").copy_(
                before.mean((0, 2, 3)) + scale * (norm.get_parameter("bias") - after.mean((0, 2, 3)))
            )
            norm.get_parameter("weight").mul_(scale)
    return replace(pruned, module=net)


def _width(net: nn.Module, name: str) -> int:
    return len(net.get_submodule(name).get_parameter("weight"))


def _deviation(outputs: Tensor) -> Tensor:
    return outputs.std((0, 2, 3))


def _outputs(net: nn.Module, name: str, batch: Tensor) -> Tensor:
    """Return what the layer ``name`` makes of ``batch``."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.inference_mode():
        net.eval()(batch)
    handle.remove()
    return seen[0].clone()


def measured(norm: str, seed: int, part: Path, out: Path) -> dict[str, Any]:
    """Return U and R of each stage of one network."""
    given = [*_SETTINGS, f"data.path={part}", f"model.name={NETWORKS[norm]}", f"federation.seed={seed}"]
    whole = run(load_recipe("cifar10-resnet20", given), out, command="unlearn")
    stages = {name: whole[name]["accuracy"] for name in ("original", "pruned")}
    weights = f"model.weights={out / 'original.safetensors'}"
    experiment = prepare(load_recipe("cifar10-resnet20", [*given, weights, "unlearn.repair=reestimate"]))
    fed = experiment.federation(Journal())
    original = original_model(experiment, fed)
    found = unlearned_model(experiment, original, fed)
    corrected = found.repaired
    if norm == "group":  # nothing was re-estimated
        kept = experiment.splits.train.without([FORGET]).take(slice(0, IMAGES))
        corrected = rescaled(found.pruned, original.module, kept)
    stages["corrected"] = evaluate(corrected, experiment.splits.test, forget=FORGET)["accuracy"]
    stages["repaired"] = whole["unlearned"]["accuracy"]
    return {
        name: {"forget": accuracy["forget_row_kept"], "retain": accuracy["retain"]} for name, accuracy in stages.items()
    }


def main(data: str, out: str) -> None:
    """Measure both normalisations with each seed and write the figures."""
    part = write_part(data, Path(out) / "part.npz")
    rows = []
    for seed in SEEDS:
        for norm in NETWORKS:
            rows.append({"norm": norm, "seed": seed, **measured(norm, seed, part, Path(out) / f"{norm}-{seed}")})
            OUT.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
