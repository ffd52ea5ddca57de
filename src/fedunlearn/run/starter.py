"""``fedunlearn init``: a recipe and a model to start from, for a folder of pictures or an .npz."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from fedunlearn.data.images import LabelledImages
from fedunlearn.data.npz import read_npz
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.data.readers import read_folder
from fedunlearn.errors import DataError, RunError
from fedunlearn.files import write_text
from fedunlearn.run.inputs import class_numbers

_SIZE = 32
_CLIENTS, _BATCH = 10, 16
_EACH = 40  # images of a client, or a tenth of them for validation has few of a class: then fewer clients
_STEPS = 200  # of training at each client, or too little is learned; the repair takes a tenth of the rounds
_ROUNDS = 20, 100
_RECIPE = """\
# Made by fedunlearn init; every key is explained in docs/recipes.md. Run it in this folder: fedunlearn run {recipe}
[data]
source = "{source}"
path = {path}
size = {size}
validation = {validation:g}        # share of each client's images
# mean = [0.485, 0.456, 0.406]  # what your weights were trained on, a number per colour: without, that of the images
# std = [0.229, 0.224, 0.225]

[federation]
clients = {clients}            # equal shares of the images{groups}

[model]
name = "{module}:net"    # the function net in {module}.py beside this file

[train]
rounds = {rounds}
batch_size = {batch}

[unlearn]
forget = [{forget}]
criterion = "contrast"
fraction = {fraction}
rounds = {repair}

[audit]
oracles = 5             # models retrained without the class, to judge by; 0 for a first look
"""
_MODEL = '''\
"""A CNN of one's own for fedunlearn: replace it by yours. It ends in a linear layer with a row per class."""

from torch import nn


def net(classes: int, colours: int) -> nn.Module:
    """Return a new model for images of {shape}."""
    return nn.Sequential(
        nn.Conv2d(colours, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
'''


_AUTO = '"auto"       # the smallest cut that forgets, by validation images; a number is three times as cheap'
_NUMBER = '0.3          # of the channels; "auto" needs validation images of the class, and it has too few images'


def _choice(images: LabelledImages, forget: Sequence[int], clients: int) -> tuple[float, str]:
    """Return the share held out for validation and the fraction: with few images, one by which a cut can be chosen."""
    shares = partition(images, by="iid", clients=clients, seed=0)
    for validation in (0.1, 0.2, 0.3):
        if any(int(held.counts()[list(forget)].sum()) for held in hold_out(shares, validation, seed=0)[1].values()):
            return validation, _AUTO
    return 0.1, _NUMBER


def write_starter(data: Path, forget: str, out: Path) -> tuple[Path, LabelledImages]:
    """Write ``recipe.toml`` and ``my_model.py`` into ``out`` and return the recipe and the images to train on.

    Args:
        data: an ``.npz`` or a folder of pictures, which are resized to 32 x 32 pixels.
        forget: name or number of the class to forget.
        out: folder.

    Raises:
        DataError, PlanError: the data cannot be read, or have no such class.
        RunError: one of the files is there already.
    """
    recipe, model = out / "recipe.toml", out / "my_model.py"
    for path in (recipe, model):
        if path.exists():
            raise RunError(f"{path} is there already and stays as it is: choose another folder (--out), or delete it")
    if not data.exists():
        raise DataError(f"{data}: expected an .npz or a folder of pictures, found nothing: check the path")
    packed = data.suffix == ".npz"
    try:
        str(data.resolve()).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{data}: the path is no UTF-8, as a recipe is: rename the folders in it") from error
    images = (read_npz(data) if packed else read_folder(data, size=_SIZE)).train
    label = int(forget) if forget not in images.classes and forget.isdecimal() else forget
    forgotten = class_numbers([label], images.classes)  # refused here, by name
    clients = min(_CLIENTS, max(2, len(images) // _EACH))
    validation, fraction = _choice(images, forgotten, clients)
    steps = math.ceil(len(images) / clients / _BATCH)
    rounds = min(max(math.ceil(_STEPS / steps), _ROUNDS[0]), _ROUNDS[1])
    text = _RECIPE.format(
        recipe=recipe.name,
        source="npz" if packed else "folder",
        path=json.dumps(str(data.resolve()), ensure_ascii=False),
        clients=clients,
        groups='; partition = "group" and clients = 0 make one of each group' if images.groups is not None else "",
        rounds=rounds,
        validation=validation,
        fraction=fraction,
        batch=_BATCH,
        repair=rounds // 10,
        size=0 if packed else _SIZE,
        module=model.stem,
        # By name: a number is that of another class once the images of the forgotten one are deleted.
        forget=json.dumps(images.classes[forgotten[0]], ensure_ascii=False),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_text(model, _MODEL.format(shape=" x ".join(map(str, images.shape))))
    write_text(recipe, text)
    return recipe, images
