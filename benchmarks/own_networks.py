"""Networks of one's own, from training to the verdict: ``python -m benchmarks.own_networks DATA OUT`` runs both.

A ResNet20 whose normalisation is ``GroupNorm`` and a MobileNetV2, on the first fifth of CIFAR-10's training images over
ten clients, beside three retrained models each. DATA is the folder of CIFAR-10; OUT keeps the runs, which go on there.
The figures are written to benchmarks/own_networks.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.networks import define_operators
from fedunlearn.data.readers import read_cifar10
from fedunlearn.models import build_model
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe

OUT = Path(__file__).parent / "own_networks.json"
PART = 10_000
SETTINGS = (
    "data.source=npz",
    "train.rounds=390",
    "train.local_epochs=0.128",  # two steps, as the recipe's on all images
    "unlearn.rounds=40",
    "unlearn.local_epochs=0.128",
    "erase.complement=1.0",
    "erase.separation=0.1",
    "erase.until=0.3",
    "audit.oracles=3",
    "audit.images=200",
    "compute.precision=float32",
    "compute.workers=1",
)


def resnet20_gn(classes: int, colours: int) -> nn.Module:
    """Return a ResNet20 with group normalisation of eight groups in the place of batch normalisation."""
    net = build_model("resnet20", classes=classes, colours=colours, shortcut="B")
    for module in list(net.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, layer.num_features))
    return net


def mobilenet_v2(classes: int, colours: int) -> nn.Module:
    """Return torchvision's MobileNetV2 of a quarter of the width, halved three times instead of five."""
    define_operators()
    from torchvision.models import MobileNetV2

    # Expansion, channels, blocks and stride of each stage.
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1)]
    settings = [list(stage) for stage in stages]
    net: nn.Module = MobileNetV2(num_classes=classes, width_mult=0.25, inverted_residual_setting=settings, dropout=0.0)
    first = net.get_submodule("features.0.0")
    assert isinstance(first, nn.Conv2d)
    first.stride = (1, 1)
    return net


def write_part(data: str, path: Path) -> Path:
    """Write the first images of CIFAR-10's training images, and its test images, as ``.npz``, and return the path."""
    train, test = read_cifar10(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        x_train=train.images[:PART].permute(0, 2, 3, 1).numpy(),
        y_train=train.labels[:PART].numpy(),
        x_test=test.images.permute(0, 2, 3, 1).numpy(),
        y_test=test.labels.numpy(),
        classes=np.array(train.classes),
    )
    return path


def main(data: str, out: str) -> None:
    """Run both networks and write their figures."""
    part = write_part(data, Path(out) / "part.npz")
    found = {}
    for network in ("resnet20_gn", "mobilenet_v2"):
        recipe = load_recipe(
            "cifar10-resnet20", [*SETTINGS, f"data.path={part}", f"model.name=benchmarks.own_networks:{network}"]
        )
        result = run(recipe, Path(out) / network, observe=_told)
        kept = ("version", "recipe", "original", "pruned", "unlearned", "controls", "oracles", "cost", "speedup")
        told = ("verdict", "reason", "decided_by", "audits")
        found[network] = {name: result[name] for name in (*kept, *told) if name in result}
        found[network]["recipe"]["data"]["path"] = ""
        OUT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _told(phase: str, done: int, planned: int) -> None:
    if done in (0, planned) or done % 50 == 0:
        print(f"{phase}: {done} of {planned}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
