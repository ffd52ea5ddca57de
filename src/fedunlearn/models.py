"""The shipped CNNs: ResNets for CIFAR, VGGs with batch normalisation, and a small one.

ResNets: K. He, X. Zhang, S. Ren, J. Sun, *Deep Residual Learning for Image Recognition*, 2015, section 4.2:
three stages of ``(depth - 2) / 6`` blocks with 16, 32 and 64 channels. VGGs: K. Simonyan, A. Zisserman, 2014,
table 1, with batch normalisation after each convolution and one linear layer, as is usual for 32 x 32 pixels.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from fedunlearn.arguments import is_whole
from fedunlearn.errors import ModelError

SHORTCUTS = ("A", "B")
VGGS = {
    "vgg11": "64 M 128 M 256 256 M 512 512 M 512 512 M",
    "vgg13": "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    "vgg16": "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    "vgg19": "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}
RESNETS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56}
MODELS = ("small-cnn", *RESNETS, *VGGS)


def build_model(name: str, *, classes: int, colours: int, shortcut: str = "A") -> nn.Module:
    """Build a shipped model with fresh weights, or call ``package.module:function`` for one.

    Args:
        name: one of ``MODELS``, or ``package.module:function`` called with ``classes`` and ``colours``.
        classes: outputs.
        colours: channels of an image.
        shortcut: for ResNets, ``"A"`` (zero-padded identity) or ``"B"`` (1 x 1 convolution).

    Raises:
        ModelError: the name is unknown, a number is none, or the function does not give an ``nn.Module``.
    """
    for what, number in (("classes", classes), ("colours", colours)):
        if not is_whole(number, 1):
            raise ModelError(f"build_model({what}=...) must be a whole number of at least 1, got {number!r}")
    if ":" in name:
        return _build_by_path(name, classes, colours)
    if name == "small-cnn":
        return SmallCNN(classes, colours)
    if name in RESNETS:
        if shortcut not in SHORTCUTS:
            raise ModelError(f"model.shortcut must be A or B, got {shortcut!r}")
        return ResNet(RESNETS[name], classes, colours, shortcut)
    if name in VGGS:
        return VGG(VGGS[name], classes, colours)
    raise ModelError(f"model.name must be one of {', '.join(MODELS)} or package.module:function, got {name!r}")


def _build_by_path(path: str, classes: int, colours: int) -> nn.Module:
    module, _, function = path.partition(":")
    try:
        with _working_directory_last():
            build: Callable[..., object] = getattr(importlib.import_module(module), function)
            model = build(classes=classes, colours=colours)
    except SystemExit as error:
        raise ModelError(
            f"model.name {path!r}: its file ends the program when it is imported (SystemExit: {error}): put what it "
            'does as a program under if __name__ == "__main__"'
        ) from error
    except Exception as error:  # the user's own code can fail in any way
        raise ModelError(
            f"model.name {path!r}: {error}; expected package.module:function on Python's path or in the "
            "working directory (run the command in the folder where it lies), called with classes= and colours="
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name {path!r}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


@contextmanager
def _working_directory_last() -> Iterator[None]:
    """Let Python look into the working directory too, last: nothing that lies there stands in for what is installed."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions (32, 64, 64 channels) with batch normalisation, mean pooling, one linear layer."""

    def __init__(self, classes: int, colours: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(colours, 32), *_convolution(32, 64), nn.MaxPool2d(2), *_convolution(64, 64)
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape ``(images, classes)``."""
        logits: Tensor = self.linear(self.features(images).mean((2, 3)))
        return logits


class VGG(nn.Module):
    """Convolutions of one column of the VGG table, then one linear layer."""

    def __init__(self, plan: str, classes: int, colours: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in plan.split():
            layers += [nn.MaxPool2d(2)] if step == "M" else _convolution(colours, int(step))
            colours = colours if step == "M" else int(step)
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(colours, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape ``(images, classes)``."""
        logits: Tensor = self.linear(self.features(images).mean((2, 3)))
        return logits


class ResNet(nn.Module):
    """The ResNet for 32 x 32 pixels: one convolution, three stages, mean pooling, one linear layer."""

    def __init__(self, depth: int, classes: int, colours: int, shortcut: str) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(colours, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, shortcut)
        self.layer2 = _stage(16, 32, blocks, 2, shortcut)
        self.layer3 = _stage(32, 64, blocks, 2, shortcut)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape ``(images, classes)``."""
        maps = F.relu(self.bn1(self.conv1(images)), inplace=True)
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits: Tensor = self.linear(maps.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        if before == after:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "A":
            self.shortcut = ZeroPad(after - before)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(maps), inplace=True)


class ZeroPad(nn.Module):
    """Option A of the ResNet paper: every second pixel, and half of the new channels as zeros on either side."""

    def __init__(self, new: int) -> None:
        super().__init__()
        self.before, self.after = new // 2, math.ceil(new / 2)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``maps`` at half the size with ``new`` more channels."""
        return F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def _stage(before: int, after: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = _Block(before, after, stride, shortcut)
    return nn.Sequential(first, *(_Block(after, after, 1, shortcut) for _ in range(blocks - 1)))


def _convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
