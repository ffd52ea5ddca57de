"""Which networks can be pruned: ``python -m benchmarks.networks`` writes benchmarks/networks.json, in ten minutes.

Networks of torchvision and of timm (``pip install '.[zoo]'``), with fresh weights. Of each: how many convolutions can
lose channels, which cannot and why, and whether the network without three tenths of the channels gives the logits of
the one in which they are masked. Normalisations over channels see those that stay in both.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedunlearn.channels.checks import example_images, forward
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.plan import Cut, plan_pruning, prune
from fedunlearn.channels.trial import masked
from fedunlearn.errors import FedUnlearnError

OUT = Path(__file__).parent / "networks.json"
FRACTION = 0.3
SIDE, LARGE = 64, 96
TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "vgg11_bn",
    "wide_resnet50_2",
)
TIMM = (
    "convnextv2_atto",
    "cspresnet50",
    "dla34",
    "dpn48b",
    "efficientnet_lite0",
    "ghostnet_050",
    "hardcorenas_a",
    "hrnet_w18_small",
    "lcnet_050",
    "mixnet_s",
    "mobilenetv4_conv_small",
    "repvgg_a0",
    "res2net50_26w_4s",
    "resnet50_gn",
    "seresnet50",
    "tf_efficientnet_b0",
    "vovnet39a",
    "xception41",
)


def main() -> None:
    """Try every network, or those that are named, and write what came of it."""
    found = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    wanted = sys.argv[1:]
    for name, make in networks().items():
        if not wanted or name in wanted:
            found[name] = tried(make, LARGE if "inception" in name else SIDE)
            print(name, {key: value for key, value in found[name].items() if key != "left_out"}, flush=True)
            OUT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", "utf-8")


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each network, for ten classes."""
    define_operators()
    import timm  # no dependency of the package, nor is torchvision
    from torchvision import models

    heads = {"aux_logits": False, "init_weights": False}
    made: dict[str, Callable[[], nn.Module]] = {}
    for name in TORCHVISION:
        options = heads if name in ("googlenet", "inception_v3") else {}
        made[f"torchvision {name}"] = partial(models.get_model, name, weights=None, num_classes=10, **options)
    for name in TIMM:
        made[f"timm {name}"] = partial(timm.create_model, name, pretrained=False, num_classes=10)
    return made


def tried(make: Callable[[], nn.Module], side: int) -> dict[str, Any]:
    """Return what pruning makes of a network."""
    torch.manual_seed(0)
    net, example = _spread(make()), example_images((3, side, side))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    begun = time.monotonic()
    try:
        head_layer(net, example)
        channels = find_channels(net, example)
        draw = torch.Generator().manual_seed(0)
        scores = {layer: torch.rand(group.width, generator=draw) for group in channels.groups for layer in group.layers}
        plan = plan_pruning(channels, scores, Cut(FRACTION))
        smaller = prune(net, plan)
    except FedUnlearnError as error:
        return {"refused": str(error)}
    removed = {group: plan.pruned[group.layers[0]] for group in channels.groups}
    found, expected = forward(smaller, example), masked(net, smaller, removed, example)
    apart = float((found - expected).abs().max() / expected.abs().max())
    return {
        "layers": len(channels.taps),
        "left_out": dict(Counter(channels.left_out.values())),
        "parameters": [parameters, sum(parameter.numel() for parameter in smaller.parameters())],
        "apart": apart,
        "moved": float((expected - forward(net, example)).abs().max() / expected.abs().max()),
        "seconds": round(time.monotonic() - begun, 1),
    }


def _spread(net: nn.Module) -> nn.Module:
    """Return ``net`` in evaluation, with weights under which a channel in a wrong place would show."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if (parameter.ndim == 1 and not name.endswith("bias")) or "scale" in name or "gamma" in name:
                parameter.uniform_(0.5, 1.5)
        net.train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
        for _ in range(4):
            net(torch.randn(4, 3, LARGE, LARGE))
    return net.eval()


def define_operators() -> None:
    """Let torchvision be imported beside a torch that its binary was not built for: its networks need no operator."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        sys.exit("torchvision is not there: pip install '.[zoo]'")
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text("utf-8")
    for name in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', text))):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
        except RuntimeError:  # it is there
            return


if __name__ == "__main__":
    main()
